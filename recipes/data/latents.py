"""Latents and conditioning of a set of images: encoded once by a pipeline, kept on disk, without it afterwards.

What a transformer needs of an image is a few thousand numbers, of a caption some more; the encoders that make them are
often larger than the transformer itself. So each image and each caption is encoded once, written into safetensors
files under a fingerprint of everything that the result depends on, and mapped from there; then the encoders can go.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qat.files.whole import whole_directory
from recipes.data import DataError
from recipes.data.conditioning import Conditioner
from recipes.data.files import require_file
from recipes.data.images import ImageData, Images
from recipes.data.templates import Rows, Template

if TYPE_CHECKING:
    import datasets

__all__ = ["Encoded", "Latents", "encode", "fingerprint", "release_encoders"]

Track: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows progress: of these items, under that name, so many."""

_VERSION = "2"  # of what the files hold
_SHARD = 64  # captions or images a file
_BATCH = 16  # images that are encoded at once, where they are no more than so many pixels:
_PIXELS = 2**20
_SMALL = 2**20  # files up to so many bytes are hashed, larger ones are known by size and time


class Latents(Dataset[dict[str, Any]]):
    """Encoded images: ``{"latents": Tensor, "rows": Rows}`` each; what captions share is kept once."""

    def __init__(self, latents: Sequence[Tensor], captions: Sequence[Rows], caption_of: Sequence[int]) -> None:
        self._latents, self._captions, self._caption_of = latents, captions, caption_of

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"latents": self._latents[index], "rows": self._captions[self._caption_of[index]]}


@dataclass(frozen=True)
class Encoded:
    """All that diffusion training needs of a pipeline and a set of images."""

    train: Latents
    evaluation: Latents
    template: Template
    empty: Rows | None
    """No caption, for caption dropout; none where the pipeline has no such thing."""
    guided: bool
    """Whether the pipeline runs its transformer with and without a caption."""


