"""Mistakes in the data given to a recipe: a table of cases, each a small folder and what the error must name.

`scripts.bad_data` runs all of them in processes of their own, and `tests/test_recipes_data_mistakes.py` in one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from recipes.data.images import ImageData, load_images
from recipes.data.labelled_images import LabelledImageData, load_labelled_images
from recipes.data.labelled_text import LabelledTextData, load_labelled_texts
from recipes.data.text import TextData, load_blocks
from scripts._bad_data_files import (
    SPECIAL,
    TABLE,
    WORDS,
    Make,
    all_of,
    bomb,
    captioned,
    classes,
    damaged_table,
    files,
    halved,
    images,
    index,
    lines,
    metadata,
    named,
    one,
    other_tensors,
    png,
    replaced,
    saved,
    shards,
    sparse,
    texts,
    under,
    written,
)

__all__ = ["CASES", "Case", "load", "word_tokenizer"]


@dataclass(frozen=True)
class Case:
    """One mistake."""

    kind: str
    """Which loader of the recipes meets it."""
    name: str
    """What is wrong."""
    make: Make
    """Writes the data into an empty folder."""
    named: str = ""
    """What the error must name; empty: the data is unusual, and right."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the data."""
    as_nobody: bool = False
    """A superuser may read every file, so this one needs another user."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def word_tokenizer(words: int = 1000) -> Any:
    """A tokenizer of one token a word, ``w0`` to ``w999``; all other words are one unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(words)} | {"<end>": words, "<unknown>": words + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, eos_token="<end>")


class Teacher(nn.Module):
    """Logits of four classes for each token."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return one-hot logits, (batch, length, 4)."""
        return nn.functional.one_hot(input_ids % 4, 4).float()


ROWS = {"input_ids": torch.arange(6).reshape(2, 3)}


def load(case: Case, folder: Path, cache: Path) -> object:
    """Write the data of a case into ``folder``, and load it as its recipe does."""
    folder.mkdir()
    if case.kind == "logits":
        qat.cache_logits(Teacher(), [ROWS], folder / "cache", top_k=2)
        case.make(folder / "cache")
        return qat.CachedLogits(folder / "cache")(ROWS)
    source = case.make(folder)
    given: dict[str, Any] = {"source": str(folder if source is None else source), "cache_dir": cache, **case.fields}
    if case.kind == "text":
        return load_blocks(TextData(**{"block_size": 4, **given}), word_tokenizer())
    if case.kind == "labelled text":
        return load_labelled_texts(LabelledTextData(**given))
    if case.kind == "images":
        return load_images(ImageData(**{"size": 8, "unreadable_limit": 0, **given}))
    return load_labelled_images(LabelledImageData(**given))


LATIN = "caf\u00e9 ".encode("latin-1") * 40
LONG = "x" * 300
PICKLE = pickle.dumps({"text": ["a", "b"]})


