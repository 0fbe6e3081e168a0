"""What texts and images have in common: where a data set comes from, and how a part of it is held out.

``datasets`` is imported inside the functions: a configuration that names a `Source` costs no such import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from recipes.data import DataError
from recipes.data.settings import Settings

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Source",
    "hold_out",
    "load_folder",
    "load_hub",
    "local_path",
    "quiet_bars",
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
        DataError: it is a path that does not exist.
    """
    source = str(data.source)
    path = Path(os.path.expanduser(source))  # of os, to whom neither an unknown user nor a long name is an exception
    if os.path.exists(path):
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


def load_folder(path: Path, data: Source) -> Dataset | None:
    """Load a folder of Parquet files or of ``save_to_disk``; none where it is neither.

    Raises:
        DataError: it cannot be read, or holds several splits.
    """
    from datasets import load_dataset, load_from_disk

    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise DataError(f"data.source: {str(path)!r} holds several splits ({splits}): give the folder of one of them")
    try:
        if (path / "state.json").exists():
            return load_from_disk(str(path))
        if tables := sorted(str(file) for file in path.rglob("*.parquet")):
            return load_dataset("parquet", data_files=tables, split="train", cache_dir=data.cache_dir)
    except Exception as error:  # builders of datasets raise errors without a common base
        raise DataError(f"data.source: {str(path)!r} cannot be read: {error.__cause__ or error}") from error
    return None


def require_column(found: Dataset, field: str, column: str, source: str) -> None:
    """Raise `DataError` where a data set lacks the ``column`` that the setting ``field`` names.

    >>> from datasets import Dataset
    >>> require_column(Dataset.from_dict({"text": ["a"]}), "text_field", "text", "here")
    """
    if column not in found.column_names:
        columns = ", ".join(found.column_names) or "none"
        raise DataError(f"data.{field}: {source} has no column {column!r}; its columns: {columns}: name one of them")


def hold_out(found: Dataset, every: int) -> tuple[Dataset, Dataset]:
    """Split a data set: every so many rows, from the first one on, are held out. They are returned second."""
    kept = [index for index in range(len(found)) if index % every]
    return found.select(kept), found.select(range(0, len(found), every))


def spread(found: Dataset, count: int) -> Dataset:
    """Keep at most ``count`` rows, evenly spaced."""
    count = min(count, len(found))
    return found.select([index * len(found) // count for index in range(count)])


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide the progress bars of ``datasets``, as for steps that take no time worth showing."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
