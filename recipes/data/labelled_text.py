"""Texts with class labels: where they come from, and how they become batches of a text model.

Three sources, one shape. A local file or folder of CSV, JSON (lines) or Parquet with a text and a label column, also
with a file ``train`` and one ``validation`` (or ``val``, ``dev``, ``test``); a data set by its hub name or as a folder
of ``save_to_disk``; or, when nothing is named, pieces of the running interpreter's standard library, whose class is the
family that the module belongs to. These are split *by document*, by a hash of its name: no piece of a file that is
trained on is evaluated on, in any Python version.

The model's own tokenizer cuts and pads, batch by batch. ``datasets`` is imported inside the functions: a configuration
that names such data costs no such import.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from recipes.data import DataError
from recipes.data.files import files_below
from recipes.data.labels import LABEL, Labelled, numbered, require_labels
from recipes.data.settings import Count
from recipes.data.sources import (
    Source,
    generated,
    hold_out,
    is_saved,
    load_folder,
    load_hub,
    local_path,
    read_tables,
    reject_hub_fields,
    require_column,
    spread,
)
from recipes.data.text import standard_library_documents

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["LabelledTextData", "TextBatch", "load_labelled_texts", "standard_library_pieces"]

STANDARD_LIBRARY = "the standard library"
EVALUATION_EVERY = 5  # one text in five is held out, where the source has no evaluation split of its own
_LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_EVALUATION_FILES = ("validation", "val", "dev", "test")
_LINES = 8  # of a piece
_PIECES = 40  # at most, of a file
_FAMILIES = {
    "asynchronous": "asyncio asyncore asynchat",
    "concurrency": "multiprocessing concurrent threading queue subprocess sched _threading_local",
    "debugging": "pdb bdb trace traceback tracemalloc cProfile profile pstats timeit cgitb code codeop cmd",
    "email": "email",
    "importing": "importlib pkgutil runpy modulefinder zipimport imp",
    "internet": "http urllib ftplib imaplib poplib smtplib smtpd nntplib telnetlib socketserver xmlrpc wsgiref ssl "
    "socket webbrowser cgi",
    "markup": "xml html _markupbase",
    "numbers": "datetime _pydatetime _pydecimal decimal fractions statistics random calendar _strptime numbers "
    "zoneinfo colorsys",
}


class LabelledTextData(Source):
    """Where the texts and their classes come from."""

    source: str | None = Field(default=None, min_length=1)
    """A local file or folder (.csv, .json, .jsonl, .parquet, `save_to_disk`) or a hub name; none: Python's library."""
    text_field: str = "text"
    """The column that holds the texts."""
    label_field: str = LABEL
    """The column that holds the classes: names, or integers from 0."""
    evaluation_split: str | None = None
    """The hub data set's split to evaluate on; none: every fifth text is held out."""
    evaluation_texts: Count = 512
    """Evaluate on so many texts, spread evenly over the held-out ones; fewer where there are fewer."""
    max_length: Count = Field(default=64, ge=2)
    """Tokens of a text, special ones included; what is longer is cut."""