def fingerprint(folder: Path) -> str:
    """Name what a pipeline's encoders compute by its files, of the transformer's only those that are no weights.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     _ = Path(name, "model_index.json").write_text("{}")
    ...     len(fingerprint(Path(name)))
    64
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name.startswith("transformer/") and not name.endswith(".json"):
            continue
        facts = file.stat()
        content = file.read_bytes() if facts.st_size <= _SMALL else f"{facts.st_size} {facts.st_mtime_ns}".encode()
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def encode(
    pipeline: Any,
    images: Images,
    data: ImageData,
    *,
    max_sequence_length: int | None = None,
    key: str = "",
    track: Track = lambda items, *_: items,
) -> Encoded:
    """Encode all images and captions with a pipeline, or take them from the cache.

    Args:
        pipeline: with its encoders and its autoencoder, on the device where they run; its transformer, which runs for
            one step of one caption, may be on another.
        images: what `load_images` returned for ``data``.
        data: the size, and where the cache is.
        max_sequence_length: tokens a caption; none: the pipeline's own default.
        key: `fingerprint` of the pipeline's folder.
        track: shows progress.

    Raises:
        ExportError: the cache cannot be written.
        DataError: the pipeline cannot be run at this size, its autoencoder does not fit its transformer, a label is
            none that the transformer knows, or the cache is damaged.
        torch.OutOfMemoryError: the device is too small.
    """
    parts = {"train": images.train, "evaluation": images.evaluation}
    captions = {name: part["caption"][:] for name, part in parts.items()}
    distinct = list(dict.fromkeys([*captions["train"], *captions["evaluation"]]))
    # The last one is the longest text or the largest label, which the transformer is tried with.
    by_length = sorted(distinct, key=lambda caption: (len(str(caption)), str(caption)))
    conditioner = Conditioner(pipeline, data.size, max_sequence_length, (by_length[-1], by_length[0]))
    first = conditioner.rows(by_length[-1])
    if not conditioner.takes_text and conditioner.empty is not None and _equal(first, conditioner.empty):
        raise DataError(
            f"data.caption_field: {by_length[-1]!r} is what {type(pipeline).__name__} passes for no label: name a "
            "column of labels that the model knows"
        )
    to_latents = _Autoencoder(pipeline, conditioner.template, data.size)
    to_latents(images.evaluation[:1]["image"])  # one that does not fit is an error before any work

    dtypes = {path: str(tensor.dtype) for path, tensor in first.items()}  # also of what the pipeline is loaded in
    content = [_VERSION, key, str(data.size), str(max_sequence_length), repr(distinct), *map(_pixels, parts.values())]
    content += [*map(_version, ("diffusers", "transformers")), repr(sorted(dtypes.items())), str(to_latents.dtype)]
    folder = _cache_folder(data) / hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]
    if not folder.exists():
        with whole_directory(folder) as making:  # in which a faster process has the same content
            _write_captions(making, conditioner, distinct, track)
            for name, part in parts.items():
                _write_latents(making, name, part, to_latents, data.size, track)
    rows = _read(folder, "captions", len(distinct), _unnamed)
    numbers = {caption: number for number, caption in enumerate(distinct)}
    encoded = {
        name: Latents(
            _read(folder, name, len(part), lambda shard: list(shard["latents"])),
            rows,
            [numbers[caption] for caption in captions[name]],
        )
        for name, part in parts.items()
    }
    return Encoded(encoded["train"], encoded["evaluation"], conditioner.template, conditioner.empty, conditioner.guided)


def release_encoders(pipeline: Any) -> None:
    """Drop every module of a pipeline but its transformer, and give their memory back."""
    for name, part in dict(pipeline.components).items():
        if isinstance(part, nn.Module) and name != "transformer":
            pipeline.register_modules(**{name: None})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Autoencoder:
    """Turns pictures into the latents that the transformer takes, scaled and packed as the pipeline does it."""

    def __init__(self, pipeline: Any, template: Template, size: int) -> None:
        vae = getattr(pipeline, "vae", None)
        if not isinstance(vae, nn.Module):
            raise DataError(f"model: {type(pipeline).__name__} has no vae, so images cannot become latents")
        self._vae: Any = vae
        self._config: Any = getattr(vae, "config", None)
        self._template, self._size = template, size
        self._pack = getattr(pipeline, "_pack_latents", None)
        self._names = f"{type(vae).__name__} and {type(pipeline.transformer).__name__}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the autoencoder."""
        found: torch.dtype = next(self._vae.parameters()).dtype
        return found

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Any]) -> Tensor:
        parameter = next(self._vae.parameters())
        pixels = torch.stack([_to_tensor(picture) for picture in pictures]).to(parameter.device, parameter.dtype)
        if hasattr(self._config, "temperal_downsample"):  # an autoencoder of videos (the name is diffusers' own)
            pixels = pixels.unsqueeze(2)
        try:
            encoded = self._vae.encode(pixels)
            latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
            shown = tuple(latents.shape[1:])
            latents = self._scaled(latents)
            if self._pack is not None:
                batch, channels, (height, width) = latents.shape[0], latents.shape[1], latents.shape[-2:]
                latents = self._pack(latents, batch, channels, height, width)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"not enough memory on {parameter.device} to encode {len(pictures)} images at data.size {self._size}: "
                f"give a smaller data.size or a device with more memory ({error})"
            ) from error
        except RuntimeError as error:
            raise DataError(f"model: {self._names} do not fit at data.size {self._size}: {error}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # of a layout of its own
            raise DataError(
                f"model: this pipeline's latents are not understood ({self._names}; {type(error).__name__}: {error}): "
                "give a pipeline with an autoencoder as Flux, Stable Diffusion 3, PixArt or Sana have"
            ) from error
        if tuple(latents.shape[1:]) != self._template.sample_shape:
            raise DataError(
                f"model: {self._names} do not fit at data.size {self._size}: the one makes latents of shape {shown}, "
                f"{tuple(latents.shape[1:])} as the pipeline packs them, and the other takes "
                f"{self._template.sample_shape}: give a pipeline whose parts belong together, or its own data.size"
            )
        result: Tensor = latents.float().cpu()
        return result

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = (getattr(self._config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and deviation is not None:
            shape = (1, -1, *(1,) * (latents.ndim - 2))
            return (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(deviation).view(shape)
        shift: float = getattr(self._config, "shift_factor", None) or 0.0
        scaling: float = self._config.scaling_factor
        return (latents - shift) * scaling


def _to_tensor(picture: Any) -> Tensor:
    """Pixels as (3, height, width) in [-1, 1]."""
    import numpy

    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


# -- the cache ---------------------------------------------------------------------------------------------------------


def _cache_folder(data: ImageData) -> Path:
    import datasets

    return Path(data.cache_dir or datasets.config.HF_DATASETS_CACHE) / "qat-latents"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _equal(one: Rows, two: Rows) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)


def _pixels(part: datasets.Dataset) -> str:
    """A digest of the images, as they are stored: after decoding and resizing, in a format without loss."""
    from datasets import Image

    digest = hashlib.sha256()
    for row in part.cast_column("image", Image(decode=False)):
        digest.update(row["image"]["bytes"])
    return digest.hexdigest()


def _write_captions(folder: Path, conditioner: Conditioner, captions: Sequence[Any], track: Track) -> None:
    pending: list[Rows] = []
    for number, caption in enumerate(track(captions, "encoding captions", len(captions)), 1):
        pending.append(conditioner.rows(caption))
        if len(pending) == _SHARD or number == len(captions):
            named = {f"{index:03}.{path}": tensor for index, row in enumerate(pending) for path, tensor in row.items()}
            _write(folder, "captions", number, named)
            pending = []


def _write_latents(
    folder: Path, name: str, part: datasets.Dataset, encoder: _Autoencoder, size: int, track: Track
) -> None:
    batch = max(1, min(_BATCH, _PIXELS // size**2))
    starts = range(0, len(part), batch)
    pending: list[Tensor] = []
    for start in track(starts, f"encoding images: {name}", len(starts)):
        stop = min(start + batch, len(part))
        pending.append(encoder(part[start:stop]["image"]))
        if sum(map(len, pending)) >= _SHARD or stop == len(part):
            _write(folder, name, stop, {"latents": torch.cat(pending)})
            pending = []


def _write(folder: Path, name: str, number: int, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}-{number:08}.safetensors")


def _read(folder: Path, name: str, count: int, unpack: Callable[[dict[str, Tensor]], list[Any]]) -> list[Any]:
    """What the shards hold, in order, its tensors mapped from the files; a shard's name says how much there is then."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: list[Any] = []
    last = file = folder / f"{name}-{count:08}.safetensors"
    try:
        for file in sorted({last, *folder.glob(f"{name}-*.safetensors")}):
            require_file(file)
            found += unpack(load_file(file))
            if file.name != f"{name}-{len(found):08}.safetensors":
                raise ValueError(f"a file is missing, or there is one too many: {len(found)} of {count} were found")
    except (DataError, OSError, LookupError, ValueError, SafetensorError) as error:
        raise DataError(
            f"data.cache_dir: {str(file)!r} is damaged ({error}): remove the folder it is in, which is then made again"
        ) from error
    return found


def _unnamed(shard: Mapping[str, Tensor]) -> list[Rows]:
    rows: dict[str, Rows] = {}
    for name, tensor in shard.items():
        index, _, path = name.partition(".")
        rows.setdefault(index, {})[path] = tensor
    return [rows[index] for index in sorted(rows)]
