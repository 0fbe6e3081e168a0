"""Images with class labels: where they come from, and how they become batches of a vision model.

Three sources, one shape. A local folder with a sub-folder for each class, or with ``train`` and ``validation`` (or
``val``, ``test``) of that kind; a data set with an image and a label column, by its hub name or as a folder of Parquet
files or of ``save_to_disk``; or, when nothing is named, scikit-learn's handwritten digits.

Every image is decoded once before the first run, so that one that cannot be read is an error before any training;
``datasets`` keeps the answer. The model's own processor resizes and normalizes, batch by batch.

``datasets`` and Pillow are imported inside the functions: a configuration that names such data costs no such import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from recipes.data import DataError
from recipes.data.images import as_rgb, digits, image_files, opened
from recipes.data.labels import LABEL, Labelled, numbered, require_labels
from recipes.data.settings import Count
from recipes.data.sources import (
    Source,
    generated,
    hold_out,
    load_folder,
    load_hub,
    local_path,
    quiet_bars,
    reject_hub_fields,
    require_column,
    spread,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ImageBatch", "LabelledImageData", "load_labelled_images"]

DIGITS = "the handwritten digits"
EVALUATION_EVERY = 5  # one image in five is held out, where the source has no evaluation split of its own
_EVALUATION_FOLDERS = ("validation", "val", "test")


class LabelledImageData(Source):
    """Where the images and their classes come from."""

    source: str | None = Field(default=None, min_length=1)
    """A local folder (a sub-folder for each class, Parquet files, `save_to_disk`) or a hub name; none: digits."""
    image_field: str = "image"
    """The column that holds the images, in a data set."""
    label_field: str = LABEL
    """The column that holds the classes, in a data set: names, or integers from 0."""
    evaluation_split: str | None = None
    """The hub data set's split to evaluate on; none: every fifth image is held out."""
    evaluation_images: Count = 1000
    """Evaluate on so many images, spread evenly over the held-out ones; fewer where there are fewer."""


def load_labelled_images(data: LabelledImageData) -> Labelled:
    """Load the training and the evaluation images with the columns ``image`` and ``label``.

    Raises:
        DataError: the source is missing or empty, has no such column, split or classes, a folder of a class is empty,
            or an image cannot be read.

    >>> load_labelled_images(LabelledImageData()).classes
    ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    name = DIGITS if data.source is None else repr(data.source)
    path = None if data.source is None else local_path(data)
    if path is not None or data.source is None:
        reject_hub_fields(data, DIGITS)
        train, evaluation = _digits() if path is None else _local(path, data)
    else:
        train = _columns(load_hub(data, data.train_split), data)
        evaluation = None
        if data.evaluation_split is not None:
            evaluation = _columns(load_hub(data, data.evaluation_split), data)
    if len(train) < 2:
        raise DataError(f"data.source: {name} holds {len(train)} images to train on: give at least two")
    if evaluation is None:
        train, evaluation = hold_out(train, EVALUATION_EVERY)
    for part in (train, evaluation):
        _check_images(part, data, name)
    return numbered(train, spread(evaluation, data.evaluation_images), data.label_field, name)


@dataclass(frozen=True)
class ImageBatch:
    """Makes a batch of examples: ``pixel_values`` (batch, 3, height, width) and ``labels`` (batch,)."""

    processor: Any
    """The model's own image processor."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Decode, resize and normalize."""
        pictures = [as_rgb(row["image"]) for row in rows]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row[LABEL] for row in rows])}


def _digits() -> tuple[Dataset, None]:
    from datasets import ClassLabel

    with quiet_bars():
        found = digits().remove_columns("caption")
        return found.cast_column(LABEL, ClassLabel(names=[str(digit) for digit in range(10)])), None


def _local(path: Path, data: LabelledImageData) -> tuple[Dataset, Dataset | None]:
    if path.is_file():
        raise DataError(f"data.source: {str(path)!r} is a file; give the folder that holds the images")
    if (found := load_folder(path, data)) is not None:
        return _columns(found, data), None
    held_out = next((path / name for name in _EVALUATION_FOLDERS if (path / name).is_dir()), None)
    if (path / "train").is_dir() and held_out is not None:
        return _class_folders(path / "train", data), _class_folders(held_out, data)
    return _class_folders(path, data), None


def _class_folders(folder: Path, data: LabelledImageData) -> Dataset:
    import datasets

    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise DataError(
            f"data.source: {str(folder)!r} has no sub-folders: put the images of each class into one of its name"
        )
    if strays := [file.name for file in image_files(folder) if file.parent == folder]:
        raise DataError(
            f"data.source: {strays[0]!r} in {str(folder)!r} lies beside the folders of the classes: move or remove it"
        )
    files = {child: image_files(child) for child in classes}
    if empty := [child.name for child, found in files.items() if not found]:
        raise DataError(
            f"data.source: the class folder {empty[0]!r} in {str(folder)!r} holds no image: fill or remove it"
        )
    # Sizes and times take part in the fingerprint alone: a file that changes is read again.
    stamps = [
        (str(file), child.name, file.stat().st_size, file.stat().st_mtime_ns)
        for child, found in files.items()
        for file in found
    ]
    features = datasets.Features({"image": datasets.Image(), data.label_field: datasets.Value("string")})
    arguments = {"stamps": stamps, "label_field": data.label_field}
    found: Dataset = generated(_folder_rows, arguments, data, features=features)
    return found


def _folder_rows(stamps: list[tuple[str, str, int, int]], label_field: str) -> Iterator[dict[str, Any]]:
    for path, name, _, _ in stamps:
        yield {"image": {"bytes": None, "path": path}, label_field: name}


def _columns(found: Dataset, data: LabelledImageData) -> Dataset:
    """Keep the two columns that count."""
    from datasets import Image

    require_column(found, "image_field", data.image_field, repr(data.source))
    if not isinstance(found.features[data.image_field], Image):
        raise DataError(f"data.image_field: column {data.image_field!r} of {data.source!r} must hold images")
    require_labels(found, data.label_field, repr(data.source))
    kept = found.select_columns([data.image_field, data.label_field])
    return kept if data.image_field == "image" else kept.rename_column(data.image_field, "image")


def _check_images(found: Dataset, data: LabelledImageData, source: str) -> None:
    """Decode every image, once for each state of the data."""
    from datasets import Features, Image, Value
    from datasets.config import HF_DATASETS_CACHE

    # A file of ours: `map` by itself would write beside the source, which may be a folder of the user's.
    name = sha256(f"{found._fingerprint} readable".encode()).hexdigest()[:32]
    cached = Path(data.cache_dir or HF_DATASETS_CACHE) / "qat-images" / f"{name}.arrow"
    cached.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if sys.stderr.isatty() else quiet_bars():  # in a file, a bar is a hundred lines
        done = found.cast_column("image", Image(decode=False)).map(
            _fault,
            with_indices=True,
            remove_columns=found.column_names,
            features=Features({"fault": Value("string")}),
            cache_file_name=str(cached),
            new_fingerprint=cached.stem,
            desc="reading images",
        )
    if faults := [fault for fault in done["fault"] if fault]:
        raise DataError(
            f"data.source: {len(faults)} of {len(found)} images in {source} cannot be read "
            f"({'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}): mend or remove them"
        )


def _fault(row: dict[str, Any], index: int) -> dict[str, str]:
    try:
        with opened(row["image"]) as picture:
            picture.load()
    except Exception as error:  # Pillow's decoders raise errors without a common base
        return {"fault": f"{(row['image'] or {}).get('path') or f'row {index}'} ({type(error).__name__}: {error})"}
    return {"fault": ""}