def standard_library_pieces(
    split: Literal["train", "evaluation"], *, root: Path | None = None
) -> Iterator[dict[str, str]]:
    """Yield ``{"text", "label"}``: pieces of eight lines of a Python standard library, and the family of the module.

    A file gives at most forty pieces, evenly spaced, so that no single one is most of its family.

    Args:
        split: ``"evaluation"`` is the fifth of the files whose name hashes to 0, ``"train"`` all the others.
        root: the library's folder; none means the running interpreter's.
    """
    family_of = {module: family for family, modules in _FAMILIES.items() for module in modules.split()}
    for document in _documents(root):
        family = family_of.get(document["name"].split("/")[0].removesuffix(".py"))
        digest = hashlib.sha256(document["name"].encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % EVALUATION_EVERY == 0
        if family is None or held_out != (split == "evaluation"):
            continue
        lines = [line.strip() for line in document["text"].splitlines() if line.strip()]
        pieces = ["\n".join(lines[i : i + _LINES]) for i in range(0, len(lines) - _LINES + 1, _LINES)]
        count = min(_PIECES, len(pieces))
        for number in range(count):
            yield {"text": pieces[number * len(pieces) // count], LABEL: family}


def _documents(root: Path | None) -> Iterator[dict[str, str]]:
    """All files, each once: their own split is that of another recipe."""
    for part in ("train", "evaluation"):
        yield from standard_library_documents(part, root=root)


def load_labelled_texts(data: LabelledTextData) -> Labelled:
    """Load the training and the evaluation texts with the columns ``text`` and ``label``.

    Raises:
        DataError: the source is missing, empty or unreadable, has no such column, split or classes, or a row has no
            text or no label.
    """
    name = STANDARD_LIBRARY if data.source is None else repr(data.source)
    path = None if data.source is None else local_path(data, tuple(_LOADERS))
    evaluation: Dataset | None
    if data.source is None:
        reject_hub_fields(data, STANDARD_LIBRARY)
        train, evaluation = _standard_library("train", data), _standard_library("evaluation", data)
    elif path is not None:
        reject_hub_fields(data, STANDARD_LIBRARY)
        train, evaluation = _local(path, data)
    else:
        train = load_hub(data, data.train_split)
        evaluation = None if data.evaluation_split is None else load_hub(data, data.evaluation_split)
    train = _texts(train, data, name)
    if evaluation is None:
        train, evaluation = hold_out(train, EVALUATION_EVERY)
    else:
        evaluation = _texts(evaluation, data, name)
    return numbered(train, spread(evaluation, data.evaluation_texts), data.label_field, name)


@dataclass(frozen=True)
class TextBatch:
    """Makes a batch of examples: what the tokenizer returns, (batch, length) each, and ``labels`` (batch,).

    Raises:
        DataError: the tokenizer has no token to pad with, or the model takes fewer tokens than ``max_length``.
    """

    tokenizer: PreTrainedTokenizerBase
    """The model's own."""
    max_length: int
    """What is longer is cut."""
    positions: int | None = None
    """How many tokens the model takes; none: as many as the tokenizer says."""

    def __post_init__(self) -> None:
        """Check what can go wrong before a batch is made."""
        if self.tokenizer.pad_token_id is None:
            raise DataError("tokenizer: has no token to pad texts with; set tokenizer.pad_token, or give another model")
        most = min(self.tokenizer.model_max_length, self.positions or self.tokenizer.model_max_length)
        if self.max_length > most:
            raise DataError(
                f"data.max_length: the model takes at most {most} tokens, got {self.max_length}: give at most that"
            )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tokenize, cut to ``max_length`` and pad to the longest."""
        texts = [row["text"] for row in rows]
        made = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
        return {**made, "labels": torch.tensor([row[LABEL] for row in rows])}


def _piece_rows(split: Literal["train", "evaluation"], root: Path, version: str) -> Iterator[dict[str, str]]:
    # The version takes part in the fingerprint alone: an upgraded interpreter keeps its folder but not its text.
    yield from standard_library_pieces(split, root=root)


def _standard_library(split: Literal["train", "evaluation"], data: LabelledTextData) -> Dataset:
    for field in ("text_field", "label_field"):
        if (value := getattr(data, field)) != (known := LabelledTextData.model_fields[field].default):
            raise DataError(f"data.{field}: the texts of {STANDARD_LIBRARY} have the column {known!r}, not {value!r}")
    arguments = {"split": split, "root": Path(sysconfig.get_path("stdlib")), "version": sys.version}
    found: Dataset = generated(_piece_rows, arguments, data)
    return found


def _local(path: Path, data: LabelledTextData) -> tuple[Dataset, Dataset | None]:
    if path.is_dir() and is_saved(path):
        return load_folder(path, data), None
    files = [path] if path.is_file() else files_below(path, _LOADERS)
    if not files or files[0].suffix.lower() not in _LOADERS:
        raise DataError(f"data.source: no file ending in {', '.join(_LOADERS)} in {str(path)!r}")
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.stem.lower(), []).append(file)
    held_out = next((name for name in _EVALUATION_FILES if name in by_name), None)
    if "train" in by_name and held_out is not None:
        for name in ("train", held_out):
            if len(found := by_name[name]) > 1:
                raise DataError(
                    f"data.source: {str(found[0])!r} and {str(found[1])!r} are both the file {name!r}: keep one"
                )
        return _read(by_name["train"], data), _read(by_name[held_out], data)
    return _read(files, data), None


def _read(files: Sequence[Path], data: LabelledTextData) -> Dataset:
    from datasets import concatenate_datasets

    parts = []
    for file in files:
        loader = _LOADERS[file.suffix.lower()]
        # In a CSV file "None" and "NA" are words, and an empty field is an empty text.
        options = {"keep_default_na": False} if loader == "csv" else {}
        parts.append(read_tables(loader, [file], data, **options))
        for field in ("text_field", "label_field"):
            require_column(parts[-1], field, getattr(data, field), repr(str(file)))
    try:
        return concatenate_datasets(parts)
    except Exception as error:  # of no common base
        raise DataError(
            f"data.source: the files in {data.source!r} do not have the same columns: give them the same, or one file"
        ) from error


def _texts(found: Dataset, data: LabelledTextData, source: str) -> Dataset:
    """Keep the two columns that count, the first one as ``text``."""
    require_column(found, "text_field", data.text_field, source)
    require_labels(found, data.label_field, source)
    dtype = getattr(found.features[data.text_field], "dtype", "a nested type, or several")
    if dtype not in ("string", "large_string"):
        raise DataError(
            f"data.text_field: column {data.text_field!r} of {source} must hold text, it holds {dtype}: mend it, or "
            "name another column"
        )
    if len(found) < 2:
        raise DataError(f"data.source: {source} holds {len(found)} texts: give at least two")
    for row, text in enumerate(found[data.text_field]):
        if not text or text.isspace():
            raise DataError(f"data.text_field: row {row} of {source} has no {data.text_field!r}: fill or remove it")
    kept = found.select_columns([data.text_field, data.label_field])
    return kept if data.text_field == "text" else kept.rename_column(data.text_field, "text")
