"""Text for language models: where it comes from, and how it becomes fixed-length blocks of tokens.

Three sources, one shape. A local file or folder (plain text, JSON lines, Parquet), a data set by its
hub name, or, when nothing is named, the source text of the running interpreter's standard library:
twelve megabytes of real, structured text that every Python installation already has. Each becomes a
``datasets.Dataset`` of documents, split *by document* (by a hash of its name for the standard library, so
that the split is the same in every Python version), then one of token blocks.

Packing joins documents with the end-of-text token between them and cuts the stream into blocks of equal
length. It wastes no position on padding and needs no mask; the price is that a block may begin in the middle
of a document. Results are cached by ``datasets`` under a fingerprint of the text and the tokenizer.

``datasets`` is imported inside the functions: a configuration that names a `TextData` costs no such import.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from recipes.data import DataError
from recipes.data.settings import Count
from recipes.data.sources import (
    Source,
    hold_out,
    load_hub,
    local_path,
    quiet_bars,
    reject_hub_fields,
    require_column,
    spread,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextData", "load_blocks", "load_documents", "pack_blocks", "standard_library_documents"]

STANDARD_LIBRARY = "the standard library"
EVALUATION_SHARE = 10  # one document in ten is held out, where the source has no evaluation split of its own
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SUFFIX_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class TextData(Source):
    """Where the text comes from and how it is cut."""

    source: str | None = Field(default=None, min_length=1)
    """A local file or folder (.txt, .json, .jsonl, .parquet), or a data set's hub name; none: the standard library."""
    text_field: str = "text"
    """The column that holds the text; plain text files have none."""
    evaluation_split: str | None = None
    """The hub data set's split to evaluate on; none: a tenth of the documents is held out."""
    block_size: Count = Field(default=256, ge=2)
    """Tokens a block."""
    evaluation_blocks: Count = 256
    """Evaluate on so many blocks, spread evenly over the evaluation text; fewer where it has fewer."""


def standard_library_documents(
    split: Literal["train", "evaluation"], *, root: Path | None = None, include_tests: bool = False
) -> Iterator[dict[str, str]]:
    """Yield ``{"name", "text"}`` for each source file of a Python standard library.

    Args:
        split: ``"evaluation"`` is the tenth of the files whose name hashes to 0, ``"train"`` all the others.
        root: the library's folder; none means the running interpreter's.
        include_tests: also the library's own test suite, which not every installation carries.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        parts = set(name.split("/"))
        if "site-packages" in parts or "dist-packages" in parts:
            continue
        if not include_tests and parts & _TEST_FOLDERS:
            continue
        held_out = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % EVALUATION_SHARE == 0
        if held_out != (split == "evaluation"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # the library's test suite holds files that are broken on purpose
        if text.strip():
            yield {"name": name, "text": text}


def load_documents(data: TextData) -> tuple[Dataset, Dataset]:
    """Load the training and the evaluation documents, each a data set with the one column ``text``.

    A source without an evaluation split gives every tenth document to evaluation, in the order of the source (files
    sorted by path). A source of a single document is cut in two instead, at the last line that ends within the
    first nine tenths.

    Raises:
        DataError: the source is missing, unreadable or empty, or has no such column or split.
    """
    if data.source is None:
        return _standard_library("train", data), _standard_library("evaluation", data)
    if (path := local_path(data, tuple(_SUFFIX_LOADERS))) is not None:
        reject_hub_fields(data, STANDARD_LIBRARY)
        return _split(_load_local(path, data))
    documents = _load_hub(data, data.train_split)
    if data.evaluation_split is None:
        return _split(documents)
    return documents, _load_hub(data, data.evaluation_split)


def pack_blocks(documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Tokenize documents, join them with the end-of-text token and cut the stream into blocks.

    Args:
        documents: a data set with a column ``text``.
        tokenizer: any tokenizer of transformers; its own special tokens are not added.
        block_size: tokens a block; what is left over at the end of the stream is dropped.

    Returns:
        A data set with one column, ``input_ids`` of ``block_size`` integers, in the order of the documents, formatted
        as torch tensors. The labels of a language model are the same tokens.

    Raises:
        DataError: the tokenizer has no token to end a document with, or the text is shorter than one block.
    """
    from datasets import Features, List, Value

    packer = _Packer(tokenizer, block_size)
    # The packer carries the end of one batch into the next, so the map has to run in one process and in order; and
    # its fingerprint is given, because a tokenizer's pickle changes with use while what it computes does not.
    fingerprint = hashlib.sha256("\n".join([documents._fingerprint, packer.fingerprint]).encode()).hexdigest()[:16]
    with nullcontext() if sys.stderr.isatty() else quiet_bars():  # in a file, a bar is a hundred lines
        blocks = documents.map(
            packer,
            batched=True,
            batch_size=64,
            remove_columns=documents.column_names,
            features=Features({"input_ids": List(Value("int32"), length=block_size)}),
            new_fingerprint=fingerprint,
            desc="tokenizing",
        )
    if len(blocks) == 0:
        raise DataError(
            f"data.block_size: the text ({len(documents)} documents) is shorter than one block of {block_size} tokens; "
            "give more text or a smaller block_size"
        )
    return blocks.with_format("torch")


