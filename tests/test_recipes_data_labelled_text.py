from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipes.data import DataError
from recipes.data.labelled_text import LabelledTextData, TextBatch, load_labelled_texts, standard_library_pieces

Make = Callable[..., LabelledTextData]
ROWS = [{"text": f"w{number}", "label": "odd" if number % 2 else "even"} for number in range(10)]


@pytest.fixture
def local(tmp_path: Path) -> Make:
    def make(source: Path | None, **fields: Any) -> LabelledTextData:
        return LabelledTextData(source=source and str(source), cache_dir=tmp_path / "cache", **fields)

    return make


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a word: w7 is 7; 10 is unknown, 11 pads."""
    words = {f"w{number}": number for number in range(10)} | {"[UNK]": 10, "[PAD]": 11}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet", "saved"])
def test_local_sources(name: str, local: Make, tmp_path: Path) -> None:
    found = load_labelled_texts(local(write(tmp_path / name, ROWS)))
    assert (found.classes, found.named) == (("even", "odd"), True)
    assert found.evaluation[:] == {"text": ["w0", "w5"], "label": [0, 1]}
    assert found.train["text"][:] == [f"w{number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]


def test_a_folder_of_files_is_one_data_set(local: Make, tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / "data" / f"{part}.csv", ROWS[5 * part : 5 * part + 5])
    found = load_labelled_texts(local(tmp_path / "data", evaluation_texts=1))
    assert (len(found.train), len(found.evaluation)) == (8, 1)


def test_files_of_splits_are_kept_apart(local: Make, tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.csv", ROWS[:6])
    write(tmp_path / "data" / "test.csv", ROWS[6:])
    found = load_labelled_texts(local(tmp_path / "data"))
    assert found.evaluation["text"][:] == ["w6", "w7", "w8", "w9"]
    assert len(found.train) == 6


def test_other_columns(local: Make, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", [{"label": 9, "said": row["text"], "kind": number % 3} for number, row in enumerate(ROWS)]
    )
    found = load_labelled_texts(local(path, text_field="said", label_field="kind"))
    assert (found.classes, found.named) == (("0", "1", "2"), False)
    assert found.evaluation[:] == {"text": ["w0", "w5"], "label": [0, 2]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"words": "a", "label": "x"}] * 3, r"data\.text_field: '.*' has no column 'text'; its columns: words, label"),
        ([{"text": "a", "kind": "x"}] * 3, r"data\.label_field: '.*' has no column 'label'; its columns: text, kind"),
        ([{"text": 1, "label": "x"}] * 3, r"data\.text_field: column 'text' of '.*' must hold text, it holds int64"),
        ([*ROWS, {"text": " ", "label": "odd"}], r"data\.text_field: row 10 of '.*' has no 'text': fill or remove it"),
        ([*ROWS, {"text": "a", "label": None}], r"data\.label_field: row \d+ of '.*' has no 'label': fill or remove"),
        ([{"text": "a", "label": "x"}] * 3, r"data\.label_field: 'label' of '.*' has fewer than two classes \(x\)"),
        ([{"text": "a", "label": "x"}], r"data\.source: '.*' holds 1 texts: give at least two"),
    ],
    ids=["no text column", "no label column", "numbers", "blank text", "no label", "one class", "one text"],
)
def test_bad_tables_are_one_clear_error(rows: list[dict[str, Any]], message: str, local: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        load_labelled_texts(local(write(tmp_path / "a.jsonl", rows)))


def test_bad_files_are_one_clear_error(local: Make, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"data\.source: '.*a\.json' cannot be read as json"):
        load_labelled_texts(local(tmp_path / "a.json"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"data\.source: no file ending in \.csv, .* in '.*a\.txt'"):
        load_labelled_texts(local(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"data\.source: '.*b\.csv' does not exist"):
        load_labelled_texts(local(tmp_path / "b.csv"))
    write(tmp_path / "mixed" / "a.csv", ROWS)
    write(tmp_path / "mixed" / "b.csv", [{"text": 1.5, "label": "x"}])
    with pytest.raises(DataError, match=r"data\.source: the files in '.*mixed' do not have the same columns"):
        load_labelled_texts(local(tmp_path / "mixed"))


def test_the_default_has_one_column_of_each_kind(local: Make) -> None:
    with pytest.raises(DataError, match=r"data\.text_field: the texts of the standard library have the column 'text'"):
        load_labelled_texts(local(None, text_field="code"))
    with pytest.raises(DataError, match=r"data\.subset: belongs to hub data sets"):
        load_labelled_texts(local(None, subset="code"))


def test_the_default_holds_out_whole_files(local: Make) -> None:
    found = load_labelled_texts(local(None, evaluation_texts=10**6))
    assert found.classes == (
        *("asynchronous", "concurrency", "debugging", "email", "importing", "internet", "markup", "numbers"),
    )
    for part, least in ((found.train, 200), (found.evaluation, 40)):
        counts = Counter(part["label"])
        assert set(counts) == set(range(8))
        assert min(counts.values()) > least
    assert len(set(found.train["text"]) & set(found.evaluation["text"])) < 0.02 * len(found.evaluation)  # boilerplate


def test_pieces_of_a_library(tmp_path: Path) -> None:
    lines = "".join(f"a = {number}\n\n" for number in range(50 * 8 + 5))
    for name in ("email", "unknown"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "long.py").write_text(lines)
    (tmp_path / "bdb.py").write_text(lines[:100])
    found = [*standard_library_pieces("train", root=tmp_path), *standard_library_pieces("evaluation", root=tmp_path)]
    counts = Counter(piece["label"] for piece in found)
    assert counts == {"email": 40, "debugging": 1}
    assert all(piece["text"].count("\n") == 7 for piece in found)


def test_batches_are_cut_and_padded() -> None:
    batch = TextBatch(tokenizer(pad_token="[PAD]"), 2)([{"text": "w1 w2 w3", "label": 1}, {"text": "w4", "label": 0}])
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2], [4, 11]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1], [1, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))


def test_a_tokenizer_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(DataError, match="tokenizer: has no token to pad texts with"):
        TextBatch(tokenizer(), 2)
    for options, positions in (({"model_max_length": 8}, None), ({}, 8)):
        with pytest.raises(DataError, match=r"data\.max_length: the model takes at most 8 tokens, got 9"):
            TextBatch(tokenizer(pad_token="[PAD]", **options), 9, positions)
