"""Text for language models: where it comes from, and how it becomes fixed-length blocks of tokens.

Three sources, one shape. A local file or folder (plain text, JSON lines, Parquet), a data set by its
hub name, or, when nothing is named, the source text of the running interpreter's standard library:
twelve megabytes of real, structured text that every Python installation already has. Each becomes a
``datasets.Dataset`` of documents, split *by document* (by a hash of its name for the standard library, so
that the split is the same in every Python version), then one of token blocks.

A file of text is one document, however long. It is read, kept and tokenized in pieces of a million characters, which
end at line ends (`recipes.data.files`): several gigabytes take little memory, and no end-of-text token stands between.

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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from recipes.data import DataError
from recipes.data.files import PIECE, files_below, pieces, pieces_of
from recipes.data.settings import Count
from recipes.data.sources import (
    Source,
    generated,
    is_saved,
    load_folder,
    load_hub,
    local_path,
    quiet_bars,
    read_tables,
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
MOST_TOKENS = 2**24  # of a block: what is left over between two batches of documents is kept in memory
_GROUP = 2**20  # characters that a tokenizer is given at once, unless one text has more
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
    block_size: Count = Field(default=256, ge=2, le=MOST_TOKENS)
    """Tokens a block; at most so many as the model takes."""
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
    """Load the training and the evaluation documents, each a data set with the column ``text``.

    Where a text file is longer than a piece, a document is several rows, and a column ``ends`` says which is its last.

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


