"""Versions outside of what was tested are said when a model is exported and when it is verified, and fail nothing."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qat
from qat import compatibility
from qat.compatibility import LIBRARIES, TESTED, outside_tested
from scripts.compatibility import outcome, page, ranges, requirements


@pytest.mark.parametrize(
    ("low", "high", "installed", "fits"),
    [
        ("2.1", "2.3", "2.2.7", True),
        ("2.1", "2.3.0", "2.3.9+cpu", True),  # a patch
        ("2.1", "2.3", "2.4.0", False),
        ("2.1", "2.3", "3.0", False),
        ("2.1.1", "2.3", "2.1.0", False),
        ("2.1", "2.3", "unknown", True),
    ],
)
def test_a_version_is_compared_with_the_range(
    low: str, high: str, installed: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: installed)
    told = () if fits else (f"torch {installed} is outside of the tested versions {low} to {high}",)
    assert outside_tested({"torch": (low, high)}) == told


def test_the_versions_of_this_suite_are_tested() -> None:
    assert set(json.loads(TESTED.read_text())) == set(LIBRARIES)
    assert outside_tested() == ()


def test_export_and_verify_say_what_was_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = tmp_path / "ranges.json"
    ranges.write_text('{"torch": ["1.0", "1.9"], "safetensors": ["0.8.0", "0.8.0"]}')
    monkeypatch.setattr(compatibility, "TESTED", ranges)
    architecture, model = (nn.Sequential(nn.Linear(64, 16)) for _ in range(2))
    qat.prepare(model, qat.QuantSpec(weights="int8"))
    qat.freeze(model, allow_unreached=True)
    told = outside_tested()
    assert [line[:6] for line in told] == ["torch "]
    assert told[0].endswith(" is outside of the tested versions 1.0 to 1.9")
    assert told[0] in qat.export(model, tmp_path / "out").notes
    report = qat.verify(tmp_path / "out", model=architecture)
    assert report.ok
    assert told[0] in str(report)


def test_the_script_asks_for_the_newest_and_the_lowest_releases() -> None:
    newest, oldest = (requirements(column, "2.13.0") for column in ("newest", "oldest"))
    assert "torch==2.13.0" in newest
    assert "transformers" in newest
    assert {"torch==2.13.0", "transformers==5", "lightning==2.6", "optimum-quanto==0.2.7", "pytest"} <= {*oldest}
    assert not [text for text in oldest if text.startswith(("gguf", "compressed"))]  # which need a later transformers


def test_the_script_reads_reports_and_tells_the_range(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='a' name='good'/><testcase classname='a' name='none'><skipped/>"
        "</testcase><testcase classname='a' name='bad'><failure message='E: why&#10;more'/></testcase></testsuite>"
        "</testsuites>"
    )
    found = outcome(report)
    assert found == {"passed": 1, "skipped": 1, "failed": {"a::bad": "E: why"}}
    columns: dict[str, Any] = {
        name: {"python": "3.11.7", "versions": {"torch": version}, "passed": 1, "skipped": 0, "failed": failed}
        for name, version, failed in (
            ("a", "2.10.0+cpu", {}),
            ("b", "2.9.0", {}),
            ("c", "3.0", {"t::x": "E: why"}),
        )
    }
    assert ranges(columns) == {"torch": ["2.9.0", "2.10.0"]}
    assert "| torch | 2.10.0+cpu | 2.9.0 | 3.0 |" in page(columns)
    assert "- `t::x`: E: why" in page(columns)
