"""Batches from files of texts and images, and one error for each thing that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from qat.data import image_batches, text_batches
from qat.errors import CalibrationError

RECIPES = Path(__file__).parents[1] / "recipes"
LINES = ["import os", "def add(a, b):", "", "   ", "return a + b", "x = 1"]
TEXTS = [line for line in LINES if line.strip()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(RECIPES / "reference_encoder", trust_remote_code=False)


@pytest.fixture(scope="module")
def language() -> Any:
    return AutoTokenizer.from_pretrained(RECIPES / "reference", trust_remote_code=False)


def plain(folder: Path) -> Path:
    (folder / "a.txt").write_text("\n".join(LINES))
    return folder / "a.txt"


def lines_of_json(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in LINES))
    return folder / "a.jsonl"


def csv(folder: Path) -> Path:
    (folder / "a.csv").write_text("text,n\n" + "".join(f'"{text}",1\n' for text in LINES))
    return folder / "a.csv"


def files_of_a_folder(folder: Path) -> Path:
    (folder / "texts" / "deep").mkdir(parents=True)
    for number, text in enumerate(LINES):
        (folder / "texts" / "deep" / f"{number}.py").write_text(text)
    (folder / "texts" / ".hidden").write_text("never read")
    (folder / "texts" / "binary").write_bytes(b"\0\xff")
    return folder / "texts"


def decoded(batches: list[dict[str, torch.Tensor]], tokenizer: Any) -> list[str]:
    rows = [row for batch in batches for row in batch["input_ids"]]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize("write", [plain, lines_of_json, csv, files_of_a_folder], ids=lambda write: write.__name__)
def test_every_text_is_read_once_from_every_kind_of_file(
    write: Callable[[Path], Path], tmp_path: Path, tokenizer: Any
) -> None:
    batches = text_batches([write(tmp_path)], tokenizer, count=5, size=3, length=16, packed=False)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    expected = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in TEXTS]
    assert sorted(decoded(batches, tokenizer)) == sorted(expected)
    assert all(batch["attention_mask"].shape == batch["input_ids"].shape for batch in batches)


def test_texts_are_cut_and_no_more_are_taken_than_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"name{number} = {number}\n" for number in range(50)))
    batches = text_batches([path], tokenizer, count=2, size=4, length=5, packed=False)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 5), (4, 5)]
    again = text_batches([path], tokenizer, count=2, size=4, length=5, packed=False)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, again, strict=True))
    assert decoded(batches, tokenizer)[0] != tokenizer.decode(tokenizer("name0 = 0")["input_ids"][1:-1])  # shuffled


def test_a_language_model_gets_full_blocks_of_joined_texts(tmp_path: Path, language: Any) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(f"x{number} = {number}" for number in range(40)))
    batches = text_batches([path], language, count=2, size=3, length=8, packed=True)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 8), (3, 8)]
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    path.write_text("x = 1")
    (batch,) = text_batches([path], language, count=2, size=3, length=64, packed=True)
    assert batch["input_ids"].tolist() == [language("x = 1")["input_ids"]]  # less than a block is all there is


def test_a_tokenizer_without_a_padding_token_pads_by_its_end(tmp_path: Path, language: Any) -> None:
    (batch,) = text_batches([plain(tmp_path)], language, count=1, size=4, length=8, packed=False)
    assert (batch["attention_mask"] == 0).any()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == language.eos_token_id).all()


def test_images_are_spread_over_the_folders(tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(RECIPES / "reference_vit", trust_remote_code=False)
    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
        for number in range(6):
            picture = Image.new("L", (20, 30), 0 if label == "dark" else 255)
            picture.save(tmp_path / label / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    batches = image_batches([tmp_path], processor, count=2, size=2)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(2, 3, 32, 32), (2, 3, 32, 32)]
    assert [float(batch["pixel_values"].mean()) for batch in batches] == [-1.0, 1.0]
    assert len(image_batches([tmp_path / "dark" / "0.png"], processor, count=2, size=2)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'.*missing' does not exist: name files or folders that do"),
        ({"a.txt": " \n"}, "there is no text in .*: name files that hold some"),
        ({}, "there is no text"),
        ({"a.csv": "words\nx\n"}, "a.csv: has no column 'text' but words: name one by --text-field"),
        ({"a.jsonl": '{"text": '}, "a.jsonl: cannot be read as json"),
        (
            {**{f"{n}.jsonl": '{"text": "x"}\n' for n in range(5)}, "5.jsonl": '{"text": '},
            r"data: [^ ,]*/5\.jsonl: cannot be read as json: .*: mend or remove it",
        ),
    ],
    ids=["missing", "blank", "empty folder", "column", "broken", "one of six"],
)
def test_what_is_wrong_with_texts_is_one_error(
    content: dict[str, str] | None, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    for name, text in (content or {}).items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "missing" if content is None else tmp_path
    with pytest.raises(CalibrationError, match=message):
        text_batches([path], tokenizer, count=1, size=2, length=4, packed=False)


def test_a_text_in_another_encoding_is_one_error(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"a.txt: cannot be read as text: 'utf-8' codec"):
        text_batches([tmp_path / "a.txt"], tokenizer, count=1, size=1, length=8, packed=False)
    assert text_batches([tmp_path], tokenizer, count=1, size=1, length=8, packed=False)  # in a folder it is one of many


def test_what_is_wrong_with_images_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CalibrationError, match="there is no image in"):
        image_batches([tmp_path], None, count=1, size=1)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(
        CalibrationError, match=r"data: '[^']*/a.png' cannot be read as an image \(.*\): mend or remove"
    ):
        image_batches([tmp_path], None, count=1, size=1)
