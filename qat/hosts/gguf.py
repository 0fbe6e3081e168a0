"""GGUF files, written and read by the package gguf: one file, its metadata, and tensors under names of its own.

What a file calls a tensor, and in which order it holds its rows, depends on the model: a host says so by `places`.
Codes belong to a row, so no order of rows changes them. A place is found again from the file's own metadata.

Floating numbers of one dimension, norms and tables of positions are float32 in a file, as llama.cpp wants them. That
holds every number of a narrower dtype, so they come back as they were.
"""

from __future__ import annotations

import os
import struct
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import ExportError, LoadError, listed
from qat.files.evidence import FrozenRecord, frozen_record
from qat.files.manifest import Manifest, TensorRecord, file_record
from qat.files.shards import DTYPE_NAMES, DTYPES_BY_NAME, Header, TensorEntry, header_faults
from qat.files.trusted import MOST_TEXT
from qat.files.weights import Container, Written
from qat.formats.gguf import BLOCKS
from qat.progress import counted
from qat.tensors import digest

__all__ = ["GgufContainer", "Place", "require_package"]

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The metadata's types by number: the bytes of those of one size.
_STRING, _ARRAY = 8, 9
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_WIDE = ("_norm.weight", "position_embd.weight")


class Place(NamedTuple):
    """Where a tensor of the model lies in a file."""

    tensor: str
    """The file's tensor that holds it; below, its place among several of the model's, whose rows follow each other."""
    part: int = 0
    order: Callable[[int], Tensor] | None = None
    """Of a number of rows, the row of the model's tensor that stands in each place; None: as they are."""
    transposed: bool = False


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file: its type in the file, and the model's tensors in it, with their shapes as stored there."""

    type: str
    parts: list[tuple[str, Place, tuple[int, ...]]]

    @property
    def shape(self) -> tuple[int, ...]:
        _, _, (_, *rest) = self.parts[0]
        return sum(shape[0] for _, _, shape in self.parts), *rest