def pack_blocks(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, part: str = "training"
) -> Dataset:
    """Tokenize documents, join them with the end-of-text token and cut the stream into blocks.

    Args:
        documents: a data set with a column ``text``, and ``ends`` where documents have several rows.
        tokenizer: any tokenizer of transformers; its own special tokens are not added.
        block_size: tokens a block; what is left over at the end of the stream is dropped.
        part: what the blocks are for, in a message.

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
            f"data.block_size: the {part} text ({len(documents)} documents) is shorter than one block of {block_size} "
            "tokens; give more text or a smaller block_size"
        )
    return blocks.with_format("torch")


def load_blocks(
    data: TextData, tokenizer: PreTrainedTokenizerBase, positions: int | None = None
) -> tuple[Dataset, Dataset]:
    """Load the training and the evaluation blocks: `load_documents`, then `pack_blocks`.

    Evaluation keeps ``evaluation_blocks`` blocks, evenly spaced, so that all held-out documents have their share.

    Args:
        data: where the text comes from and how it is cut.
        tokenizer: any tokenizer of transformers with a token to end a document with.
        positions: how many tokens the model takes; none: any number.

    Raises:
        DataError: a block has more tokens than the model takes, or as `load_documents` and `pack_blocks`.
    """
    if positions is not None and data.block_size > positions:
        raise DataError(
            f"data.block_size: the model takes at most {positions} tokens, got {data.block_size}: give at most that"
        )
    train, evaluation = (
        pack_blocks(part, tokenizer, data.block_size, name)
        for part, name in zip(load_documents(data), ("training", "evaluation"), strict=True)
    )
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
        rules = f"end {self._end} block {self._block_size} piece {PIECE}"
        return f"{name} {hashlib.sha256(state.encode()).hexdigest()} {rules}"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ends = batch.get("ends", [True] * len(batch["text"]))
        group: list[tuple[str, bool]] = []  # texts, and whether the end token follows
        size = 0
        for text, whole in zip(batch["text"], ends, strict=True):
            found = list(pieces_of(text or ""))
            for number, piece in enumerate(found, 1):
                if group and size + len(piece) > _GROUP:
                    self._tokenize(group)
                    group, size = [], 0
                group.append((piece, whole and number == len(found)))
                size += len(piece)
        self._tokenize(group)
        stop = len(self._rest) // self._block_size * self._block_size
        stream, self._rest = self._rest[:stop], self._rest[stop:]
        return {"input_ids": [stream[i : i + self._block_size] for i in range(0, stop, self._block_size)]}

    def _tokenize(self, group: Sequence[tuple[str, bool]]) -> None:
        texts = [text for text, _ in group]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for tokens, (_, last) in zip(encoded, group, strict=True):
            self._rest += [*tokens, self._end] if last else tokens


def _library_texts(split: Literal["train", "evaluation"], root: Path, version: str) -> Iterator[dict[str, str]]:
    # The version takes part in the fingerprint alone: an upgraded interpreter keeps its folder but not its text.
    for document in standard_library_documents(split, root=root):
        yield {"text": document["text"]}


def _standard_library(split: Literal["train", "evaluation"], data: TextData) -> Dataset:
    reject_hub_fields(data, STANDARD_LIBRARY)
    arguments = {"split": split, "root": Path(sysconfig.get_path("stdlib")), "version": sys.version}
    documents = generated(_library_texts, arguments, data, features=_features("text"))
    return _not_empty(documents, STANDARD_LIBRARY)


def _features(*names: str) -> Any:
    from datasets import Features, Value

    return Features({name: Value("large_string" if name == "text" else "bool") for name in names})


def _piece_rows(stamps: list[tuple[str, int, int]], piece: int) -> Iterator[dict[str, Any]]:
    """The pieces of text files; one that holds no text is one row, since it counts where documents are held out."""
    for path, _, _ in stamps:
        text = None
        for following in pieces(Path(path)):
            if text is not None:
                yield {"text": text, "ends": False}
            text = following
        yield {"text": text or "", "ends": True}


def _text_files(files: Sequence[Path], data: TextData) -> Dataset:
    # Sizes, times and the length of a piece take part in the fingerprint alone: a file that changes is read again.
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    how = {"features": _features("text", "ends"), "writer_batch_size": 16}  # rows that are held in memory
    found = generated(_piece_rows, {"stamps": stamps, "piece": PIECE}, data, **how)
    return found.remove_columns("ends") if len(found) == len(files) else found


def _load_local(path: Path, data: TextData) -> Dataset:
    from datasets import concatenate_datasets

    if path.is_dir() and is_saved(path):
        return _not_empty(_text_column(load_folder(path, data), data, repr(str(path))), repr(str(path)))
    by_loader: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else files_below(path, _SUFFIX_LOADERS):
        if (loader := _SUFFIX_LOADERS.get(file.suffix.lower())) is not None:
            by_loader.setdefault(loader, []).append(file)
    if not by_loader:
        raise DataError(f"data.source: no file ending in {', '.join(_SUFFIX_LOADERS)} in {str(path)!r}")
    parts: list[Dataset] = []
    for loader, files in by_loader.items():
        if loader == "text":
            parts.append(_text_files(files, data))
        else:
            name = repr(str(files[0])) + (f" (and {len(files) - 1} more)" if len(files) > 1 else "")
            parts.append(_text_column(read_tables(loader, files, data), data, name))
    if any("ends" in part.column_names for part in parts):
        parts = [_with_ends(part) for part in parts]
    return _not_empty(concatenate_datasets(parts), repr(str(path)))


def _with_ends(part: Dataset) -> Dataset:
    import numpy

    if "ends" in part.column_names:
        return part
    with quiet_bars():
        return part.add_column("ends", numpy.ones(len(part), bool), feature=_features("ends")["ends"])


def _load_hub(data: TextData, split: str) -> Dataset:
    return _not_empty(
        _text_column(load_hub(data, split), data, repr(data.source)), f"split {split!r} of {data.source!r}"
    )


def _text_column(documents: Dataset, data: TextData, source: str) -> Dataset:
    require_column(documents, "text_field", data.text_field, source)
    dtype = getattr(documents.features[data.text_field], "dtype", "a nested type, or several")
    if dtype not in ("string", "large_string"):
        raise DataError(
            f"data.text_field: column {data.text_field!r} of {source} must hold text, it holds {dtype}: mend it, or "
            "name another column"
        )
    documents = documents.select_columns([data.text_field])
    if data.text_field != "text":
        documents = documents.rename_column(data.text_field, "text")
    with quiet_bars():
        return documents if dtype == "large_string" else documents.cast(_features("text"), batch_size=64)


def _not_empty(documents: Dataset, source: str) -> Dataset:
    if not any(text and not text.isspace() for text in documents["text"]):
        raise DataError(f"data.source: {source} holds no text; give a source with at least one document")
    return documents


def _split(documents: Dataset) -> tuple[Dataset, Dataset]:
    """Hold out whole documents, or the end of a single one."""
    import numpy

    ends = numpy.array(documents["ends"] if "ends" in documents.column_names else numpy.ones(len(documents), bool))
    if ends.sum() == 1:
        return _cut(documents)
    held_out = (numpy.cumsum(ends) - ends) % EVALUATION_SHARE == 0
    return documents.select(numpy.flatnonzero(~held_out)), documents.select(numpy.flatnonzero(held_out))


def _cut(documents: Dataset) -> tuple[Dataset, Dataset]:
    """Cut the rows of one document at the last line end within the first nine tenths, or right there without one."""
    from datasets import Dataset, concatenate_datasets

    lengths = [len(text or "") for text in documents["text"]]
    limit = sum(lengths) * (EVALUATION_SHARE - 1) // EVALUATION_SHARE
    row, place, begin = 0, 0, sum(lengths)
    for number in reversed(range(len(lengths))):
        begin -= lengths[number]
        if begin > limit:
            continue
        row, place = (row, place) if place else (number, limit - begin)  # without any line end
        if line_end := documents[number]["text"].rfind("\n", 0, limit - begin) + 1:
            row, place = number, line_end
            break
    text = documents[row]["text"] or ""

    def part(text: str, **ends: bool) -> Dataset:
        columns = {"text": [text], **{name: [value] for name, value in ends.items() if name in documents.column_names}}
        return Dataset.from_dict(columns, features=documents.features)

    spans = range(row), range(row + 1, len(documents))
    before, after = ([documents.select(span)] if span else [] for span in spans)
    train, evaluation = part(text[:place], ends=True), part(text[place:], ends=not after)
    return concatenate_datasets([*before, train]), concatenate_datasets([evaluation, *after])