def _cases() -> list[Case]:
    found: list[Case] = []

    def add(kind: str, name: str, make: Make, named: str = "", **fields: Any) -> None:
        found.append(Case(kind, name, make, named, fields, "permission" in name))

    for name, write in SPECIAL.items():
        add("text", f"{name} among texts", texts("bad.txt", write), "bad.txt")
        add("text", f"{name} as the source", one("bad.txt", write), "bad.txt")
        add("labelled text", f"{name} as a table", one("bad.csv", write), "bad.csv")
        add("images", f"{name} among images", images("bad.png", write), "bad.png")
        add("images", f"{name} as a caption", images("bad.png", written(png()), write), "bad.txt")
        add(
            "images",
            f"{name} as metadata",
            all_of(captioned, under("metadata.jsonl", write)),
            "metadata.jsonl",
        )
        add("labelled images", f"{name} among images", classes("dog/bad.png", write), "bad.png")
    add(
        "text",
        "a folder without read permission",
        texts("closed", lambda at: at.mkdir(mode=0)),
        "closed",
    )

    add("text", "a device as the source", lambda _: "/dev/zero", "/dev/zero")
    add("text", "bytes that are not UTF-8", texts("bad.txt", written(LATIN)), "bad.txt")
    add("text", "UTF-16", texts("bad.txt", written(WORDS.encode("utf-16"))), "bad.txt")
    add("text", "NUL", texts("bad.txt", written(b"w1 w2\0w3\n" * 9)), "bad.txt")
    add(
        "text",
        "a sparse file of a terabyte",
        one("bad.txt", sparse),
        "bad.txt",
    )
    add("text", "an empty file as the source", one("bad.txt", written("")), "bad.txt")
    add("text", "files of white space alone", files(a_txt=" \n", b_txt="\n\n"), "no text")
    add("text", "an empty folder", lambda _: None, ".jsonl")
    add("text", "a pickle", one("bad.pkl", written(PICKLE)), "bad.pkl")
    add("text", "a pickle called .txt", one("bad.txt", written(PICKLE)), "bad.txt")
    add("text", "a bad line among good files", texts("bad.jsonl", written('{"text": "a"}\n{"text"\n')), "bad.jsonl")
    add("text", "JSON lines of two types", texts("bad.jsonl", written(lines({"text": "a"}, {"text": 1}))), "bad.jsonl")
    add("text", "JSON lines of numbers", texts("bad.jsonl", written(lines({"text": 2}, {"text": 1}))), "bad.jsonl")
    add("text", "JSON lines of lists", one("bad.jsonl", written(lines({"text": ["a", "b"]}))), "text_field")
    add("text", "JSON lines without the column", texts("bad.jsonl", written(lines({"body": "a"}))), "bad.jsonl")
    add("text", "an empty JSON file among good ones", texts("bad.jsonl", written("")), "bad.jsonl")
    add("text", "a damaged Parquet file among good ones", texts("bad.parquet", written(b"PAR1 no PAR1")), "bad.parquet")
    add("text", "JSON that is not UTF-8", one("bad.jsonl", written(b'{"text": "' + LATIN + b'"}\n')), "bad.jsonl")
    add("text", "no source", lambda _: "", "source")
    add("text", "a source of 300 characters", lambda at: at / LONG, LONG[:50])
    add("text", "the folder of an unknown user", lambda _: "~nosuchuser/texts", "~nosuchuser")
    add("text", "a name with NUL", lambda at: f"{at}/a\0b.txt", "source")
    add("text", "a block longer than the text", texts("a.txt", written("w1")), "block_size", block_size=5000)
    add("text", "a block of 10^12 tokens", texts("a.txt", written("w1")), "block_size", block_size=10**12)
    add("text", "an evaluation part shorter than a block", one("a.txt", written(WORDS)), "evaluation", block_size=16)
    add("text", "hidden files", texts(".hidden.txt", written(b"\0\xff")))
    add(
        "text",
        "a hidden folder",
        all_of(texts(".git", Path.mkdir), lambda at: (at / ".git" / "a.txt").write_bytes(b"\0")),
    )
    add("text", "a byte order mark", texts("a.txt", written(b"\xef\xbb\xbf" + WORDS.encode())))
    add("text", "a name with brackets and stars", texts("a[1]*.jsonl", written(lines({"text": "a"}))))
    add("text", "a document of 1.5 MB", one("a.txt", written(WORDS * 10_000)), block_size=1000)
    add("text", "JSON with a byte order mark", texts("a.jsonl", written("\ufeff" + lines({"text": "a"}))))
    add("text", "a saved data set", saved)
    add("text", "a damaged data set", damaged_table, "saved")
    add(
        "text",
        "a name that is no UTF-8",
        texts("\udcff.txt", written("a")),
        ".txt",
    )

    add(
        "labelled text",
        "a table without header",
        one("bad.csv", written("some words,a\nother words,b\n" * 9)),
        "header",
    )
    add(
        "labelled text",
        "a table that is not UTF-8",
        one("bad.csv", written(b"text,label\n" + LATIN + b",a\n")),
        "bad.csv",
    )
    add("labelled text", "NUL in a table", one("bad.csv", written(TABLE.replace("words 3", "wo\0rds"))), "bad.csv")
    add("labelled text", "a field of 300 kB", one("a.csv", written(TABLE + "x" * 300_000 + ",a\n")))
    add("labelled text", "a row of three fields", one("bad.csv", written(TABLE + "a,b,c\n")), "bad.csv")
    add("labelled text", "a quote that never ends", one("bad.csv", written(TABLE + '"words,a\n')), "bad.csv")
    add(
        "labelled text",
        "one column twice",
        one("bad.csv", written("text,label,text\n" + "a,b,c\nd,e,f\n" * 4)),
        "bad.csv",
    )
    add("labelled text", "texts that mean missing elsewhere", one("a.csv", written(TABLE + "None,a\nNA,b\n")))
    add("labelled text", "a row without a label", one("bad.csv", written(TABLE + "words,\n")), "row 20")
    add("labelled text", "an empty table", one("bad.csv", written("")), "bad.csv")
    add("labelled text", "a header alone", one("bad.csv", written("text,label\n")), "bad.csv")
    add("labelled text", "one class", one("bad.csv", written(TABLE.replace(",b", ",a"))), "label_field")
    add("labelled text", "other columns in one file", files(a_csv=TABLE, bad_csv="other\n1\n2\n"), "bad.csv")
    add(
        "labelled text",
        "two files called train",
        files(train_csv=TABLE, train_jsonl=lines({"text": "a"}), test_csv=TABLE),
        "train.jsonl",
    )
    add(
        "labelled text",
        "JSON lines of two types",
        one("bad.jsonl", written(lines({"text": "a", "label": 1}, {"text": 2, "label": 1}))),
        "bad.jsonl",
    )
    add("labelled text", "a pickle", one("bad.pkl", written(PICKLE)), "bad.pkl")
    add("labelled text", "a damaged data set", damaged_table, "saved")
    add(
        "labelled text",
        "hidden files",
        all_of(files(a_csv=TABLE), lambda at: (at / "._a.csv").write_bytes(b"\0")),
    )

    add("images", "a truncated image", images("bad.png", written(png(64)[:60])), "bad.png")
    add("images", "a picture of 10^10 pixels", images("bad.png", bomb), "bad.png")
    add("images", "a text called .png", images("bad.png", written("text")), "bad.png")
    add("images", "an empty image", images("bad.png", written("")), "bad.png")
    add("images", "a caption that is not UTF-8", images("bad.png", written(png()), written(LATIN)), "bad.txt")
    add("images", "NUL in a caption", images("bad.png", written(png()), written("a\0b")), "bad.txt")
    add("images", "an empty caption", images("bad.png", written(png()), written(" ")), "bad.png")
    add("images", "a caption of 2 MB", images("bad.png", written(png()), written("word " * 400_000)), "bad.txt")
    add("images", "metadata that is not UTF-8", metadata("metadata.jsonl", LATIN), "metadata.jsonl")
    add("images", "numbers as file names", metadata("metadata.jsonl", named(1, 2)), "metadata.jsonl")
    add("images", "a file name of 300 characters", metadata("metadata.jsonl", named(LONG)), "metadata.jsonl")
    add("images", "a file name with NUL", metadata("metadata.jsonl", named("a\0.png")), "metadata.jsonl")
    add("images", "a file name that leads out", metadata("metadata.jsonl", named("../a.png")), "metadata.jsonl")
    add(
        "images",
        "captions of two types",
        metadata("metadata.jsonl", lines({"file_name": "a.png", "caption": "a"}, {"file_name": "b.png", "caption": 1})),
        "caption_field",
    )
    add(
        "images",
        "lists as captions",
        metadata("metadata.jsonl", lines({"file_name": "a.png", "caption": ["a"]})),
        "caption_field",
    )
    add("images", "lines that are no mappings", metadata("metadata.jsonl", "[1, 2]\n3\n"), "metadata.jsonl")
    add("images", "deeply nested lines", metadata("metadata.jsonl", "[" * 100_000 + "\n"), "metadata.jsonl")
    add(
        "images",
        "a huge number",
        metadata("metadata.jsonl", lines({"file_name": "a.png", "caption": 0}).replace("0", "1" * 5000)),
        "metadata.jsonl",
    )
    add(
        "images",
        "a field of 300 kB",
        metadata("metadata.csv", "file_name,caption\na.png," + "x" * 300_000 + "\n"),
        "metadata.csv",
    )
    add("images", "a CSV file without header", metadata("metadata.csv", "a.png,words\nb.png,words\n"), "metadata.csv")
    add(
        "images",
        "a CSV file with a byte order mark",
        metadata("metadata.csv", "\ufefffile_name,caption\n" + "".join(f"{name}.png,words\n" for name in "abcdef")),
    )
    add("images", "empty metadata", metadata("metadata.csv", ""), "metadata.csv")
    add("images", "an image named twice", metadata("metadata.jsonl", named("a.png", "a.png")), "a.png")
    add(
        "images", "one image named in two ways", metadata("metadata.jsonl", named("a.png", "./a.png", "b.png")), "a.png"
    )
    add("images", "a size of 1000000", images("a.png", written(png())), "size", size=1_000_000)
    add("images", "one image", lambda at: captioned(at, ("a",)), "two images")
    add("images", "an empty folder", lambda _: None, ".png")
    add("images", "hidden files", images("._a.png", written("no image"), written("no caption")))

    add("labelled images", "a truncated image", classes("dog/bad.png", written(png(64)[:60])), "bad.png")
    add("labelled images", "a picture of 10^10 pixels", classes("dog/bad.png", bomb), "bad.png")
    add("labelled images", "one class", classes(classes=("cat",)), "cat")
    add("labelled images", "an empty class", classes("cow", Path.mkdir), "cow")
    add("labelled images", "an image beside the classes", classes("stray.png", written(png())), "stray.png")
    add("labelled images", "no classes", lambda at: captioned(at), "sub-folders")
    add("labelled images", "a file as the source", one("a.png", written(png())), "a.png")
    add("labelled images", "hidden files", classes("dog/._0.png", written("no image")))

    for what, change in {
        "a list as the index": lambda _: [],
        "numbers as texts": lambda index: index.update(classes="4"),
        "rows of another type": lambda index: index.update(rows=[1]),
        "places of another type": lambda index: index.update(rows=dict.fromkeys(index["rows"], "012")),
        "places out of the file": lambda index: index.update(rows=dict.fromkeys(index["rows"], (0, 5, 99))),
        "places below 0": lambda index: index.update(rows=dict.fromkeys(index["rows"], (0, -4, -1))),
    }.items():
        add("logits", what, index(change), "cache")
    for what, write in {
        "a truncated file": halved,
        "a pickle": replaced(lambda path: torch.save({"values": torch.ones(2)}, path)),
        "a named pipe": replaced(os.mkfifo),
        "a missing file": Path.unlink,
        "tensors of other lengths": other_tensors,
    }.items():
        add("logits", what, shards(write), "logits-000000.safetensors")
    return found


CASES = _cases()
