from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipes.data import DataError, files
from recipes.data import text as text_module
from recipes.data.text import TextData, load_blocks, load_documents, pack_blocks, standard_library_documents

WORDS = [f"w{number}" for number in range(50)]
END = 50


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w7 is 7; the end of text is 50."""
    vocabulary = {word: number for number, word in enumerate(WORDS)} | {"<end>": END}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., TextData]:
    def make(source: Path, **fields: Any) -> TextData:
        return TextData(source=str(source), cache_dir=tmp_path / "cache", **fields)

    return make


def documents(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({column: texts}).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    else:
        path.write_text(json.dumps([{column: text} for text in texts]))
    return path


def test_blocks_join_documents_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack_blocks(documents("w1 w2 w3", "", "w4", "w5 w6 w7 w8"), tokenizer, block_size=5)
    assert blocks.column_names == ["input_ids"]
    expected = [[1, 2, 3, END, 4], [END, 5, 6, 7, 8]]
    assert [block["input_ids"].tolist() for block in blocks] == expected
    assert blocks[0]["input_ids"].dtype is torch.int64


def test_no_token_is_lost_between_batches_of_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(WORDS[: 1 + number % 7]) for number in range(200)]
    stream = [token for text in texts for token in [*(int(word[1:]) for word in text.split()), END]]
    blocks = pack_blocks(documents(*texts), tokenizer, block_size=16)
    joined = [token for block in blocks for token in block["input_ids"].tolist()]
    assert joined == stream[: len(stream) // 16 * 16]


def test_text_shorter_than_one_block_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"shorter than one block of 8 tokens.*smaller block_size"):
        pack_blocks(documents("w1 w2 w3"), tokenizer, block_size=8)


def test_a_tokenizer_without_an_end_token_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="tokenizer: has no eos"):
        pack_blocks(documents("w1 w2"), tokenizer, block_size=2)


def test_blocks_are_made_once(
    tokenizer: PreTrainedTokenizerFast, local: Callable[..., TextData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [" ".join(WORDS[:9])] * 40)
    first = load_blocks(local(source, block_size=4), tokenizer)
    tokenizer(["w1"], truncation=True, max_length=2)  # changes its pickle, not what it computes
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    again = load_blocks(local(source, block_size=4), tokenizer)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first[0], again[0], strict=True))


def test_another_block_size_is_another_result(
    tokenizer: PreTrainedTokenizerFast, local: Callable[..., TextData], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [" ".join(WORDS[:9])] * 40)
    sizes = [load_blocks(local(source, block_size=size), tokenizer)[0][0]["input_ids"].numel() for size in (4, 6)]
    assert sizes == [4, 6]


def test_evaluation_blocks_are_spread_over_all_documents(
    tokenizer: PreTrainedTokenizerFast, local: Callable[..., TextData], tmp_path: Path
) -> None:
    texts = [" ".join([WORDS[number // 10 % 50]] * 7) for number in range(400)]  # document d of evaluation is all w_d
    train, evaluation = load_blocks(
        local(write(tmp_path / "a.jsonl", texts), block_size=8, evaluation_blocks=10), tokenizer
    )
    assert [int(block["input_ids"][0]) for block in evaluation] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert len(train) == 360


def test_fewer_evaluation_blocks_than_asked_for_are_all_kept(
    tokenizer: PreTrainedTokenizerFast, local: Callable[..., TextData], tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", ["w1 w2 w3"] * 20)
    assert len(load_blocks(local(source, block_size=4, evaluation_blocks=100), tokenizer)[1]) == 2


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_files_with_a_column(suffix: str, local: Callable[..., TextData], tmp_path: Path) -> None:
    source = write(tmp_path / f"a.{suffix}", [f"text {number}" for number in range(20)], column="body")
    train, evaluation = load_documents(local(source, text_field="body"))
    assert evaluation["text"][:] == ["text 0", "text 10"]
    assert len(train) == 18
    assert train.column_names == ["text"]


def test_a_folder_of_several_kinds(local: Callable[..., TextData], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.txt").write_text("one\n\ndocument\n")
    (folder / "ignored.bin").write_bytes(b"\0")
    write(folder / "c.jsonl", ["three"])
    write(folder / "d.parquet", ["four"])
    train, evaluation = load_documents(local(folder))
    assert sorted([*train["text"], *evaluation["text"]]) == ["four", "one\n\ndocument\n", "three"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 characters."""
    monkeypatch.setattr(files, "PIECE", 64)
    monkeypatch.setattr(text_module, "_GROUP", 100)


