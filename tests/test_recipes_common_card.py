from __future__ import annotations

import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import qat
from qat.errors import ExportError
from qat.exporting import export
from recipes.common.card import add_results, add_section
from recipes.common.results import ResultRow
from tests.exports import frozen_layers, frozen_llama


def read(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(frozen_layers((16, 32), (1, 16), overrides={"1": "float"}), tmp_path / "out")
    return tmp_path / "out"


def test_a_section_with_pictures(exported: Path, tmp_path: Path) -> None:
    picture = tmp_path / "my grid.png"
    Image.new("RGB", (2, 2)).save(picture)
    add_section(exported, "Results", "Loss **0.25**.", {"float, PTQ, QAT": picture})
    assert read(exported).endswith("## Results\n\nLoss **0.25**.\n\n![float, PTQ, QAT](my%20grid.png)\n")
    assert (exported / "my grid.png").read_bytes() == picture.read_bytes()
    add_section(exported, "Again", "", {"the same": exported / "my grid.png"})
    assert read(exported).count("my%20grid.png") == 2


@pytest.mark.parametrize(
    ("title", "picture", "message"),
    [
        ("", None, "title: must be one line of text, got ''"),
        ("two\nlines", None, "title: must be one line"),
        ("Results", "missing.png", "pictures: 'a grid' must be a PNG file, got .*missing.png"),
        ("Results", "README.md", "must be a PNG file"),
    ],
)
def test_what_is_no_section_is_refused_and_nothing_written(
    exported: Path, title: str, picture: str | None, message: str
) -> None:
    before = read(exported)
    with pytest.raises(ExportError, match=message):
        add_section(exported, title, "text", {"a grid": exported / picture} if picture else None)
    assert read(exported) == before


def test_a_directory_without_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"has no README.md to add a section to: give a directory that qat.export wrote"
    ):
        add_section(tmp_path, "Results", "text")


def row(name: str, **metrics: float) -> ResultRow:
    return ResultRow(name, metrics, bytes_on_disk=1, steps=1)


@pytest.mark.parametrize(
    ("source", "datasets", "dataset"),
    [("stanfordnlp/imdb", ["stanfordnlp/imdb"], "stanfordnlp/imdb"), ("./mine.csv", None, "own data")],
)
def test_results_are_a_table_and_metadata_of_the_hub(
    source: str, datasets: list[str] | None, dataset: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(frozen_llama("transformers"), out)
    rows = [row("float", loss=1.5, accuracy=0.5), row("quantization-aware training", loss=1.25, accuracy=math.nan)]
    add_results(out, rows, ("loss", "accuracy"), source)
    assert "| float | 1.5 | 0.5 |\n| quantization-aware training | 1.25 | nan |" in read(out)
    data = ModelCard.load(out / "README.md").data
    (found,) = data.eval_results
    assert (found.metric_type, found.metric_value, found.task_type) == ("loss", 1.25, "text-generation")
    assert (found.dataset_name, data.datasets, data.model_name) == (dataset, datasets, "out")
    assert qat.verify(out).ok


def test_a_model_of_no_known_task_has_the_table_alone(exported: Path) -> None:
    add_results(exported, [row("quantization-aware training", loss=1.0)], ("loss",), None)
    assert "## Results\n\n| model | loss |\n|---|---|\n| quantization-aware training | 1 |\n" in read(exported)
    assert ModelCard.load(exported / "README.md").data.eval_results is None
    add_results(exported, [row("quantization-aware training", loss=2.0)], ("loss",), None, task="text-to-image")
    assert ModelCard.load(exported / "README.md").data.eval_results[0].metric_value == 2.0