def load_blocks(data: TextData, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Load the training and the evaluation blocks: `load_documents`, then `pack_blocks`.

    Evaluation keeps ``evaluation_blocks`` blocks, evenly spaced, so that all held-out documents have their share.

    Args:
        data: where the text comes from and how it is cut.
        tokenizer: any tokenizer of transformers with a token to end a document with.

    Raises:
        DataError: as `load_documents` and `pack_blocks`.
    """
    train, evaluation = (pack_blocks(part, tokenizer, data.block_size) for part in load_documents(data))
    return train, spread(evaluation, data.evaluation_blocks)


class _Packer:
    """Turns batches of texts into whole blocks and keeps what is left over for the next batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
        end = next((token for token in ends if token is not None), None)
        if end is None:
            raise DataError("tokenizer: has no eos, sep or bos token to put between documents; set tokenizer.eos_token")
        self._tokenizer, self._block_size, self._end = tokenizer, block_size, end
        self._rest: list[int] = []

    @property
    def fingerprint(self) -> str:
        """Name everything that the blocks depend on beside the text."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            state = repr(sorted(self._tokenizer.get_vocab().items()))
        else:  # a call with truncation or padding leaves these behind, and they do not matter here
            state = repr({**json.loads(backend.to_str()), "truncation": None, "padding": None})
        name = type(self._tokenizer).__name__
        return f"{name} {hashlib.sha256(state.encode()).hexdigest()} end {self._end} block {self._block_size}"

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch["text"] if text and not text.isspace()]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for tokens in encoded:
            self._rest += [*tokens, self._end]
        whole = len(self._rest) // self._block_size * self._block_size
        stream, self._rest = self._rest[:whole], self._rest[whole:]
        return {"input_ids": [stream[i : i + self._block_size] for i in range(0, whole, self._block_size)]}


def _library_texts(split: Literal["train", "evaluation"], root: Path, version: str) -> Iterator[dict[str, str]]:
    # The version takes part in the fingerprint alone: an upgraded interpreter keeps its folder but not its text.
    for document in standard_library_documents(split, root=root):
        yield {"text": document["text"]}


def _standard_library(split: Literal["train", "evaluation"], data: TextData) -> Dataset:
    from datasets import Dataset, Features, Value

    reject_hub_fields(data, STANDARD_LIBRARY)
    with quiet_bars():
        documents = Dataset.from_generator(
            _library_texts,
            features=Features({"text": Value("large_string")}),
            cache_dir=data.cache_dir,
            gen_kwargs={"split": split, "root": Path(sysconfig.get_path("stdlib")), "version": sys.version},
        )
    return _not_empty(documents, STANDARD_LIBRARY)


def _load_local(path: Path, data: TextData) -> Dataset:
    from datasets import concatenate_datasets, load_dataset

    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    by_loader: dict[str, list[str]] = {}
    for file in found:
        loader = _SUFFIX_LOADERS.get(file.suffix.lower())
        if loader is not None:
            by_loader.setdefault(loader, []).append(str(file))
    if not by_loader:
        raise DataError(f"data.source: no file ending in {', '.join(_SUFFIX_LOADERS)} in {str(path)!r}")
    parts: list[Dataset] = []
    for loader, files in by_loader.items():
        options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
        try:
            with quiet_bars():
                part = load_dataset(loader, data_files=files, split="train", cache_dir=data.cache_dir, **options)
        except Exception as error:  # builders of datasets raise errors without a common base
            cause = error.__cause__ or error
            raise DataError(f"data.source: {str(path)!r} cannot be read as {loader}: {cause}") from error
        if loader == "text" and data.text_field != "text":
            part = part.rename_column("text", data.text_field)
        parts.append(_text_column(part, data))
    return _not_empty(concatenate_datasets(parts), repr(str(path)))


def _load_hub(data: TextData, split: str) -> Dataset:
    return _not_empty(_text_column(load_hub(data, split), data), f"split {split!r} of {data.source!r}")


def _text_column(documents: Dataset, data: TextData) -> Dataset:
    require_column(documents, "text_field", data.text_field, repr(data.source))
    dtype = getattr(documents.features[data.text_field], "dtype", "a nested type")
    if dtype not in ("string", "large_string"):
        raise DataError(f"data.text_field: column {data.text_field!r} must hold text, it holds {dtype}")
    from datasets import Value

    documents = documents.select_columns([data.text_field])
    if data.text_field != "text":
        documents = documents.rename_column(data.text_field, "text")
    with quiet_bars():
        return documents if dtype == "large_string" else documents.cast_column("text", Value("large_string"))


def _not_empty(documents: Dataset, source: str) -> Dataset:
    if not any(text and not text.isspace() for text in documents["text"]):
        raise DataError(f"data.source: {source} holds no text; give a source with at least one document")
    return documents


def _split(documents: Dataset) -> tuple[Dataset, Dataset]:
    from datasets import Dataset

    if len(documents) > 1:
        return hold_out(documents, EVALUATION_SHARE)
    text: str = documents[0]["text"] or ""
    limit = len(text) * (EVALUATION_SHARE - 1) // EVALUATION_SHARE
    cut = text.rfind("\n", 0, limit) + 1 or limit

    def part(start: int, stop: int) -> Dataset:
        return Dataset.from_dict({"text": [text[start:stop]]}, features=documents.features)

    return part(0, cut), part(cut, len(text))
