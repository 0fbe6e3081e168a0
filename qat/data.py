"""Batches as a caller gives them, and those for calibration from files of texts or images: `qat calibrate --data`.

Of files a few batches are wanted out of any amount of data. So ``datasets`` streams texts through a shuffle, and images
are picked at even distances in the order of their names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from qat.errors import CalibrationError, listed, told

__all__ = ["image_batches", "list_batches", "require_several", "text_batches"]

_TABLES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_BUFFER = 1000  # rows that are shuffled
_CHARACTERS = 1 << 20  # of one text that are looked at


def require_several(batches: Any) -> None:
    """Raise `CalibrationError` where ``batches`` are a single one, or nothing that can be gone through."""
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise CalibrationError(f"batches: must be several batches, got one {type(batches).__name__}: pass [batch]")


def list_batches(batches: Iterable[Any], what: str) -> list[Any]:
    """All batches; `CalibrationError` where they are a single one, or none for ``what`` they are needed for."""
    require_several(batches)
    if not (found := list(batches)):
        raise CalibrationError(f"batches: {what} needs at least one batch, got none: pass some training batches")
    return found


def text_batches(
    paths: Sequence[Path], tokenizer: Any, *, count: int, size: int, length: int, packed: bool, field: str = "text"
) -> list[dict[str, Tensor]]:
    """Up to ``count`` batches of ``size`` texts, cut to ``length`` tokens and padded: int64, ``(size, length)`` each.

    Args:
        paths: CSV, JSON (lines) or Parquet with a column ``field``; any other file is plain text in UTF-8. A plain file
            gives a text a line. Of a folder each plain file is one text, at any depth; binary ones are passed over.
        tokenizer: of transformers.
        packed: join the tokens of all texts and cut them into blocks of ``length``, as language models are trained.

    Raises:
        CalibrationError: a path or the column is missing, a file cannot be read, or there is no text.
    """
    texts = _texts(paths, packed, field)
    if packed:
        blocks = list(islice(_blocks(texts, tokenizer, length), count * size))
        return [{"input_ids": tensor(blocks[i : i + size])} for i in range(0, len(blocks), size)]
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)  # the caller's goes into the export
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        size = 1  # one text needs no padding
    options = {"truncation": True, "max_length": length, "padding": size > 1, "return_tensors": "pt"}
    found = list(islice(texts, count * size))
    return [dict(tokenizer(found[i : i + size], **options)) for i in range(0, len(found), size)]


def image_batches(
    paths: Sequence[Path], processor: Any, *, count: int, size: int, mode: str = "RGB"
) -> list[dict[str, Tensor]]:
    """Up to ``count`` batches of ``size`` images, as the ``processor`` of transformers makes them.

    ``paths`` are images, or folders with images at any depth; ``mode`` is Pillow's, which they are converted to.

    Raises:
        CalibrationError: a path is missing, a file cannot be read, or there is no image.
    """
    from datasets import Dataset, Image
    from PIL.Image import registered_extensions

    suffixes = registered_extensions()
    files = [str(file) for path in paths for file in _files(path) if file.suffix.lower() in suffixes]
    if not files:
        raise CalibrationError(f"data: there is no image in {[*map(str, paths)]}: name files or folders of images")
    wanted = min(count * size, len(files))
    chosen = [files[index * len(files) // wanted] for index in range(wanted)]
    rows, images = Dataset.from_dict({"image": chosen}).cast_column("image", Image()), []
    for number, file in enumerate(chosen):
        try:
            images.append(rows[number]["image"].convert(mode))
        except Exception as error:  # Pillow's decoders raise errors without a common base
            raise CalibrationError(
                f"data: {file!r} cannot be read as an image ({told(error)}): mend or remove it"
            ) from error
    return [dict(processor(images=images[i : i + size], return_tensors="pt")) for i in range(0, wanted, size)]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise CalibrationError(f"data: {str(path)!r} does not exist: name files or folders that do")
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _is_binary(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" in opened.read(8000)  # as git tells them


def _texts(paths: Sequence[Path], packed: bool, field: str) -> Iterator[str]:
    from datasets import load_dataset

    sources: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        by = "document" if path.is_dir() else "paragraph" if packed else "line"
        for file in _files(path):
            loader = _TABLES.get(file.suffix.lower(), "text")
            if loader == "text" and path.is_dir() and _is_binary(file):
                continue
            sources.setdefault((loader, by if loader == "text" else ""), []).append(str(file))
    found = False
    for (loader, by), files in sources.items():
        options = {"sample_by": by, "encoding_errors": "replace" if by == "document" else None} if by else {}
        try:
            rows = load_dataset(loader, data_files=files, split="train", streaming=True, **options)
            for row in rows.shuffle(seed=0, buffer_size=_BUFFER):
                if not by and field not in row:
                    known = ", ".join(row)
                    raise CalibrationError(
                        f"data: {listed(files, 3)}: has no column {field!r} but {known}: name one by --text-field"
                    )
                text = row["text" if by else field]
                if isinstance(text, str) and text.strip():
                    found = True
                    yield text[:_CHARACTERS]
        except CalibrationError:
            raise
        except Exception as error:  # builders of datasets raise errors without a common base
            name = _broken(files, loader, options) or listed(files, 3)
            cause = " ".join(str(error.__cause__ or error).split())
            raise CalibrationError(f"data: {name}: cannot be read as {loader}: {cause}: mend or remove it") from error
    if not found:
        raise CalibrationError(f"data: there is no text in {[*map(str, paths)]}: name files that hold some")


def _broken(files: Sequence[str], loader: str, options: dict[str, Any]) -> str | None:
    """The first file that cannot be read alone, where an error of many does not name it."""
    from datasets import load_dataset

    for file in files:
        try:
            for _ in load_dataset(loader, data_files=[file], split="train", streaming=True, **options):
                pass
        except Exception:  # likewise
            return file
    return None


def _blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    left: list[int] = []
    whole = False
    for text in texts:
        left += tokenizer(text, verbose=False)["input_ids"]
        while len(left) >= length:
            whole = True
            yield left[:length]
            left = left[length:]
    if left and not whole:
        yield left
