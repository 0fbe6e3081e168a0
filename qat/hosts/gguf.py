"""GGUF files, written and read by the package gguf: one file, its metadata, and tensors under names of its own.

What a file calls a tensor, and in which order it holds its rows, depends on the model: a host says so by `places`.
Codes belong to a row, so no order of rows changes them. A place is found again from the file's own metadata.

Floating numbers of one dimension, norms and tables of positions are float32 in a file, as llama.cpp wants them. That
holds every number of a narrower dtype, so they come back as they were.
"""

from __future__ import annotations

import os
import struct
import tempfile
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


_IN_FLOAT32 = ("_norm.weight", "position_embd.weight")


class _Kind(NamedTuple):
    """A number type of a file: its numbers, and what the package gguf takes and gives for them."""

    dtype: torch.dtype
    stored: torch.dtype

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] * self.dtype.itemsize // self.stored.itemsize)


_FLOATS = {
    "F32": _Kind(torch.float32, torch.float32),
    "F16": _Kind(torch.float16, torch.float16),
    "BF16": _Kind(torch.bfloat16, torch.uint8),
}
_BYTES = _Kind(torch.uint8, torch.uint8)  # of blocks
_FLOAT_NAMES = {kind.dtype: name for name, kind in _FLOATS.items()}
# The metadata's types by number: the bytes of those of one size.
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


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
    def kind(self) -> _Kind:
        return _FLOATS.get(self.type, _BYTES)

    @property
    def shape(self) -> tuple[int, ...]:
        _, _, (_, *rest) = self.parts[0]
        return sum(shape[0] for _, _, shape in self.parts), *rest


