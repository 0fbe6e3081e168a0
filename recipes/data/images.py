"""Images with captions: where they come from, and how they become pictures of one size.

Three sources, one shape. A local folder, whose captions stand in ``metadata.jsonl`` or ``metadata.csv`` (a column
``file_name`` and one for the captions) or beside each image in a text file of its name; a data set with an image and a
caption column, by its hub name or as a folder of Parquet files or of ``save_to_disk``; or, when nothing is named,
scikit-learn's handwritten digits with captions of our own. Each becomes a ``datasets.Dataset`` of images of one size.

Every image is decoded here, once, so that one that cannot be read is known before any training: it is left out and
named, and only more of them than the settings allow are an error. The result is cached by ``datasets`` under a
fingerprint of the source (of a folder: its files' names, sizes and times) and of the size.

``datasets``, Pillow and scikit-learn are imported inside the functions: a configuration that names an `ImageData`
costs no such import.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from recipes.data import DataError
from recipes.data.files import file_fault, files_below, read_text
from recipes.data.settings import Count, Whole
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
    from PIL.Image import Image as Picture

__all__ = ["ImageData", "Images", "as_rgb", "digits", "image_files", "load_images", "opened"]

EVALUATION_EVERY = 5  # one image in five is held out, where the source has no evaluation split of its own
DIGIT_SIZE = 32
MOST_PIXELS = 8192  # a side: 200 MB a picture
MOST_CAPTION = 1_000_000  # bytes of a text file beside an image
_VERSION = "2"  # of how an image becomes a picture of one size
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Four of them: no factor in common with EVALUATION_EVERY, so both splits have every template.
_TEMPLATES = ("the digit {word}", "a handwritten {number}", "the number {word}", "a handwritten {word}")
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_METADATA = ("metadata.jsonl", "metadata.csv")


class ImageData(Source):
    """Where the images come from, and their size."""

    source: str | None = Field(default=None, min_length=1)
    """A local folder of images, Parquet files or `save_to_disk`, or a data set's hub name; none: handwritten digits."""
    image_field: str = "image"
    """The column that holds the images, in a data set."""
    caption_field: str = "caption"
    """The column that holds the captions (or integer labels, for a pipeline that takes these)."""
    evaluation_split: str | None = None
    """The hub data set's split to evaluate on; none: every fifth image is held out."""
    size: Count = Field(default=DIGIT_SIZE, ge=8, le=MOST_PIXELS)
    """Pixels a side: images are resized so that their shorter side has it, and cropped around the centre."""
    evaluation_images: Count = 256
    """Evaluate on so many images, spread evenly over the held-out ones; fewer where there are fewer."""
    unreadable_limit: Whole = 10
    """Images that cannot be read are left out and named; more of them than this are an error."""


