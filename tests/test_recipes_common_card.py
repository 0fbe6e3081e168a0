from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qat.errors import ExportError
from qat.exporting import export
from recipes.common.card import add_section
from tests.exports import frozen_layers


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
