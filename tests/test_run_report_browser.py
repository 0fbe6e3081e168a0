"""The report in a real browser: on a phone, a wide screen and paper, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qat.run_report import write_report
from qat.verification import verify
from scripts._browser import browser, missing
from scripts.screenshots import screenshots
from tests.browser import SCREENS, Screen, faults
from tests.left_runs import left_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SCREEN_IDS = [f"{screen['media']}-{screen['width']}-{screen['scheme']}" for screen in SCREENS]


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with more than a page is likely to show: many metrics, long names, and texts without a space."""
    run = left_run(tmp_path_factory.mktemp("runs"))
    results = run.with_name("run-results.json")
    rows = json.loads(results.read_text())
    for row in rows:
        row["metrics"] |= {f"a_metric_with_a_long_name_{number}": 10.0 ** (number - 4) for number in range(4)}
    rows.insert(1, {**rows[0], "name": "quantized_after_training_" * 3, "metrics": {"loss_bin_0": 1e9}})
    results.write_text(json.dumps(rows))
    run.with_name("run-samples.json").write_text(
        json.dumps([{"prompt": "x" * 500, "trained_" * 9: "<b>\n\n" + "y" * 99}])
    )
    return write_report(run, verified=verify(run))


@pytest.mark.parametrize("screen", SCREENS, ids=SCREEN_IDS)
def test_a_report_is_whole_on_every_screen(running: Browser, report: Path, screen: Screen) -> None:
    assert faults(running, report, screen) == []


FAULTS = {
    "sideways": "<p style='width: 3000px'>wide",
    "sticks out: unbreak": "<div style='width: 4em'>unbreakableunbreakable",
    "sticks out: <img": "<div style='width: 20px'><img width=60 height=9 alt='' src='data:,'></div>",
    "sticks out: cut": "<svg viewBox='0 0 99 20' width=99><text x=-20 y=15>cut</text></svg>",
    "sticks out: low": "<svg viewBox='0 0 99 20' width=99><text x=5 y=28>low</text></svg>",
    "overlaps second: first": "<p>first</p><p style='margin-top: -30px'>second",
    "overlaps 20: 10": "<svg viewBox='0 0 99 20' width=99><text x=5 y=15>10</text><text x=15 y=15>20</text></svg>",
    "contrast 2.32: grey": "<p style='color: #aaa'>grey",
    "contrast 1.00: back": "<div style='background: #000'><p style='color: #000'>back",
    "contrast 3.54: faint": "<p style='opacity: 0.5; color: #111'>faint",
    "contrast 1.40: drawn": "<svg viewBox='0 0 99 20' width=99><text x=5 y=15 fill=gold>drawn</text></svg>",
    "console: broken": "<script>console.error('broken')</script>",
    "console: thrown": "<script>throw Error('thrown')</script>",
    "request: http://127.0.0.1:9/": "<img alt='' src='http://127.0.0.1:9/none.png'>",
}
PAGE = "<!doctype html><meta charset=utf-8><title>t</title><body style='background: #fff; color: #000'><p>fine</p>"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(running: Browser, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(f"{PAGE}{FAULTS[fault]}")
    found = faults(running, path, SCREENS[0])
    assert any(one.startswith(fault) for one in found), found


def test_what_scrolls_within_its_box_is_no_fault(running: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        f"{PAGE}<div style='overflow-x: auto; width: 90px'><p style='width: 2000px'>{'wide ' * 40}</div><p>fine"
    )
    assert faults(running, path, SCREENS[0]) == []


def test_pictures_of_a_page_are_written(running: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    written = list(screenshots(running, [tmp_path / "page.html"], tmp_path / "pictures"))
    assert len(written) == 5
    assert all(path.stat().st_size for path in written)
