from __future__ import annotations

import errno
import gc
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qat.errors import ExportError
from recipes.data import DataError
from recipes.data.images import ImageData, Images, load_images
from recipes.data.latents import Encoded, encode, fingerprint, release_encoders
from tests.pipelines import PIPELINES, autoencoder, caption_of, make, size_of

# diffusers' own conversion of tensors, with the newest numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
Load = Callable[[str], tuple[Images, ImageData]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Twelve images of noise, with captions that a pipeline of that name takes."""

    def made(name: str) -> tuple[Images, ImageData]:
        size, folder = size_of(name), tmp_path / "images"
        folder.mkdir(exist_ok=True)
        draw = np.random.default_rng(0)
        for number in range(12):
            Image.fromarray(draw.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{number:02}.png")
            (folder / f"{number:02}.txt").write_text(str(caption_of(name, number % 3)))
        data = ImageData(source=str(folder), size=size, cache_dir=tmp_path / "cache")
        return load_images(data), data

    return made


def encoded_by(name: str, load: Load, pipeline: Any = None, key: str = "key", **options: Any) -> tuple[Encoded, Images]:
    images, data = load(name)
    made = make(name) if pipeline is None else pipeline
    return encode(made, images, data, max_sequence_length=12, key=f"{name} {key}", **options), images


@torch.no_grad()
def latents_by_hand(name: str, pipeline: Any, image: Any) -> torch.Tensor:
    pixels = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    vae = pipeline.vae
    if name == "sana":
        return (vae.encode(pixels).latent * vae.config.scaling_factor)[0]
    latents = vae.encode(pixels).latent_dist.mode()
    latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    if name.startswith(("flux", "chroma")):
        return pipeline._pack_latents(latents, 1, *latents.shape[1:])[0]  # type: ignore[no-any-return]
    return latents[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_are_what_the_pipeline_decodes(name: str, load: Load) -> None:
    pipeline = make(name)
    encoded, images = encoded_by(name, load, pipeline)
    assert (len(encoded.train), len(encoded.evaluation)) == (9, 3)
    for examples, pictures in ((encoded.train, images.train), (encoded.evaluation, images.evaluation)):
        for number in (0, len(pictures) - 1):
            expected = latents_by_hand(name, pipeline, pictures[number]["image"])
            torch.testing.assert_close(examples[number]["latents"], expected, rtol=1e-4, atol=1e-5)
            assert examples[number]["latents"].shape == encoded.template.sample_shape


def test_latents_come_back_as_the_image(load: Load) -> None:
    """Through the pipeline's own way from latents to an image: shift, scale and packing are undone there."""
    pipeline = make("flux")
    encoded, images = encoded_by("flux", load, pipeline)
    example = encoded.evaluation[0]
    unpacked = pipeline._unpack_latents(example["latents"][None], 16, 16, pipeline.vae_scale_factor)
    latents = unpacked / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    pixels = torch.tensor(np.array(images.evaluation[0]["image"]), dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


def test_each_image_has_the_rows_of_its_caption(load: Load) -> None:
    encoded, images = encoded_by("flux", load)
    rows = [example["rows"] for example in (encoded.train[index] for index in range(9))]
    captions = images.train["caption"][:]
    for first in range(9):
        for second in range(9):
            same = torch.equal(rows[first]["pooled_projections"], rows[second]["pooled_projections"])
            assert same == (captions[first] == captions[second])


def test_the_second_time_comes_from_the_cache(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def track(items: Any, description: str, total: int) -> Any:
        seen.append((description, total))
        return items

    first, _ = encoded_by("flux", load, track=track)
    assert seen == [("encoding captions", 3), ("encoding images: train", 1), ("encoding images: evaluation", 1)]
    pipeline, runs = make("flux"), []
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels, old=pipeline.vae.encode: runs.append(1) or old(pixels))
    second, _ = encoded_by("flux", load, pipeline, track=track)
    assert len(seen) == 3
    assert len(runs) == 1  # whether it fits is tried every time
    for a, b in ((first.train, second.train), (first.evaluation, second.evaluation)):
        assert all(torch.equal(a[i]["latents"], b[i]["latents"]) for i in range(len(a)))
        assert all(torch.equal(a[i]["rows"][p], b[i]["rows"][p]) for i in range(len(a)) for p in a[i]["rows"])


@pytest.mark.parametrize("change", ["pipeline", "image", "caption", "length", "library", "dtype"])
def test_whatever_changes_is_encoded_again(
    change: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_by("flux", load)
    images, data = load("flux")
    if change == "image":
        Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "images" / "04.png")
    if change == "caption":
        (tmp_path / "images" / "04.txt").write_text("a number seven")
    if change == "library":
        monkeypatch.setattr("recipes.data.latents.version", lambda _: "99.0")
    images = load_images(data)
    seen: list[str] = []
    pipeline = make("flux")
    if change == "dtype":
        pipeline.to(torch.bfloat16)
    encode(
        pipeline,
        images,
        data,
        max_sequence_length=11 if change == "length" else 12,
        key="other" if change == "pipeline" else "flux key",
        track=lambda items, description, _: seen.append(description) or items,  # type: ignore[func-returns-value]
    )
    assert len(seen) == 3


def test_a_stopped_run_leaves_no_half_cache(load: Load, tmp_path: Path) -> None:
    def stop(items: Any, description: str, total: int) -> Any:
        if description != "encoding captions":
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt):
        encoded_by("flux", load, track=stop)
    assert not list((tmp_path / "cache" / "qat-latents").iterdir())
    assert len(encoded_by("flux", load)[0].train) == 9


def test_a_process_that_was_slower_takes_what_the_other_made(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def late(made: Path, folder: Path) -> Path:
        if not folder.exists():
            shutil.copytree(made, folder)
        return rename(made, folder)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", late)
        first, _ = encoded_by("flux", load)
    second, _ = encoded_by("flux", load)
    assert all(torch.equal(first.train[i]["latents"], second.train[i]["latents"]) for i in range(9))


def test_a_folder_that_cannot_be_renamed_is_an_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(made: Path, folder: Path) -> Path:
        raise PermissionError(errno.EACCES, "not here")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="could not be written, and nothing is left of it: Permission denied"):
        encoded_by("flux", load)


@pytest.mark.parametrize(("pixels", "sizes"), [(16 * 16 * 4, [4, 4, 1]), (1, [1] * 9)], ids=["four", "fewer than one"])
def test_images_are_encoded_by_their_pixels(
    pixels: int, sizes: list[int], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = encoded_by("flux", load, key="one batch")
    monkeypatch.setattr("recipes.data.latents._PIXELS", pixels)
    monkeypatch.setattr("recipes.data.latents._SHARD", 5)
    pipeline, seen = make("flux"), []
    monkeypatch.setattr(
        pipeline.vae, "encode", lambda images, old=pipeline.vae.encode: seen.append(len(images)) or old(images)
    )
    parts, _ = encoded_by("flux", load, pipeline)
    assert seen[1 : 1 + len(sizes)] == sizes
    assert len(parts.train) == 9
    for index in range(9):
        torch.testing.assert_close(parts.train[index]["latents"], whole.train[index]["latents"])


def test_a_device_that_is_too_small_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    pipeline = make("flux")
    monkeypatch.setattr(pipeline.vae, "encode", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"memory on cpu to encode 1 images at data\.size 16: .* 9 GiB"):
        encoded_by("flux", load, pipeline)


@pytest.mark.parametrize("change", ["pack", "scaling", "encode"])
def test_latents_of_another_layout_are_an_error(change: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make("sd3")  # packs none itself
    if change == "pack":
        monkeypatch.setattr(pipeline, "_pack_latents", lambda latents, patch_size, patch_size_t: latents, raising=False)
    if change == "scaling":
        pipeline.vae._internal_dict = {"shift_factor": 0.0}
    if change == "encode":
        monkeypatch.setattr(pipeline.vae, "encode", lambda _: SimpleNamespace(codes=0))
    with pytest.raises(DataError, match=r"^model: this pipeline's latents are not understood \(AutoencoderKL and SD3"):
        encoded_by("sd3", load, pipeline)


@pytest.mark.parametrize(
    ("label", "message"),
    [(1001, "embeddings for the numbers 0 to 1000, and was given 1001"), (1000, "1000 is what DiTPipeline passes for")],
)
def test_a_label_that_the_model_does_not_know_is_an_error(label: int, message: str, load: Load) -> None:
    images, data = load("dit")
    labels = [3, label, *[5] * (len(images.train) - 2)]
    train = images.train.remove_columns("caption").add_column("caption", labels)
    with pytest.raises(DataError, match=rf"^data\.caption_field: .*{message}"):
        encode(make("dit"), replace(images, train=train), data, key="dit")


@pytest.mark.parametrize("damage", ["cut", "missing", "one more", "pipe"])
def test_a_damaged_cache_is_an_error_that_says_what_to_remove(damage: str, load: Load, tmp_path: Path) -> None:
    encoded_by("flux", load)
    file = next((tmp_path / "cache" / "qat-latents").glob("*/train-*.safetensors"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "one more":
        shutil.copy(file, file.with_name("train-00000001.safetensors"))
    else:
        file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    with pytest.raises(DataError, match=r"data\.cache_dir: .*train-.* is damaged .*: remove the folder it is in"):
        encoded_by("flux", load)


def test_released_encoders_are_gone_from_memory(load: Load) -> None:
    pipeline = make("flux")
    encoded, _ = encoded_by("flux", load, pipeline)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    references = {name: weakref.ref(part) for name, part in parts.items()}
    del parts
    release_encoders(pipeline)
    gc.collect()
    assert [name for name, reference in references.items() if reference() is not None] == ["transformer"]
    assert len(encoded.train) == 9  # and what was made of them is still there
    assert torch.isfinite(encoded.train[0]["latents"]).all()


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        ({"channels": 8}, r"the one makes latents of shape \(8, 8, 8\), \(16, 32\) as the pipeline packs them, and"),
        (
            {"channels": 2},
            r"latents of shape \(2, 8, 8\), \(16, 8\) as the pipeline packs .* the other takes \(16, 16\)",
        ),
    ],
    ids=["too many channels", "too few"],
)
def test_an_autoencoder_that_does_not_fit_is_an_error(vae: dict[str, int], message: str, load: Load) -> None:
    pipeline = make("flux")
    pipeline.register_modules(vae=autoencoder(**vae, shift_factor=0.0))
    with pytest.raises(DataError, match=rf"^model: AutoencoderKL and FluxTransformer2DModel do not fit .*{message}"):
        encoded_by("flux", load, pipeline)


def test_a_pipeline_without_an_autoencoder_is_an_error(load: Load) -> None:
    pipeline = make("flux")
    pipeline.vae = None
    with pytest.raises(DataError, match="FluxPipeline has no vae, so images cannot become latents"):
        encoded_by("flux", load, pipeline)


def test_a_size_that_the_transformer_cannot_take_is_an_error(load: Load) -> None:
    images, data = load("sana")  # of 32 pixels
    with pytest.raises(DataError, match=r"do not fit at data\.size 32: the one makes latents of shape \(4, 16, 16\)"):
        encode(make("dit"), replace(images, **_labelled(images)), data, key="dit")


def _labelled(images: Images) -> dict[str, Any]:
    return {
        name: part.remove_columns("caption").add_column("caption", [1] * len(part))
        for name, part in (("train", images.train), ("evaluation", images.evaluation))
    }


def test_the_fingerprint_follows_every_file_but_the_transformers_weights(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    files = ["model_index.json", "vae/weights.safetensors", "transformer/config.json"]
    for name in [*files, "transformer/weights.safetensors"]:
        (tmp_path / name).write_text("a")
    found = {fingerprint(tmp_path)}
    for name in files:
        (tmp_path / name).write_text("b")
        found.add(fingerprint(tmp_path))
    assert len(found) == 4
    (tmp_path / "transformer/weights.safetensors").write_text("b")
    assert fingerprint(tmp_path) in found
