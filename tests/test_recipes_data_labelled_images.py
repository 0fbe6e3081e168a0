from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from recipes.data import DataError
from recipes.data.labelled_images import ImageBatch, LabelledImageData, load_labelled_images

Make = Callable[..., LabelledImageData]


@pytest.fixture
def local(tmp_path: Path) -> Make:
    def make(source: Path | None, **fields: Any) -> LabelledImageData:
        return LabelledImageData(source=source and str(source), cache_dir=tmp_path / "cache", **fields)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five dark and five light images, one of them a level further down."""
    for name, start in (("dark", 0), ("light", 200)):
        for number in range(5):
            file = tmp_path / "images" / name / ("more" if number == 4 else "") / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (12, 8), start + number).save(file)
    (tmp_path / "images" / ".hidden").mkdir()
    return tmp_path / "images"


def test_the_default_is_digits(local: Make) -> None:
    found = load_labelled_images(local(None))
    assert (len(found.train), len(found.evaluation), found.named) == (1437, 360, True)
    assert found.classes == tuple("0123456789")
    assert set(found.train["label"]) == set(found.evaluation["label"]) == set(range(10))
    assert found.train.column_names == ["image", "label"]
    assert len(load_labelled_images(local(None, evaluation_images=20)).evaluation) == 20


def test_sub_folders_are_classes(folder: Path, local: Make) -> None:
    found = load_labelled_images(local(folder))
    assert found.classes == ("dark", "light")
    assert (found.train["label"][:], found.evaluation["label"][:]) == ([0] * 4 + [1] * 4, [0, 1])
    assert [row["image"].getpixel((0, 0)) for row in found.evaluation] == [0, 200]


def test_folders_of_splits_are_not_classes(folder: Path, local: Make, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    for name in ("train", "val"):
        os.symlink(folder, both / name)
    found = load_labelled_images(local(both))
    assert found.classes == ("dark", "light")
    assert (len(found.train), len(found.evaluation)) == (10, 10)


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet"])
def test_data_sets_in_a_folder(kind: str, folder: Path, local: Make, tmp_path: Path) -> None:
    files = sorted(str(file) for file in folder.rglob("*.png"))
    table = datasets.Dataset.from_dict({"photo": files, "kind": [0, 1] * 5})
    table = table.cast_column("photo", datasets.Image())
    table = table.cast_column("kind", datasets.ClassLabel(names=["even", "odd"]))
    saved = tmp_path / "saved"
    if kind == "parquet":
        saved.mkdir()
        table.to_parquet(saved / "part.parquet")
    else:
        table.save_to_disk(saved)
    data = local(saved, image_field="photo", label_field="kind")
    found = load_labelled_images(data)
    assert found.classes == ("even", "odd")
    assert found.evaluation["label"][:] == [0, 1]
    with pytest.raises(DataError, match=r"data\.image_field: .* has no column 'image'; its columns: photo, kind"):
        load_labelled_images(local(saved, label_field="kind"))
    with pytest.raises(DataError, match=r"data\.image_field: column 'kind' of .* must hold images"):
        load_labelled_images(local(saved, image_field="kind", label_field="photo"))


def test_a_file_that_changes_is_read_again(folder: Path, local: Make) -> None:
    load_labelled_images(local(folder))
    (folder / "dark" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.source: 1 of 2 images in .* cannot be read \(.*dark/0\.png \(Unid"):
        load_labelled_images(local(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "empty").mkdir(), r"the class folder 'empty' in .* holds no image: fill or remove"),
        (lambda folder: datasets.DatasetDict(a=datasets.Dataset.from_dict({"x": [1]})).save_to_disk(folder), "splits"),
    ],
    ids=["empty class", "several splits"],
)
def test_bad_folders_are_one_clear_error(
    damage: Callable[[Path], Any], message: str, folder: Path, local: Make
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=rf"^data\.source: .*{message}"):
        load_labelled_images(local(folder))


def test_sources_of_the_wrong_kind_are_errors(folder: Path, local: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a file; give the folder"):
        load_labelled_images(local(folder / "dark" / "0.png"))
    with pytest.raises(DataError, match="has no sub-folders: put the images of each class"):
        load_labelled_images(local(folder / "light" / "more"))
    with pytest.raises(DataError, match="does not exist"):
        load_labelled_images(local(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"data\.train_split: belongs to hub data sets"):
        load_labelled_images(local(folder, train_split="all"))


def test_batches_are_made_by_the_processor_of_the_model() -> None:
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    rows = [{"image": Image.new("L", (9, 7), 255), "label": 3}, {"image": Image.new("RGBA", (2, 2)), "label": 0}]
    batch = ImageBatch(processor)(rows)
    assert torch.equal(batch["pixel_values"], torch.ones(2, 3, 4, 4))  # white, also where it is transparent
    assert torch.equal(batch["labels"], torch.tensor([3, 0]))