@dataclass(frozen=True)
class Images:
    """Images of one size with their captions, and what could not be read."""

    train: Dataset
    """Columns ``image`` (RGB) and ``caption`` (text or integer)."""
    evaluation: Dataset
    """The same columns."""
    unreadable: tuple[str, ...]
    """The names of the images that were left out, each with the reason."""

    def __str__(self) -> str:
        """One line, and one more for each image that was left out."""
        total = f"{len(self.train)} images to train on, {len(self.evaluation)} to evaluate on"
        return "\n".join([total, *(f"left out, as it cannot be read: {name}" for name in self.unreadable)])


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits with captions.

    Columns: ``image`` (RGB, 32 x 32; the original 8 x 8, enlarged), ``caption`` (text), ``label`` (0 to 9).

    Raises:
        DataError: scikit-learn is not installed.

    >>> digits()[3]["caption"]
    'a handwritten three'
    """
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "caption": Value("string"), "label": Value("int64")})
    return Dataset.from_list(list(_digit_rows()), features=features)


def load_images(data: ImageData) -> Images:
    """Load the training and the evaluation images, all of one size.

    Raises:
        DataError: the source is missing or empty or has no such column or split, an image has no caption, or more
            images than ``unreadable_limit`` cannot be read.
    """
    path = None if data.source is None else local_path(data)
    if path is not None or data.source is None:
        reject_hub_fields(data, "the handwritten digits")
        found = _digit_source(data) if path is None else _local_source(path, data)
        return _split(*_prepared(found, data), data)
    train, bad = _prepared(_columns(load_hub(data, data.train_split), data), data)
    if data.evaluation_split is None:
        return _split(train, bad, data)
    evaluation, also_bad = _prepared(_columns(load_hub(data, data.evaluation_split), data), data, len(bad))
    return Images(train, spread(evaluation, data.evaluation_images), (*bad, *also_bad))


# -- sources: data sets of `image` (bytes or a path), `caption` and `name` ---------------------------------------------


def _digit_rows() -> Iterator[dict[str, Any]]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(
            "data.source: the handwritten digits come with scikit-learn, which is not installed: run "
            "pip install 'qat[digits]', or name a folder of images"
        ) from error
    from PIL import Image

    found = load_digits()
    for index, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        picture = Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).convert("RGB")
        encoded = io.BytesIO()
        picture.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC).save(encoded, "PNG")
        caption = _TEMPLATES[index % len(_TEMPLATES)].format(word=_WORDS[label], number=label)
        yield {"image": {"bytes": encoded.getvalue(), "path": None}, "caption": caption, "label": int(label)}


def _digit_source(data: ImageData) -> Dataset:
    if data.caption_field not in ("caption", "label"):
        raise DataError(f"data.caption_field: digits have the columns caption and label, not {data.caption_field!r}")
    return _undecoded(generated(_named_digits, {"caption_field": data.caption_field}, data))


def _named_digits(caption_field: str) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(_digit_rows()):
        yield {"image": row["image"], "caption": row[caption_field], "name": f"digit {index}"}


def _local_source(path: Path, data: ImageData) -> Dataset:
    if path.is_file():
        raise DataError(f"data.source: {str(path)!r} is a file; give the folder that holds the images")
    if (found := load_folder(path, data)) is not None:
        return _columns(found, data)
    files = image_files(path)
    if not files:
        raise DataError(f"data.source: no image ({', '.join(sorted(_SUFFIXES))}) and no Parquet file in {str(path)!r}")
    captions = _folder_captions(path, files, data)
    # Sizes and times take part in the fingerprint alone: a file that changes is read again.
    stamps = [(str(file), caption, file.stat().st_size, file.stat().st_mtime_ns) for file, caption in captions.items()]
    return _undecoded(generated(_folder_rows, {"stamps": stamps}, data))


def _folder_rows(stamps: list[tuple[str, Any, int, int]]) -> Iterator[dict[str, Any]]:
    for path, caption, _, _ in stamps:
        yield {"image": {"bytes": None, "path": path}, "caption": caption, "name": path}


def _folder_captions(folder: Path, files: list[Path], data: ImageData) -> dict[Path, Any]:
    """Pair each image with its caption; with a metadata file, only the images that it names count."""
    found: dict[Path, Any] = {}
    without: list[str] = []
    twice: list[str] = []
    if (metadata := next((folder / name for name in _METADATA if lexists(folder / name)), None)) is not None:
        for row in _read_metadata(metadata):
            name, caption = row.get("file_name", ""), row.get(data.caption_field)
            inside = isinstance(name, str) and name and {"..", "/"}.isdisjoint(Path(name).parts)
            if fault := file_fault(folder / name) if inside else "is no file there":
                raise DataError(
                    f"data.source: {str(metadata)!r} has the file_name {name!r:.100}, which {fault}: name images "
                    "of the folder in a column file_name"
                )
            twice += [str(name)] if folder / name in found else []
            found[folder / name] = caption
            without += [str(name)] if caption in (None, "") else []
        remedy = f"fill the column {data.caption_field!r} of {metadata.name}, or name another with data.caption_field"
    else:
        for file in files:
            text = file.with_suffix(".txt")
            found[file] = read_text(text, MOST_CAPTION).strip() if lexists(text) else ""
            without += [] if found[file] else [file.name]
        remedy = f"write each into a text file of the image's name, or all into {' or '.join(_METADATA)}"
    if not found:
        raise DataError(f"data.source: {str(metadata)!r} names no image: fill or remove it")
    if twice:  # with a row each in both splits, evaluation would be on images that were trained on
        raise DataError(
            f"data.source: {metadata} has {len(twice)} rows for images that it already named (first: "
            f"{', '.join(twice[:3])}): keep one row for each image"
        )
    if without:
        raise DataError(
            f"data.source: {len(without)} of {len(found)} images in {str(folder)!r} have no caption (first: "
            f"{', '.join(without[:3])}): {remedy}"
        )
    _check_types(found.values(), data)
    return found


def _check_types(captions: Iterable[Any], data: ImageData) -> None:
    types = {type(caption).__name__ for caption in captions}
    if types - {"str"} and types - {"int"}:
        raise DataError(
            f"data.caption_field: captions must all be texts, or all integers, but {data.caption_field!r} of "
            f"{data.source!r} holds {' and '.join(sorted(types))}: name another column"
        )


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    text, line, rows = io.StringIO(read_text(path)), 0, []
    try:
        if path.suffix == ".csv":
            reader = csv.DictReader(text)
            for row in reader:
                line = reader.line_num
                rows.append(row)
            return rows
        for content in text:
            rows += [dict(json.loads(content))] if content.strip() else []
            line += 1
    except (csv.Error, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"data.source: {str(path)!r} cannot be read after line {line} ({str(error)[:200]}): give one row, or one "
            "JSON mapping a line, for each image"
        ) from error
    return rows


def _columns(found: Dataset, data: ImageData) -> Dataset:
    """Keep the two columns that count, images not yet decoded."""
    from datasets import Image

    for field in ("image_field", "caption_field"):
        require_column(found, field, getattr(data, field), repr(data.source))
    if not isinstance(found.features[data.image_field], Image):
        raise DataError(f"data.image_field: column {data.image_field!r} must hold images")
    kept = found.select_columns([data.image_field, data.caption_field])
    names = {data.image_field: "image", data.caption_field: "caption"}
    kept = kept.rename_columns({old: new for old, new in names.items() if old != new})
    without = [index for index, caption in enumerate(kept["caption"]) if caption in (None, "")]
    if without:
        raise DataError(
            f"data.caption_field: {len(without)} of {len(kept)} rows of {data.source!r} have no caption (first: row "
            f"{without[0]}): fill them, or name another column"
        )
    _check_types(kept["caption"], data)
    return kept.cast_column("image", Image(decode=False))


def _undecoded(found: Dataset) -> Dataset:
    import datasets

    with quiet_bars():
        return found.cast_column("image", datasets.Image(decode=False))


# -- pictures of one size ----------------------------------------------------------------------------------------------


def _prepared(source: Dataset, data: ImageData, known_bad: int = 0) -> tuple[Dataset, tuple[str, ...]]:
    """Decode every image and make it the size, leaving out what cannot be read."""
    from datasets import Features, Image, Value
    from datasets.config import HF_DATASETS_CACHE

    features = Features({"image": Image(), "caption": source.features["caption"], "fault": Value("string")})
    # A file of ours: `map` by itself would write beside the source, which may be a folder of the user's.
    made = f"{source._fingerprint} {data.size} {_VERSION}"
    cached = (
        Path(data.cache_dir or HF_DATASETS_CACHE) / "qat-images" / f"{sha256(made.encode()).hexdigest()[:32]}.arrow"
    )
    cached.parent.mkdir(parents=True, exist_ok=True)
    done = source.map(
        _resize_row,
        with_indices=True,
        fn_kwargs={"size": data.size},
        remove_columns=source.column_names,
        features=features,
        cache_file_name=str(cached),
        new_fingerprint=cached.stem,
        writer_batch_size=max(1, min(1000, 2**24 // data.size**2)),  # pictures that are held in memory
        desc="reading images",
    )
    faults = done["fault"]
    bad = tuple(fault for fault in faults if fault)
    if known_bad + len(bad) > data.unreadable_limit:
        shown = "; ".join(bad[:3])
        raise DataError(
            f"data.unreadable_limit: {known_bad + len(bad)} of {len(done)} images cannot be read, more than "
            f"{data.unreadable_limit} ({shown}{'; ...' if len(bad) > 3 else ''}): mend or remove them or raise it"
        )
    good = [index for index, fault in enumerate(faults) if not fault]
    if len(good) < 2:
        raise DataError("data.source: fewer than two images can be read; give a source with more")
    return done.select(good).remove_columns("fault"), bad


def _resize_row(row: dict[str, Any], index: int, size: int) -> dict[str, Any]:
    name = row.get("name") or (row["image"] or {}).get("path") or f"row {index}"
    try:
        with opened(row["image"]) as found:
            picture = _resized(found, size)
    except Exception as error:  # Pillow's decoders raise errors without a common base
        return {"image": None, "caption": row["caption"], "fault": f"{name} ({type(error).__name__}: {error})"}
    return {"image": picture, "caption": row["caption"], "fault": ""}


@contextmanager
def opened(encoded: dict[str, Any] | None) -> Iterator[Picture]:
    """Open an image as a data set holds it: its ``bytes``, or else the ``path`` of a regular file.

    Raises:
        DataError: there is neither.
        Exception: as Pillow, also for more than 89 million pixels; its decoders' errors have no common base.
    """
    from PIL import Image

    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise DataError("no image")
    if encoded["bytes"] is None and (fault := file_fault(Path(encoded["path"]))) is not None:
        raise DataError(f"it {fault}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])) as picture:
            yield picture


def image_files(folder: Path) -> list[Path]:
    """Return the images below a folder, sorted by path.

    Raises:
        DataError: as `files_below`.
    """
    return files_below(folder, _SUFFIXES)


def as_rgb(picture: Picture) -> Picture:
    """Return a picture in RGB, upright as its camera says, and on white where it is transparent.

    >>> from PIL import Image
    >>> as_rgb(Image.new("RGBA", (2, 2))).getpixel((0, 0))
    (255, 255, 255)
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _resized(picture: Picture, size: int) -> Picture:
    """As `as_rgb`; the shorter side becomes ``size``, the longer one is cropped around its centre."""
    from PIL import Image

    picture = as_rgb(picture)
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _split(prepared: Dataset, unreadable: tuple[str, ...], data: ImageData) -> Images:
    train, evaluation = hold_out(prepared, EVALUATION_EVERY)
    return Images(train, spread(evaluation, data.evaluation_images), unreadable)