@dataclass(frozen=True)
class GgufContainer(Container):
    """GGUF files of one model library; abstract."""

    wide: frozenset[torch.dtype] = frozenset()
    """dtypes whose tensors are all float32 in a file, since the library's loader takes them for blocks otherwise."""

    @abstractmethod
    def describe(self, writer: Any, model: Any, directory: Path) -> None:
        """Write the metadata into a ``gguf.GGUFWriter``; `architecture` is its own already."""

    @abstractmethod
    def architecture(self, model: Any) -> str:
        """What GGUF calls the model's architecture."""

    @abstractmethod
    def places(self, shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> dict[str, Place]:
        """Where tensors lie, by the model's names of weights, without ``.blocks``; ``facts`` is the metadata.

        Raises:
            KeyError: a fact is missing, or a tensor has no name in such a file.
        """

    def write(
        self,
        model: nn.Module,
        entries: Sequence[TensorEntry],
        fetch: Callable[[str], Tensor],
        directory: Path,
        max_shard_size: int,
        stem: str,
        progress: bool = False,
    ) -> Written:
        """Into one file, whatever ``max_shard_size``: loaders read no others."""
        gguf, record = require_package(ExportError), frozen_record(model)
        path = directory / f"{stem}.gguf"
        writer = gguf.GGUFWriter(path, self.architecture(model))
        try:
            self.describe(writer, model, directory)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            types = [layer.weights.upper() for layer in record.layers.values()]
            most = max(sorted(set(types)), key=types.count)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
            facts = {key: value.value for key, value in writer.kv_data[0].items()}
            try:
                plan = self._plan({entry.name: (entry.dtype, entry.shape) for entry in entries}, record, facts)
            except KeyError as error:
                raise ExportError(f"model: {error.args[0]}: GGUF has no name for it: use another target") from None
            for name, stored in plan.items():
                shape, kind = stored.shape, gguf.GGMLQuantizationType[stored.type]
                numbers = {"F32": "float32", "F16": "float16"}.get(stored.type, "uint8")
                if stored.type == "BF16":
                    shape = (*shape[:-1], 2 * shape[-1])
                nbytes = torch.Size(shape).numel() * getattr(torch, numbers).itemsize
                writer.add_tensor_info(name, shape, getattr(gguf.quants.np, numbers)(0).dtype, nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            tensors: dict[str, TensorRecord] = {}
            for stored in counted(plan.values(), f"writing {path.name}", progress):
                parts = []
                for key, place, _ in stored.parts:
                    tensor = fetch(key).detach().cpu()
                    form = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
                    tensors[key] = TensorRecord(file=path.name, dtype=form[0], shape=form[1], sha256=digest(tensor))
                    parts.append(_ordered(tensor, place))
                writer.write_tensor_data(_array(torch.cat(parts), stored.type))
        finally:
            writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        try:
            faults = header_faults(self._headers(path, tensors, record), tensors, ())
        except LoadError as error:
            raise ExportError(f"the file was written but does not open again: {error}; check the disk") from error
        if faults:
            raise ExportError(f"the file was written but holds something else: {listed(faults, 3)}; check the disk")
        return {path.name: file_record(path)}, {entry.name: tensors[entry.name] for entry in entries}

    def headers(self, directory: Path, manifest: Manifest) -> dict[str, Header]:
        """Of every file, by the model's names; a tensor that is not what the manifest needs has the file's name."""
        present = {path.name for path in directory.glob(f"{manifest.weights_stem}*.gguf")}
        found: dict[str, Header] = {}
        for name in sorted({tensor.file for tensor in manifest.tensors.values()} | present):
            found |= self._headers(directory / name, manifest.tensors, manifest.frozen)
        return found

    def _headers(self, path: Path, tensors: Mapping[str, TensorRecord], record: FrozenRecord) -> dict[str, Header]:
        """What a file holds, by the model's names where it is what ``tensors`` need, and by its own otherwise."""
        reader, facts = _opened(path)
        held = {tensor.name: tensor for tensor in reader.tensors}
        found: dict[str, Header] = {}
        for name, stored in self._planned(path, tensors, record, facts).items():
            tensor = held.pop(name, None)
            if tensor is None:
                continue
            shape = tuple(tensor.data.shape)
            if tensor.tensor_type.name == "BF16":
                shape = (*shape[:-1], shape[-1] // 2)
            if (tensor.tensor_type.name, shape) != (stored.type, stored.shape):
                told = f"{name} ({tensor.tensor_type.name} {list(shape)}, not {stored.type} {list(stored.shape)})"
                held[told] = tensor
                continue
            for key, _, _ in stored.parts:
                entry = TensorEntry(key, DTYPES_BY_NAME[tensors[key].dtype], tensors[key].shape)
                found[key] = Header(path.name, entry, 0)
        others = {
            name: Header(path.name, TensorEntry(name, torch.uint8, tuple(t.data.shape)), 0) for name, t in held.items()
        }
        return found | others

    def reader(self, directory: Path, manifest: Manifest) -> Callable[[str], Tensor]:
        """Of copies, since rows may have another order in the file."""
        (name,) = {tensor.file for tensor in manifest.tensors.values()}
        reader, facts = _opened(directory / name)
        held = {tensor.name: tensor for tensor in reader.tensors}
        plan = self._planned(directory / name, manifest.tensors, manifest.frozen, facts)
        starts: dict[str, tuple[str, Place, int, int]] = {}
        for name, stored in plan.items():
            start = 0
            for key, place, shape in stored.parts:
                starts[key] = name, place, start, start + shape[0]
                start += shape[0]

        def read(key: str) -> Tensor:
            name, place, start, end = starts[key]
            rows = torch.from_numpy(held[name].data[start:end].copy())
            if held[name].tensor_type.name == "BF16":
                rows = rows.view(torch.bfloat16)
            if place.order is not None:
                rows = rows[place.order(len(rows)).argsort()]
            return (rows.t() if place.transposed else rows).to(DTYPES_BY_NAME[manifest.tensors[key].dtype]).contiguous()

        return read

    def _planned(
        self, path: Path, tensors: Mapping[str, TensorRecord], record: FrozenRecord, facts: Mapping[str, Any]
    ) -> dict[str, _Stored]:
        try:
            return self._plan({key: (DTYPES_BY_NAME[t.dtype], t.shape) for key, t in tensors.items()}, record, facts)
        except (KeyError, ExportError) as error:
            raise LoadError(
                f"{path.name} in {str(path.parent)!r} does not say where its tensors lie ({error}): export it again"
            ) from error

    def _plan(
        self,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        record: FrozenRecord,
        facts: Mapping[str, Any],
    ) -> dict[str, _Stored]:
        names = {key: key.removesuffix(BLOCKS) + "weight" if key.endswith(BLOCKS) else key for key in tensors}
        places = self.places({names[key]: shape for key, (_, shape) in tensors.items()}, facts)
        plan: dict[str, _Stored] = {}
        for key, (dtype, shape) in tensors.items():
            place = places[names[key]]
            if key.endswith(BLOCKS):
                place = place._replace(transposed=False)  # blocks lie along the rows of (out, in), whatever the layer
                kind = record.layers[key.removesuffix(f".{BLOCKS}")].weights.upper()
            elif dtype not in _FLOATS or not shape:
                raise ExportError(f"tensor {key!r} is {dtype} {list(shape)}, for which GGUF files have no place")
            else:
                wide = len(shape) < 2 or place.tensor.endswith(_WIDE) or dtype in self.wide
                kind = "F32" if wide else _FLOATS[dtype]
            stored = plan.setdefault(place.tensor, _Stored(kind, []))
            if stored.type != kind:
                raise ExportError(
                    f"{place.tensor} of a GGUF file holds {stored.parts[0][0]} ({stored.type}) and {key} ({kind}), "
                    "which must be of one type: give all of them the same, or leave all float"
                )
            stored.parts.append((key, place, shape[::-1] if place.transposed else shape))
        for stored in plan.values():
            stored.parts.sort(key=lambda part: part[1].part)
        return plan


def require_package(error: type[Exception]) -> Any:
    """The package gguf; ``error`` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise error("GGUF files need the package gguf: pip install 'qat[gguf]'") from None
    return gguf


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    """A ``gguf.GGUFReader``, and the metadata without its arrays; `LoadError` when the file is not whole."""
    gguf = require_package(LoadError)
    try:
        _check_header(path)
        reader = gguf.GGUFReader(path)
        fields: Iterable[Any] = reader.fields.values()
        return reader, {field.name: field.contents() for field in fields if len(field.types) == 1}
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise LoadError(
            f"{path.name} in {str(path.parent)!r} is not a whole GGUF file: {error}; copy or export it again"
        ) from error


def _check_header(path: Path) -> None:
    """Raise ValueError where a header tells of more than the file has: readers count on it, for hours."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    most = min(path.stat().st_size, MOST_TEXT)
    with path.open("rb") as file:

        def number(form: str) -> int:
            (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
            return int(value)

        def skip(size: int) -> None:
            if size > most - file.tell():
                raise ValueError(f"its header tells of {size} bytes at {file.tell()}, and may end at {most}")
            file.seek(size, os.SEEK_CUR)

        magic, version = file.read(4), number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        tensors, fields = number("<Q"), number("<Q")
        for _ in range(fields):  # each takes bytes, so that a wrong count ends with the file
            skip(number("<Q"))
            kind, count = number("<I"), 1
            if kind == _ARRAY:
                kind, count = number("<I"), number("<Q")
            if kind != _STRING:
                skip(count * _BYTES[kind])
                continue
            for _ in range(count):
                skip(number("<Q"))
        for _ in range(tensors):
            skip(number("<Q"))
            skip(8 * number("<I") + 12)


def _ordered(tensor: Tensor, place: Place) -> Tensor:
    rows = tensor.t() if place.transposed else tensor
    return rows if place.order is None else rows[place.order(len(rows))]


def _array(tensor: Tensor, kind: str) -> Any:
    dtype = {name: dtype for dtype, name in _FLOATS.items()}.get(kind, torch.uint8)
    tensor = tensor.to(dtype).contiguous()
    return (tensor.view(torch.uint8) if kind == "BF16" else tensor).numpy()
