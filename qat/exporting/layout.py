"""Where every tensor lies in a safetensors file, and how it gets there.

Kernels that read packed weights want them aligned: on CPU ``torch._weight_int8pack_mm`` crashes or answers wrongly
when the codes do not start on a 16-byte boundary, and stock loaders hand out views of the memory-mapped file, so that
the file's own offsets decide. Here every *code tensor* (its key ends in ``_data``) starts on a 64-byte boundary.

The format allows neither holes nor padding tensors (a loader would report unexpected keys), only a header that may be
filled with spaces. So alignment is a matter of order:

1. tensors whose size is a multiple of 64 bytes (nearly all codes) follow one another;
2. a code tensor of another size is filled up to the next multiple of 64 with small tensors that the file holds anyway
   (scales, biases, the scalar activation scales): a subset sum on residues modulo 64;
3. what nothing fills up ends its shard. A file is therefore sometimes cut in two below ``max_shard_size``; a code
   tensor with an odd number of bytes always costs this, for no two-byte or four-byte tensor can mend an odd offset.

Planning is pure: it sees names, dtypes and shapes. Writing streams one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat.errors import ExportError

__all__ = [
    "ALIGNMENT",
    "DTYPE_NAMES",
    "Shard",
    "TensorEntry",
    "WrittenFile",
    "parse_size",
    "plan_shards",
    "raw_bytes",
    "read_header",
    "shard_names",
    "write_shard",
]

ALIGNMENT = 64
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_UNITS = {"": 1, "B": 1, **{f"{k}B": 1000 ** (i + 1) for i, k in enumerate("KMGT")}}
_UNITS |= {f"{k}IB": 1024 ** (i + 1) for i, k in enumerate("KMGT")}


@dataclass(frozen=True)
class TensorEntry:
    """What planning needs to know of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_code(self) -> bool:
        """Whether this is a code tensor, which must be aligned."""
        return self.name.endswith("._data")


@dataclass(frozen=True)
class Shard:
    """Tensors of one file, in the order of their bytes."""

    entries: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data, the header not counted."""
        return sum(entry.nbytes for entry in self.entries)

    def offsets(self) -> dict[str, int]:
        """Where each tensor starts, counted from the end of the header."""
        position, result = 0, {}
        for entry in self.entries:
            result[entry.name] = position
            position += entry.nbytes
        return result

    def header(self) -> bytes:
        """The length field and the JSON header, filled with spaces so that the data starts on a boundary."""
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for entry, start in zip(self.entries, self.offsets().values(), strict=True):
            fields[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.nbytes],
            }
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written: its size and hash, and those of each tensor in it."""

    bytes: int
    sha256: str
    tensors: dict[str, str]


