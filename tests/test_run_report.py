from __future__ import annotations

import json
import math
import os
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import qat
from qat.run_report import RunComparison, compare_runs, figures, read_run, write_report
from qat.run_report.page import show_size
from tests.exports import frozen_llama
from tests.left_runs import left_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return left_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def text(exported: Path) -> str:
    path = write_report(exported, verified=qat.verify(exported))
    assert path == exported.with_name("run-report.html")
    return path.read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_shows_all_that_a_run_left(text: str) -> None:
    page = _Page(text)
    assert "<td>equal</td>" in text
    for title in (
        "Results",
        "Verification",
        "Training",
        "Layers",
        "Where the bytes are",
        "Samples",
        "Settings and versions",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "float &amp; &lt;small&gt;" in text
    assert "trained: mean loss +0.5000 ± 0.0100 beside that of float &amp; &lt;small&gt;." in text
    assert "<tr class=exported><td>trained</td>" in text
    assert "<td>another library (peer)</td>" in text
    assert "<dt>prompt</dt><dd>Once &lt;b&gt;</dd></div><div><dt>trained</dt><dd>upon</dd>" in text
    figures = {attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"}
    expected = {"Loss of training", "Quantization error by layer", "Activation ranges", "Where the bytes are"}
    assert expected | {"Loss by timestep", "Loss above the reference by timestep"} <= figures
    assert sum(label.startswith("Codes of") for label in figures) == 6


def test_a_page_needs_no_network_and_no_script(text: str) -> None:
    page = _Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert all(link.startswith(("data:", "#")) for link in links)


def test_figures_take_the_colours_of_the_page(text: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "currentColor" in drawn
    assert "var(--line)" in drawn
    assert not re.search(r"#000000|#010203|#040506", drawn)


def test_rows_of_a_run_that_went_on_take_the_place_of_earlier_ones(exported: Path) -> None:
    record = read_run(exported, codes=False)
    assert record.losses == {"training": [(step, pytest.approx(3.0 - step / 10)) for step in range(6)]}


def test_codes_are_counted(exported: Path) -> None:
    record = read_run(exported)
    model: Any = qat.load(exported)
    for name, layer in record.layers.items():
        codes = model.get_submodule(name).weight._data
        assert sum(layer.counts.values()) == codes.numel()
        assert layer.counts[3.0] == int((codes == 3).sum())
        assert layer.used is not None
        assert 0 < layer.used <= 1
    assert sum(record.bytes_by_part().values()) <= record.weight_bytes


def test_outputs_that_stay_float_have_no_range(exported: Path) -> None:
    record = read_run(exported, codes=False)
    spec = record.manifest.frozen.spec
    assert all((layer.output_range is not None) is spec.outputs for layer in record.layers.values())
    assert all(layer.input_range for layer in record.layers.values())


def test_a_plain_module_has_a_page_without_codes(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    qat.prepare(model, qat.QuantSpec(weights="int8"))
    qat.freeze(model)
    qat.export(model, tmp_path / "plain")
    text = write_report(tmp_path / "plain", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "codes were not read" in text


def test_errors_name_what_is_wrong(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(qat.LoadError, match="is not a directory"):
        write_report(tmp_path / "none")
    with pytest.raises(qat.ExportError, match="could not be written, and nothing is left of it"):
        write_report(exported, tmp_path / "none" / "page.html")
    shutil.copytree(exported, tmp_path / "run")
    (tmp_path / "run-results.json").write_text("[1]")
    with pytest.raises(qat.LoadError, match="holds no results of a recipe"):
        write_report(tmp_path / "run")
    assert not list(tmp_path.glob("*.html"))


def test_runs_are_compared(exported: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    qat.export(frozen_llama("transformers", weights="int4"), tmp_path / "other", config={"seed": 2})
    found = compare_runs([exported, tmp_path / "other"])
    assert found.runs == ("run", "other")
    assert found.rows["weights"] == ("int8", "int4")
    assert found.rows["loss"] == (2.5, None)
    assert found.settings == {"seed": (1, 2)}
    assert json.loads(json.dumps(found.to_json()))["settings"] == {"seed": [1, 2]}
    assert "int4" in str(found)
    with pytest.raises(qat.LoadError, match="two directories or more"):
        compare_runs([exported])


ROW = {"name": "a", "metrics": {"loss": 1.0}, "steps": 1, "bytes_on_disk": 1}


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "metrics": {"loss": "<script>"}}],
        [{**ROW, "metrics": {"loss": math.nan}}],
        [{**ROW, "metrics": {"loss": 10**400}}],
        [{**ROW, "metrics": {"loss_bin_0": 1e308}}],
        [{**ROW, "name": [1]}],
        [{**ROW, "bytes_on_disk": "many"}],
        [{**ROW, "comparison": {"difference": 1.0}}],
        [{key: value for key, value in ROW.items() if key != "steps"}],
        {},
        "[" * 100_000,
    ],
    ids=["text", "NaN", "400 digits", "beyond float32", "name", "bytes", "comparison", "no steps", "mapping", "deep"],
)
def test_results_of_other_types_are_one_error(rows: Any, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, run := tmp_path / "run")
    run.with_name("run-results.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(qat.LoadError, match=r"run-results\.json' holds no results of a recipe: .*: remove it"):
        read_run(run, codes=False)


@pytest.mark.parametrize(
    ("text", "points", "note"),
    [
        ("0,1.0\n1,nan\n2,inf\n3,1e300\n", [(0, 1.0)], "3 losses of training are inf, NaN or beyond float32"),
        ("0,1.0\n1,0.25", [(0, 1.0)], None),  # a process was killed within a line
        ("0,1.0\n99999999999999999999,1.0\n-1,1.0\nx,1.0\n2\n3,4,5\n", [(0, 1.0)], None),
        (f"0,1.0\n1,{'9' * 200_000}\n", [(0, 1.0)], "the log 'training' was not read to its end: field larger"),
        ("0,1.0\n\udcff\n", None, "the log 'training' was not read to its end: 'utf-8'"),
    ],
    ids=["not finite", "half a line", "steps", "long field", "no text"],
)
def test_logs_that_are_none_are_noted(text: str, points: Any, note: str | None, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, run := tmp_path / "run")
    log = tmp_path / "run-logs" / "training" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_bytes(f"step,train_loss\n{text}".encode(errors="surrogateescape"))
    record = read_run(run, codes=False)
    assert record.losses.get("training") == points
    assert [found.startswith(note or "") for found in record.notes] == [True] * (note is not None)


def test_what_is_beside_a_run_that_has_not_ended_is_not_shown(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported.parent, tmp_path / "all")
    state = tmp_path / "all" / "run-checkpoints" / "run.json"
    state.parent.mkdir()
    for ended in (True, False):
        state.write_text(json.dumps({"ended": ended}))
        record = read_run(tmp_path / "all" / "run", codes=False)
        assert (bool(record.results), bool(record.losses), not record.notes) == (ended, ended, ended)


def test_pictures_of_another_run_and_what_is_none_are_left_out(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, run := tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "run-2-images.png")
    (tmp_path / "run-images.png").write_text("none")
    os.mkfifo(tmp_path / "run-losses.png")
    assert read_run(run, codes=False).pictures == {}


def test_names_are_shown_as_they_stand(tmp_path: Path) -> None:
    name = '$\\frac$ [/red] <b>"\\1'
    drawn = figures.curves({name: [(0, 1.0)], "b": [(0, 1.0)]}, name, "step", "loss")
    assert f'aria-label="{escape(name)}"' in drawn
    assert "<b>" not in drawn
    found = RunComparison((name, "b"), {"loss": (1.0, None)}, {"[bold]": ("\x1b[31m", "x" * 400)})
    lines = str(found)
    assert "[/red]" in lines
    assert "?[31m" in lines
    assert lines.count("x") == 400


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (2**31, "2.00 GiB")],
    ids=str,
)
def test_sizes(count: int, expected: str) -> None:
    assert show_size(count) == expected


def test_no_other_file_is_overwritten(exported: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<html>mine</html>")
    with pytest.raises(qat.ExportError, match=r"thesis\.html' is there and no report of qat: choose another name"):
        write_report(exported, thesis)
    assert thesis.read_text() == "<html>mine</html>"
    with pytest.raises(qat.ExportError, match=r"is a directory: name a file in it, as .*report\.html"):
        write_report(exported, tmp_path)
    page = write_report(exported, tmp_path / "page.html")
    assert write_report(exported, page) == page
