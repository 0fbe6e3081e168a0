"""What texts and images have in common: where a data set comes from, and how a part of it is held out.

What ``datasets`` raises says little about a user's mistake. So its builders are called here alone, on files that were
looked at before (`recipes.data.files`), and an error names the file.

``datasets`` is imported inside the functions: a configuration that names a `Source` costs no such import.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from recipes.data import DataError
from recipes.data.files import check_text, files_below, require_file
from recipes.data.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Source",
    "generated",
    "hold_out",
    "is_saved",
    "load_folder",
    "load_hub",
    "local_path",
    "quiet_bars",
    "read_tables",
    "reject_hub_fields",
    "require_column",
    "spread",
]


class Source(Settings):
    """Where data comes from."""

    source: str | None = Field(default=None, min_length=1)
    """A local path, or a data set's hub name; none: what every machine has."""
    subset: str | None = None
    """The hub data set's configuration name, where it has several."""
    train_split: str = "train"
    """The hub data set's split to train on."""
    evaluation_split: str | None = None
    """The hub data set's split to evaluate on; none: a part of the data is held out."""
    cache_dir: Path | None = None
    """Where what is computed from the data is kept; none: where ``datasets`` keeps its own."""


def local_path(data: Source, suffixes: tuple[str, ...] = ()) -> Path | None:
    """Return the path that a source names, or none where it is a hub name.

    Args:
        data: has a source.
        suffixes: of files; what ends in one is no hub name.

    Raises:
        DataError: it is a path that does not exist, or that is neither a folder nor a regular file.
    """
    source = str(data.source)
    path = Path(os.path.expanduser(source))  # of os, to whom neither an unknown user nor a long name is an exception
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        require_file(path)
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in suffixes:
        raise DataError(f"data.source: {source!r} does not exist; give a path that does, or a hub data set's name")
    return None


def reject_hub_fields(data: Source, without_source: str) -> None:
    """Refuse settings that only data sets of the hub have.

    Args:
        data: has no source, or a local one.
        without_source: what is used where there is none, for the message.

    Raises:
        DataError: one of them is set.
    """
    for field in ("subset", "train_split", "evaluation_split"):
        if (value := getattr(data, field)) != Source.model_fields[field].default:
            source = without_source if data.source is None else repr(data.source)
            raise DataError(f"data.{field}: belongs to hub data sets, but the source is {source}; remove {value!r}")


def load_hub(data: Source, split: str) -> Dataset:
    """Load a split of a data set of the hub, whose code never runs: ``datasets`` reads files only.

    Raises:
        DataError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(data.source, data.subset, split=split, cache_dir=data.cache_dir)
    except Exception as error:  # hub, network, script and split faults have no common base
        name = repr(data.source) if data.subset is None else f"{data.source!r} (subset {data.subset!r})"
        raise DataError(
            f"data.source: {name} is no local path, and split {split!r} of a hub data set of that name could not be "
            f"loaded: {type(error).__name__}: {error}"
        ) from error


def is_saved(path: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` writes."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def load_folder(path: Path, data: Source) -> Dataset | None:
    """Load a folder of Parquet files or of ``save_to_disk``; none where it is neither.

    Raises:
        DataError: it cannot be read, or holds several splits.
    """
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise DataError(f"data.source: {str(path)!r} holds several splits ({splits}): give the folder of one of them")
    if is_saved(path):
        files_below(path, {".json", ".arrow"})
        try:
            return load_from_disk(str(path))
        except Exception as error:  # whatever a damaged file makes of it
            raise DataError(f"data.source: {str(path)!r} cannot be read ({_reason(error)}): save it again") from error
    tables = files_below(path, {".parquet"})
    return read_tables("parquet", tables, data) if tables else None


def read_tables(loader: str, files: Sequence[Path], data: Source, **options: Any) -> Dataset:
    """Load files of one kind as one data set.

    Args:
        loader: a builder of ``datasets``: ``"json"``, ``"csv"`` or ``"parquet"``.
        files: at least one.
        data: where the cache is.
        options: of the builder.

    Raises:
        DataError: a file is no regular one, is empty, is no text where it should be, cannot be read, or has other
            columns than the first one.
    """
    from datasets import load_dataset

    for file in files:
        if require_file(file).st_size == 0:
            raise DataError(f"data.source: {str(file)!r} is empty: fill or remove it")
        if loader != "parquet":
            check_text(file)
    names = [glob.escape(str(file)) for file in files]
    try:
        with quiet_bars():
            return load_dataset(loader, data_files=names, split="train", cache_dir=data.cache_dir, **options)
    except Exception as error:  # builders of datasets raise errors without a common base
        if len(files) == 1:
            raise DataError(
                f"data.source: {str(files[0])!r} cannot be read as {loader} ({_reason(error)}): mend or remove it"
            ) from error
        apart = {file: read_tables(loader, [file], data, **options).features for file in files}
        first = apart[files[0]]
        other = next((file for file in files if apart[file] != first), files[-1])
        raise DataError(
            f"data.source: {str(other)!r} has the columns {_short(apart[other])}, and {files[0].name} has "
            f"{_short(first)}: give all files the same columns of the same types"
        ) from error


def generated(
    rows: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any], data: Source, **how: Any
) -> Any:
    """Make a data set of what a generator yields; ``datasets`` caches it under the generator's code and arguments.

    Raises:
        DataError: as the generator, or it yields what no data set holds.
    """
    from datasets import Dataset

    try:
        with quiet_bars():
            return Dataset.from_generator(rows, gen_kwargs=arguments, cache_dir=data.cache_dir, **how)
    except Exception as error:  # datasets wraps what a generator raises
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(
            f"data.source: {str(data.source)!r} cannot be made into a data set ({_reason(error)}): mend it"
        ) from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def _short(features: Any) -> str:
    shown = ", ".join(f"{name[:40]} ({getattr(kind, 'dtype', 'nested')})" for name, kind in list(features.items())[:8])
    return shown + (", ..." if len(features) > 8 else "")


def require_column(found: Dataset, field: str, column: str, source: str) -> None:
    """Raise `DataError` where a data set lacks the ``column`` that the setting ``field`` names.

    >>> from datasets import Dataset
    >>> require_column(Dataset.from_dict({"text": ["a"]}), "text_field", "text", "here")
    """
    if column not in found.column_names:
        columns = ", ".join(name[:40] for name in found.column_names[:20]) or "none"
        raise DataError(
            f"data.{field}: {source} has no column {column!r}; its columns: {columns}: name one of them (the header, "
            "which is the first line of a CSV file, has the names)"
        )
    if f"{column}.1" in found.column_names:  # what a second one is called on reading
        raise DataError(f"data.{field}: {source} has two columns {column!r}: rename or remove one")


def hold_out(found: Dataset, every: int) -> tuple[Dataset, Dataset]:
    """Split a data set: every so many rows, from the first one on, are held out. They are returned second."""
    import numpy

    rows = numpy.arange(len(found))
    return found.select(rows[rows % every > 0]), found.select(range(0, len(found), every))


def spread(found: Dataset, count: int) -> Dataset:
    """Keep at most ``count`` rows, evenly spaced."""
    count = min(count, len(found))
    return found.select([index * len(found) // count for index in range(count)])


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the progress bars of ``datasets``, as for steps that take no time worth showing, and what it logs."""
    import datasets

    shown, logger = datasets.is_progress_bar_enabled(), logging.getLogger("datasets")
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.CRITICAL)  # an error that it logs it raises too
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
