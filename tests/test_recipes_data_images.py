from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from recipes.data import DataError
from recipes.data.images import ImageData, digits, load_images

Make = Callable[..., ImageData]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of one grey each, wider than high, with captions beside them."""
    made = tmp_path / "images"
    made.mkdir()
    for number in range(10):
        Image.new("L", (24, 16), 20 * number).save(made / f"{number}.png")
        (made / f"{number}.txt").write_text(f"grey {number}\n")
    return made


@pytest.fixture
def local(tmp_path: Path) -> Make:
    def make(source: Path | None, **fields: Any) -> ImageData:
        source_text = None if source is None else str(source)
        return ImageData(source=source_text, cache_dir=tmp_path / "cache", **{"size": 8, **fields})

    return make


def greys(part: datasets.Dataset) -> list[int]:
    return [int(np.array(image).mean()) for image in part["image"]]


def test_digits_are_captioned_and_enlarged() -> None:
    found = digits()
    assert len(found) == 1797
    assert found[0]["image"].size == (32, 32)
    assert found[0]["image"].mode == "RGB"
    assert [found[index]["caption"] for index in range(4)] == [
        "the digit zero",
        "a handwritten 1",
        "the number two",
        "a handwritten three",
    ]
    # The pixels are scikit-learn's: the mean survives enlarging.
    from sklearn.datasets import load_digits

    assert np.array(found[7]["image"]).mean() == pytest.approx(load_digits().images[7].mean() * 255 / 16, rel=0.03)


def test_every_template_is_in_both_splits_of_the_digits(local: Make) -> None:
    images = load_images(local(None, size=32, evaluation_images=1000))
    assert (len(images.train), len(images.evaluation)) == (1437, 360)
    assert images.unreadable == ()
    for part in (images.train, images.evaluation):
        kinds = Counter(caption.rsplit(" ", 1)[0] for caption in part["caption"])
        assert set(kinds) == {"the digit", "a handwritten", "the number"}


def test_digits_have_labels_for_pipelines_that_take_these(local: Make) -> None:
    assert load_images(local(None, caption_field="label")).train["caption"][:3] == [1, 2, 3]
    with pytest.raises(DataError, match=r"^data\.caption_field: digits have the columns caption and label, not 'text'"):
        load_images(local(None, caption_field="text"))


def test_a_folder_with_captions_beside_the_images(folder: Path, local: Make) -> None:
    images = load_images(local(folder))
    assert images.evaluation["caption"][:] == ["grey 0", "grey 5"]
    assert images.train["caption"][:] == [f"grey {number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert greys(images.train) == [20 * number for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    assert images.train[0]["image"].size == (8, 8)
    assert images.train[0]["image"].mode == "RGB"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_a_metadata_file(kind: str, folder: Path, local: Make) -> None:
    rows = [{"file_name": f"{number}.png", "text": f"shade {number}"} for number in range(6)]
    lines = ["file_name,text", *(",".join(row.values()) for row in rows)]
    (folder / f"metadata.{kind}").write_text(
        "\n".join(lines if kind == "csv" else [json.dumps(row) for row in rows]) + "\n"
    )
    images = load_images(local(folder, caption_field="text"))
    assert images.evaluation["caption"][:] == ["shade 0", "shade 5"]
    assert greys(images.train) == [20, 40, 60, 80]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_data_set_of_images(kind: str, folder: Path, local: Make, tmp_path: Path) -> None:
    pictures = [str(folder / f"{number}.png") for number in range(10)]
    features = datasets.Features({"picture": datasets.Image(), "said": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"picture": pictures, "said": [f"n{n}" for n in range(10)]}, features=features)
    source = tmp_path / "set"
    if kind == "parquet":
        source.mkdir()
        made.to_parquet(source / "part.parquet")
    else:
        made.save_to_disk(source)
    images = load_images(local(source, image_field="picture", caption_field="said"))
    assert images.evaluation["caption"][:] == ["n0", "n5"]
    assert greys(images.train) == [20 * number for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    with pytest.raises(DataError, match=r"^data\.image_field: .* has no column 'image'; its columns: picture, said"):
        load_images(local(source, caption_field="said"))
    with pytest.raises(DataError, match=r"^data\.image_field: column 'said' must hold images"):
        load_images(local(source, image_field="said", caption_field="said"))


def test_nothing_is_written_into_the_users_folder(folder: Path, local: Make, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [str(folder / f"{number}.png") for number in range(10)], "caption": ["a"] * 10}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    before = sorted((tmp_path / "set").rglob("*"))
    assert greys(load_images(local(tmp_path / "set")).train)[0] == 20
    assert sorted((tmp_path / "set").rglob("*")) == before
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    assert load_images(local(tmp_path / "set", size=16)).train[0]["image"].size == (16, 16)


def test_images_are_upright_and_on_white(tmp_path: Path, local: Make) -> None:
    made = tmp_path / "images"
    made.mkdir()
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # above
    turned = Image.fromarray(half)
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down
    clear = Image.fromarray(np.dstack([half * 0, half[..., 0]]))  # black, opaque above
    palette = Image.fromarray((half[..., 0] > 0).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for number, (picture, options) in enumerate(
        [(turned, {}), (turned, {"exif": exif}), (clear, {}), (palette, {"transparency": 0})]
    ):
        picture.save(made / f"{number}.png", **options)
        (made / f"{number}.txt").write_text("half")
    images = load_images(local(made))
    assert [np.array(image)[:, 0, 1].tolist() for image in images.train["image"]] == [
        [0] * 4 + [255] * 4,
        [0] * 4 + [255] * 4,
        [0] * 4 + [255] * 4,
    ]
    assert np.array(images.evaluation["image"][0])[:, 0, 1].tolist() == [255] * 4 + [0] * 4


def test_the_shorter_side_is_kept_and_the_middle_of_the_longer(tmp_path: Path, local: Make) -> None:
    made = tmp_path / "images"
    made.mkdir()
    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, 12:20] = 200  # the middle of the longer side
    for name in ("a", "b"):
        Image.fromarray(pixels).save(made / f"{name}.png")
        (made / f"{name}.txt").write_text("bar")
    assert greys(load_images(local(made)).train) == [200]


def test_images_that_cannot_be_read_are_left_out_and_named(folder: Path, local: Make) -> None:
    (folder / "3.png").write_bytes(b"nothing")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    images = load_images(local(folder, unreadable_limit=2))
    assert [name.split(" ")[0] for name in images.unreadable] == [str(folder / "3.png"), str(folder / "4.png")]
    assert len(images.train) + len(images.evaluation) == 8
    shown = str(images).splitlines()
    assert shown[0] == "6 images to train on, 2 to evaluate on"
    assert shown[1].startswith(f"left out, as it cannot be read: {folder / '3.png'} (UnidentifiedImageError")
    with pytest.raises(DataError, match=r"unreadable_limit: 2 of 10 images cannot be read, more than 1 .*3\.png"):
        load_images(local(folder, unreadable_limit=1))


def test_a_file_that_changes_is_read_again(folder: Path, local: Make) -> None:
    assert greys(load_images(local(folder)).train)[0] == 20
    Image.new("L", (24, 16), 250).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(0, 0))
    assert greys(load_images(local(folder)).train)[0] == 250


def test_images_are_read_once(folder: Path, local: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_images(local(folder))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("read again"))
    second = load_images(local(folder))
    assert second.train["caption"][:] == first.train["caption"][:]


def test_missing_captions_are_one_error(folder: Path, local: Make) -> None:
    (folder / "2.txt").unlink()
    (folder / "7.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"2 of 10 images in .* have no caption \(first: 2\.png, 7\.png\): write each"):
        load_images(local(folder))
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"file_name": "2.png", "caption": ""}\n')
    with pytest.raises(DataError, match=r"2 of 2 images .* no caption .*: fill the column 'caption'"):
        load_images(local(folder))


def test_an_image_that_is_named_twice_is_an_error(folder: Path, local: Make) -> None:
    rows = [{"file_name": f"{number}.png", "caption": f"{number} {part}"} for part in "ab" for number in (1, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"has 2 rows for images that it already named \(first: 1\.png, 2\.png\): keep"):
        load_images(local(folder))


@pytest.mark.parametrize(
    ("captions", "named", "kind"),
    [
        ([["a"], ["b"]], "list", "folder"),
        ([["a"], ["b"]], "list", "data set"),
        ([0.5, 1.5], "float", "folder"),
        ([True, False], "bool", "data set"),
        (["a", 1], "int and str", "folder"),  # a column of a data set has one type
    ],
    ids=str,
)
def test_captions_of_another_kind_are_an_error(
    captions: list[Any], named: str, kind: str, folder: Path, local: Make, tmp_path: Path
) -> None:
    source = folder
    if kind == "folder":
        rows = [{"file_name": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pictures = [str(folder / f"{number}.png") for number in range(2)]
        made = datasets.Dataset.from_dict({"image": pictures, "caption": captions})
        source = tmp_path / "set"
        made.cast_column("image", datasets.Image()).save_to_disk(source)
    with pytest.raises(DataError, match=f"^data.caption_field: captions must all be .* holds {named}: name another"):
        load_images(local(source))


def test_rows_without_a_caption_are_one_error(folder: Path, local: Make, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [str(folder / "1.png")] * 3, "caption": ["a", None, ""]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"^data\.caption_field: 2 of 3 rows .* have no caption \(first: row 1\)"):
        load_images(local(tmp_path / "set"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "gone.png", "caption": "x"}', "the file_name 'gone.png', which does not exist"),
        ('{"file_name": "../beside.png", "caption": "x"}', "the file_name '../beside.png', which is no file there"),
        ('{"file_name": 1, "caption": "x"}', "the file_name 1, which is no file there"),
        ("not JSON", "cannot be read"),
    ],
    ids=["missing file", "outside", "number", "not JSON"],
)
def test_a_metadata_file_that_is_wrong(content: str, message: str, folder: Path, local: Make) -> None:
    (folder / "metadata.jsonl").write_text(content)
    (folder.parent / "beside.png").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(DataError, match=message):
        load_images(local(folder))


def test_sources_that_are_none(folder: Path, local: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give a path"):
        load_images(ImageData(source="./nowhere"))
    with pytest.raises(DataError, match=r"no local path, and split 'train' of a hub data set of that name could not"):
        load_images(ImageData(source="nobody/nothing", cache_dir=tmp_path))
    with pytest.raises(DataError, match="is a file; give the folder"):
        load_images(local(folder / "1.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image .* and no Parquet file"):
        load_images(local(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"^data\.train_split: belongs to hub data sets, but .*remove 'x'"):
        load_images(local(folder, train_split="x"))


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn, which is not installed: run pip install 'qat\[digits\]'"):
        digits()