def parse_size(size: int | str) -> int:
    """Read a size in bytes: ``5000``, ``"5GB"`` (decimal, as transformers reads it) or ``"5GiB"``.

    Raises:
        ExportError: when it is not a positive number with a known unit.

    >>> parse_size("5GB"), parse_size("2 MiB"), parse_size(64)
    (5000000000, 2097152, 64)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or (number := int(float(match[1]) * factor)) < 1:
        raise ExportError(
            f"max_shard_size must be a positive number of bytes or a text such as '5GB' or '500MiB'; got {size!r}"
        )
    return number


def plan_shards(entries: Iterable[TensorEntry], max_shard_size: int) -> tuple[Shard, ...]:
    """Order tensors into shards so that every code tensor starts on a 64-byte boundary.

    Every other tensor starts on a multiple of its element size. A shard exceeds ``max_shard_size`` only when a single
    tensor (with what fills it up) does.

    Args:
        entries: the tensors, in the model's order, which is kept where alignment allows.
        max_shard_size: bytes of data a shard.

    Raises:
        ExportError: for a dtype that safetensors cannot hold.
    """
    entries = tuple(entries)
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise ExportError(
                f"tensor {entry.name!r} has dtype {entry.dtype}, which a safetensors file cannot hold here; supported: "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}"
            )
    pool = _Fillers(entry for entry in entries if not entry.is_code and entry.nbytes % ALIGNMENT)
    units: list[tuple[TensorEntry, ...]] = []
    tails: list[TensorEntry] = []
    for entry in entries:
        if entry.nbytes % ALIGNMENT == 0:
            units.append((entry,))
        elif entry.is_code:
            fillers = pool.fill(entry.nbytes)
            if fillers is None:
                tails.append(entry)
            else:
                units.append((entry, *fillers))
    loose = sorted(pool.rest(), key=lambda entry: -entry.dtype.itemsize)
    return tuple(Shard(tuple(shard)) for shard in _fill_shards(units, tails, loose, max_shard_size))


class _Fillers:
    """Small tensors by residue modulo 64, from which subsets of a wanted sum are taken."""

    def __init__(self, entries: Iterable[TensorEntry]) -> None:
        self._by_kind: dict[tuple[int, int], list[TensorEntry]] = defaultdict(list)
        for entry in entries:
            self._by_kind[entry.dtype.itemsize, entry.nbytes % ALIGNMENT].append(entry)
        for same in self._by_kind.values():
            # Small ones first: a large bias is better left to the model's order than used to fill a gap.
            same.sort(key=lambda entry: (-entry.nbytes, entry.name))
        self._recipes: dict[int, Counter[tuple[int, int]]] = {}

    def fill(self, nbytes: int) -> tuple[TensorEntry, ...] | None:
        """Take tensors that bring ``nbytes`` to a multiple of 64, or none when no subset does."""
        residue = nbytes % ALIGNMENT
        recipe = self._recipes.get(residue)
        if recipe is None or any(len(self._by_kind[kind]) < count for kind, count in recipe.items()):
            recipe = self._search(residue)
        if recipe is None:
            return None
        self._recipes[residue] = recipe
        kinds = sorted(recipe.elements(), reverse=True)  # wide elements first, so that narrow ones do not displace them
        return tuple(self._by_kind[kind].pop() for kind in kinds)

    def _search(self, residue: int) -> Counter[tuple[int, int]] | None:
        """Bounded subset sum: the fewest tensors whose sizes add up to ``-residue`` modulo 64.

        Only element sizes that divide the residue are of use, and using no others keeps each element aligned.
        """
        best: dict[int, Counter[tuple[int, int]]] = {0: Counter()}
        for kind, available in self._by_kind.items():
            itemsize, step = kind
            if residue % itemsize or not available:
                continue
            longest = min(len(available), ALIGNMENT // math.gcd(step, ALIGNMENT) - 1)
            found = dict(best)
            for total, recipe in best.items():
                for count in range(1, longest + 1):
                    reached = (total + count * step) % ALIGNMENT
                    if reached not in found or found[reached].total() > recipe.total() + count:
                        found[reached] = recipe + Counter({kind: count})
            best = found
        return best.get(-residue % ALIGNMENT)

    def rest(self) -> list[TensorEntry]:
        """What was never taken."""
        return [entry for same in self._by_kind.values() for entry in reversed(same)]


def _fill_shards(
    units: Sequence[tuple[TensorEntry, ...]],
    tails: Sequence[TensorEntry],
    loose: Sequence[TensorEntry],
    limit: int,
) -> list[list[TensorEntry]]:
    """Cut units, loose tensors and unfilled codes (tails, one at most a shard) into shards of at most ``limit``."""
    shards: list[list[TensorEntry]] = [[]]
    sizes = [0]

    def add(group: Sequence[TensorEntry], index: int = -1) -> None:
        shards[index].extend(group)
        sizes[index] += sum(entry.nbytes for entry in group)

    def open_shard(group: Sequence[TensorEntry]) -> None:
        if shards[-1] and sizes[-1] + sum(entry.nbytes for entry in group) > limit:
            shards.append([])
            sizes.append(0)

    for unit in units:
        open_shard(unit)
        add(unit)
    waiting = list(tails)
    after = sizes[-1] + sum(entry.nbytes for entry in (*loose, *waiting[:1]))
    if waiting and after <= limit and all(waiting[0].nbytes % entry.dtype.itemsize == 0 for entry in loose):
        add([waiting.pop(0)])  # loose tensors may follow it: their elements stay aligned
    for entry in loose:
        open_shard([entry])
        add([entry])
    for entry in waiting:
        room = (i for i, size in enumerate(sizes) if size % ALIGNMENT == 0 and size + entry.nbytes <= limit)
        index = next(room, None)
        if index is None:
            shards.append([])
            sizes.append(0)
            index = -1
        add([entry], index)
    return [shard for shard in shards if shard] or [[]]


def shard_names(count: int, stem: str = "model") -> list[str]:
    """File names as Hugging Face's libraries have them: ``model.safetensors``, or a numbered name for each of several.

    Args:
        count: number of files.
        stem: how names begin: ``"model"`` in transformers, ``"diffusion_pytorch_model"`` in diffusers.

    >>> shard_names(2)
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a plain tensor, row-major, little-endian; a contiguous CPU tensor is not copied."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def write_shard(path: Path, shard: Shard, fetch: Callable[[str], torch.Tensor]) -> WrittenFile:
    """Write one safetensors file, a tensor at a time, and bring it to the disk.

    Args:
        path: the file to make.
        shard: what to write, in order.
        fetch: gives the tensor of a name; it must have the planned dtype and shape.

    Raises:
        ExportError: when a tensor is not what was planned.
        OSError: when the disk is full or the file cannot be written.
    """
    whole, tensors, size = hashlib.sha256(), {}, 0
    with path.open("wb") as file:
        header = shard.header()
        size += file.write(header)
        whole.update(header)
        for entry in shard.entries:
            tensor = fetch(entry.name)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ExportError(
                    f"tensor {entry.name!r} changed while it was exported: planned {entry.dtype} {entry.shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}; export a model that nothing else modifies"
                )
            data = raw_bytes(tensor)
            size += file.write(data)
            whole.update(data)
            tensors[entry.name] = hashlib.sha256(data).hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(size, whole.hexdigest(), tensors)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, int]]:
    """Read a safetensors header: the tensors, and where each starts in the file.

    Raises:
        ValueError: when the file is not a whole safetensors file (too short, header unreadable, data truncated).
    """
    names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path.name} is not a whole safetensors file: {size} bytes, header of {length} bytes")
        try:
            fields = json.loads(file.read(length))
            fields.pop("__metadata__", None)
            entries = {n: TensorEntry(n, names[f["dtype"]], tuple(f["shape"])) for n, f in fields.items()}
            spans = {name: tuple(field["data_offsets"]) for name, field in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} has an unreadable safetensors header: {error}") from error
    end = max((span[1] for span in spans.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{path.name} has {size} bytes where its header promises {8 + length + end}: truncated")
    return entries, {name: 8 + length + span[0] for name, span in spans.items()}