@dataclass(frozen=True)
class GgufContainer(Container):
    """GGUF files of one model library; abstract."""

    stored_as_float32: frozenset[torch.dtype] = frozenset()
    """dtypes whose tensors are float32 in a file: the library's loader would take them for blocks."""

    @abstractmethod
    def describe(self, writer: Any, model: Any, directory: Path) -> None:
        """Write the metadata into a ``gguf.GGUFWriter``; `architecture` is its own already."""

    @abstractmethod
    def architecture(self, model: Any) -> str:
        """What GGUF calls the model's architecture."""

    @abstractmethod
    def places(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]) -> dict[str, Place]:
        """Where tensors lie, by the model's names of weights, without ``.blocks``; ``metadata`` is that of the file.

        Raises:
            KeyError: a field is missing, or a tensor has no name in such a file.
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
        writer = self._writer(path, model, record, directory)
        try:
            metadata = {key: value.value for key, value in writer.kv_data[0].items()}
            try:
                plan = self._plan({entry.name: (entry.dtype, entry.shape) for entry in entries}, record, metadata)
            except KeyError as error:
                raise ExportError(f"model: {error.args[0]}: GGUF has no name for it: use another target") from None
            for name, stored in plan.items():
                kind = stored.kind
                shape, of_numpy = kind.stored_shape(stored.shape), torch.empty(0, dtype=kind.stored).numpy().dtype
                nbytes = torch.Size(shape).numel() * of_numpy.itemsize
                writer.add_tensor_info(name, shape, of_numpy, nbytes, gguf.GGMLQuantizationType[stored.type])
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
                numbers = torch.cat(parts).to(stored.kind.dtype).contiguous()
                writer.write_tensor_data(numbers.view(stored.kind.stored).numpy())
        finally:
            writer.close()
        try:
            faults = header_faults(self._headers(path, tensors, record), tensors, ())
        except LoadError as error:
            raise ExportError(f"the file was written but does not open again: {error}; check the disk") from error
        if faults:
            raise ExportError(f"the file was written but holds something else: {listed(faults, 3)}; check the disk")
        return {path.name: file_record(path)}, {entry.name: tensors[entry.name] for entry in entries}

    def _writer(self, path: Path, model: Any, record: FrozenRecord, directory: Path) -> Any:
        """A ``gguf.GGUFWriter`` that knows all metadata."""
        gguf = require_package(ExportError)
        writer = gguf.GGUFWriter(path, self.architecture(model))
        self.describe(writer, model, directory)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        types = [layer.weights.upper() for layer in record.layers.values()]
        most = max(sorted(set(types)), key=types.count)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
        return writer

    def metadata_faults(self, model: nn.Module, directory: Path, manifest: Manifest) -> list[str]:
        """Each field that is not what `describe` writes of the model's configuration and of the tokenizer."""
        name = f"{manifest.weights_stem}.gguf"
        with tempfile.TemporaryDirectory() as folder:
            try:
                writer = self._writer(Path(folder) / name, model, manifest.frozen, directory)
            except Exception as error:  # whatever is wrong with the JSON files that it reads
                return [f"the metadata of {name} cannot be written again: {type(error).__name__}: {error}"]
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            wanted, found = _metadata(Path(folder) / name), _metadata(directory / name)
        missing = _Field(b"", "missing")
        pairs = {
            key: (found.get(key, missing), wanted.get(key, missing)) for key in sorted(wanted.keys() | found.keys())
        }
        return [
            f"{key} of {name} is {is_.shown}, and config.json and the tokenizer say {said.shown}"
            for key, (is_, said) in pairs.items()
            if is_.content != said.content
        ]

    def headers(self, directory: Path, manifest: Manifest) -> dict[str, Header]:
        """Of every file, by the model's names; a tensor that is not what the manifest needs has the file's name."""
        present = {path.name for path in directory.glob(f"{manifest.weights_stem}*.gguf")}
        found: dict[str, Header] = {}
        for name in sorted({tensor.file for tensor in manifest.tensors.values()} | present):
            found |= self._headers(directory / name, manifest.tensors, manifest.frozen)
        return found

    def _headers(self, path: Path, tensors: Mapping[str, TensorRecord], record: FrozenRecord) -> dict[str, Header]:
        """What a file holds, by the model's names where it is what ``tensors`` need, and by its own otherwise."""
        reader, metadata = _opened(path)
        held = {tensor.name: tensor for tensor in reader.tensors}
        found: dict[str, Header] = {}
        for name, stored in self._planned(path, tensors, record, metadata).items():
            tensor = held.pop(name, None)
            if tensor is None:
                continue
            shape = tuple(tensor.data.shape)
            if (tensor.tensor_type.name, shape) != (stored.type, stored.kind.stored_shape(stored.shape)):
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
        names = sorted({tensor.file for tensor in manifest.tensors.values()})
        if len(names) != 1:
            raise LoadError(
                f"{str(directory)!r} must have one GGUF file, and its manifest names {names}: export it again"
            )
        name = names[0]
        reader, metadata = _opened(directory / name)
        held = {tensor.name: tensor for tensor in reader.tensors}
        plan = self._planned(directory / name, manifest.tensors, manifest.frozen, metadata)
        starts: dict[str, tuple[str, Place, int, int]] = {}
        for name, stored in plan.items():
            start = 0
            for key, place, shape in stored.parts:
                starts[key] = name, place, start, start + shape[0]
                start += shape[0]

        def read(key: str) -> Tensor:
            name, place, start, end = starts[key]
            rows = torch.from_numpy(held[name].data[start:end].copy()).view(plan[name].kind.dtype)
            if place.order is not None:
                rows = rows[place.order(len(rows)).argsort()]
            return (rows.t() if place.transposed else rows).to(DTYPES_BY_NAME[manifest.tensors[key].dtype]).contiguous()

        return read

    def _planned(
        self, path: Path, tensors: Mapping[str, TensorRecord], record: FrozenRecord, metadata: Mapping[str, Any]
    ) -> dict[str, _Stored]:
        try:
            return self._plan({key: (DTYPES_BY_NAME[t.dtype], t.shape) for key, t in tensors.items()}, record, metadata)
        except (KeyError, ExportError) as error:
            raise LoadError(
                f"{path.name} in {str(path.parent)!r} does not say where its tensors lie ({error}): export it again"
            ) from error

    def _plan(
        self,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        record: FrozenRecord,
        metadata: Mapping[str, Any],
    ) -> dict[str, _Stored]:
        names = {key: key.removesuffix(BLOCKS) + "weight" if key.endswith(BLOCKS) else key for key in tensors}
        places = self.places({names[key]: shape for key, (_, shape) in tensors.items()}, metadata)
        plan: dict[str, _Stored] = {}
        for key, (dtype, shape) in tensors.items():
            place = places[names[key]]
            if key.endswith(BLOCKS):
                place = place._replace(transposed=False)  # blocks lie along the rows of (out, in), whatever the layer
                kind = record.layers[key.removesuffix(f".{BLOCKS}")].weights.upper()
            elif dtype not in _FLOAT_NAMES or not shape:
                raise ExportError(f"tensor {key!r} is {dtype} {list(shape)}, for which GGUF files have no place")
            else:
                wanted = len(shape) < 2 or place.tensor.endswith(_IN_FLOAT32) or dtype in self.stored_as_float32
                kind = "F32" if wanted else _FLOAT_NAMES[dtype]
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
        end = reader.data_offset
        for tensor in reader.tensors:  # llama.cpp asks for this, too
            if tensor.data_offset != end:
                raise ValueError(f"tensor {tensor.name} begins at byte {tensor.data_offset} instead of {end}")
            end += -(-tensor.n_bytes // reader.alignment) * reader.alignment
        fields: Iterable[Any] = reader.fields.values()
        return reader, {field.name: field.contents() for field in fields if len(field.types) == 1}
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise LoadError(
            f"{path.name} in {str(path.parent)!r} is not a whole GGUF file: {error}; copy or export it again"
        ) from error


class _Field(NamedTuple):
    """A field of a file's metadata: its type and value as they are stored, and for readers."""

    content: bytes
    shown: str


def _metadata(path: Path) -> dict[str, _Field]:
    """All metadata, and the version of the file; numbers of tensors and fields are no metadata."""
    reader, _ = _opened(path)
    return {
        name: _Field(
            b"".join(part.tobytes() for part in field.parts),
            repr(field.contents()) if len(field.types) == 1 else f"a list of {len(field.data)}",
        )
        for name, field in reader.fields.items()
        if name not in ("GGUF.tensor_count", "GGUF.kv_count")
    }


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
                skip(count * _SIZES[kind])
                continue
            for _ in range(count):
                skip(number("<Q"))
        for _ in range(tensors):
            skip(number("<Q"))
            skip(8 * number("<I") + 12)


def _ordered(tensor: Tensor, place: Place) -> Tensor:
    rows = tensor.t() if place.transposed else tensor
    return rows if place.order is None else rows[place.order(len(rows))]