LINES = "".join(f"w{number % 50} w{number % 7}\n" for number in range(400))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_document_has_no_end_token_between_its_pieces(
    suffix: str, short: None, tokenizer: PreTrainedTokenizerFast, local: Callable[..., TextData], tmp_path: Path
) -> None:
    for number in range(12):
        text = LINES if number in (0, 5) else f"w{number}\n"
        name = tmp_path / "texts" / f"{number:02}.{suffix}"
        name.parent.mkdir(exist_ok=True)
        if suffix == "txt":
            name.write_text(text)
        else:
            write(name, [text])
    train, evaluation = load_documents(local(tmp_path / "texts"))
    assert ("ends" in train.column_names) is (suffix == "txt")
    whole = [int(word[1:]) for word in LINES.split()]
    for part, kept in ((train, [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]), (evaluation, [0, 10])):  # every tenth is held out
        expected = [token for number in kept for token in [*(whole if number in (0, 5) else [number]), END]]
        blocks = pack_blocks(part, tokenizer, block_size=2)
        assert blocks.with_format("numpy")["input_ids"][:].reshape(-1).tolist() == expected[: len(expected) // 2 * 2]


@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", " "), LINES[:60], "\n" + LINES.replace("\n", " ")])
def test_a_document_of_several_pieces_is_cut_where_it_would_be_as_a_whole(
    text: str, short: None, local: Callable[..., TextData], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(text)
    train, evaluation = load_documents(local(tmp_path / "a.txt"))
    limit = len(text) * 9 // 10
    cut = text.rfind("\n", 0, limit) + 1 or limit
    assert ("".join(train["text"]), "".join(evaluation["text"])) == (text[:cut], text[cut:])
    for part in (train, evaluation):
        ends = part["ends"][:] if "ends" in part.column_names else [True]
        assert ends == [False] * (len(ends) - 1) + [True]


def test_a_block_of_more_tokens_than_the_model_takes_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"data\.block_size: the model takes at most 8 tokens, got 16: give at most"):
        load_blocks(TextData(block_size=16), tokenizer, positions=8)


def test_a_bad_file_is_named(local: Callable[..., TextData], tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", ["text"])
    write(tmp_path / "3.jsonl", ["text"], column="body")
    with pytest.raises(DataError, match=r"3\.jsonl' has the columns body .*, and 0\.jsonl has text .*: give all files"):
        load_documents(local(tmp_path))


def test_one_document_is_cut_at_a_line(local: Callable[..., TextData], tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    train, evaluation = load_documents(local(tmp_path / "a.txt"))
    assert train["text"][0] + evaluation["text"][0] == "".join(lines)
    assert train["text"][0].endswith("\n")
    assert 5 <= evaluation["text"][0].count("\n") <= 15


def test_the_standard_library_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    for number in range(40):
        (library / f"module_{number}.py").write_text(f"x = {number}\n")
    (library / "test" / "test_x.py").write_text("x = 'test'\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(library))
    train, evaluation = load_documents(TextData(cache_dir=tmp_path / "cache"))
    held_out = [document["text"] for document in standard_library_documents("evaluation", root=library)]
    assert evaluation["text"][:] == held_out
    assert 0 < len(held_out) < 12
    assert len(train) + len(evaluation) == 40


def test_a_hub_data_set_with_an_evaluation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, subset: str | None, *, split: str, cache_dir: str | None) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"content": [split], "other": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = TextData(source="owner/name", subset="en", text_field="content", evaluation_split="validation")
    train, evaluation = load_documents(data)
    assert asked == [("owner/name", "en", "train"), ("owner/name", "en", "validation")]
    assert (train["text"][:], evaluation["text"][:]) == (["train"], ["validation"])


def test_a_hub_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'owner/name' is no local path.*split 'train'.*ConnectionError: no route"):
        load_documents(TextData(source="owner/name"))


@pytest.mark.parametrize("source", ["./missing", "missing.txt", "/no/such/folder", "some/deep/folder"])
def test_a_missing_path_is_an_error(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.source: .* does not exist"):
        load_documents(TextData(source=source))


def test_a_folder_without_text_is_an_error(local: Callable[..., TextData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file ending in \.txt, \.json, \.jsonl, \.parquet"):
        load_documents(local(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_an_empty_file_is_an_error(name: str, local: Callable[..., TextData], tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"data\.source: "):
        load_documents(local(tmp_path / name))


def test_a_corrupt_file_is_an_error(local: Callable[..., TextData], tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_documents(local(tmp_path / "a.parquet"))


def test_a_missing_column_is_an_error_that_names_those_present(local: Callable[..., TextData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.text_field: .* has no column 'text'; its columns: body"):
        load_documents(local(write(tmp_path / "a.jsonl", ["x"], column="body")))


def test_a_column_of_numbers_is_an_error(local: Callable[..., TextData], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(DataError, match="must hold text, it holds int64"):
        load_documents(local(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "fields", [{"subset": "en"}, {"train_split": "all"}, {"evaluation_split": "test"}], ids=lambda f: next(iter(f))
)
def test_hub_fields_are_refused_elsewhere(
    fields: dict[str, str], local: Callable[..., TextData], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(DataError, match=f"data.{next(iter(fields))}: belongs to hub data sets"):
        load_documents(local(tmp_path / "a.txt", **fields))


def test_the_progress_bars_of_datasets_come_back(local: Callable[..., TextData], tmp_path: Path) -> None:
    datasets.enable_progress_bars()
    load_documents(local(write(tmp_path / "a.jsonl", ["x", "y"])))
    assert datasets.is_progress_bar_enabled()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_tokenizing_shows_a_bar_on_a_terminal_only(
    terminal: bool,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    pack_blocks(documents(f"w1 w2 {terminal}"), tokenizer, block_size=2)
    assert ("tokenizing" in capsys.readouterr().err) is terminal
