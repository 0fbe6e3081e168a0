"""Where every tensor lies in a safetensors file, and how it gets there.

Kernels that read packed weights want them aligned: on CPU ``torch._weight_int8pack_mm`` crashes or answers wrongly
when the codes do not start on a 16-byte boundary, and stock loaders hand out views of the memory-mapped file, so that
the file's own offsets decide. Here every *code tensor* starts on a 64-byte boundary.

The format allows neither holes nor padding tensors (a loader would report unexpected keys), only a header that may be
filled with spaces. So alignment is a matter of order: tensors whose size is a multiple of 64 bytes come first, and
nearly all codes are such. A code tensor of another size must be the last code tensor of its file: it ends a shard, and
the first one is followed by the small tensors. Such sizes need dimensions that are no multiples of 8, so they are rare.

Planning is pure: it sees names, dtypes and shapes. Writing streams one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import ByteSize, Field, TypeAdapter, ValidationError

from qat.errors import ExportError, LoadError
from qat.files.manifest import FileRecord, TensorRecord
from qat.files.trusted import MOST_TEXT
from qat.progress import counted
from qat.tensors import raw_bytes

__all__ = [
    "ALIGNMENT",
    "DTYPES_BY_NAME",
    "DTYPE_NAMES",
    "Header",
    "Shard",
    "TensorEntry",
    "header_faults",
    "parse_size",
    "plan_shards",
    "read_headers",
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
DTYPES_BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_SIZE = TypeAdapter[int](Annotated[ByteSize, Field(ge=1)])


@dataclass(frozen=True)
class TensorEntry:
    """What planning needs to know of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_code: bool = False
    """Whether it holds codes, which must be aligned."""

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What a file's header says of a tensor."""

    file: str
    entry: TensorEntry
    start: int
    """Where it starts in the file, in bytes."""


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


def parse_size(size: int | str) -> int:
    """Read a size in bytes: ``5000``, ``"5GB"`` (decimal, as transformers reads it) or ``"5GiB"``.

    Raises:
        ExportError: when it is not a positive number with a known unit.

    >>> parse_size("5GB"), parse_size("2 MiB"), parse_size(64)
    (5000000000, 2097152, 64)
    """
    try:
        return int(_SIZE.validate_python(str(size)))
    except ValidationError:
        raise ExportError(
            f"max_shard_size must be a positive number of bytes or a text such as '5GB' or '500MiB'; got {size!r}"
        ) from None


def plan_shards(entries: Iterable[TensorEntry], max_shard_size: int) -> tuple[Shard, ...]:
    """Order tensors into shards so that every code tensor starts on a 64-byte boundary.

    Every other tensor starts on a multiple of its element size. The model's order is kept where alignment allows. A
    shard exceeds ``max_shard_size`` (bytes of data) only when a single tensor (with what fills it up) does.

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
    whole = [entry for entry in entries if entry.nbytes % ALIGNMENT == 0]
    tails = [entry for entry in entries if entry.is_code and entry.nbytes % ALIGNMENT]
    loose = [entry for entry in entries if not entry.is_code and entry.nbytes % ALIGNMENT]
    # Wide elements first, so that narrow ones do not displace them; then by size modulo 64, as earlier exports have it.
    residues = list(dict.fromkeys(entry.nbytes % ALIGNMENT for entry in loose))
    loose.sort(key=lambda entry: entry.name, reverse=True)
    loose.sort(key=lambda entry: (-entry.dtype.itemsize, residues.index(entry.nbytes % ALIGNMENT), entry.nbytes))
    return tuple(Shard(tuple(shard)) for shard in _fill_shards(whole, tails, loose, max_shard_size))


def _fill_shards(
    whole: Sequence[TensorEntry], tails: Sequence[TensorEntry], loose: Sequence[TensorEntry], limit: int
) -> list[list[TensorEntry]]:
    """Cut tensors into shards of at most ``limit``; tails are the code tensors that end one."""
    shards: list[list[TensorEntry]] = [[]]
    sizes = [0]

    def add(entry: TensorEntry, index: int | None = None) -> None:
        """Into the shard of that index, which may be a new one; None: into the last, or a new one where it is full."""
        if index is None:
            index = len(shards) - 1 if not shards[-1] or sizes[-1] + entry.nbytes <= limit else len(shards)
        if index == len(shards):
            shards.append([])
            sizes.append(0)
        shards[index].append(entry)
        sizes[index] += entry.nbytes

    for entry in whole:
        add(entry)
    waiting = list(tails)
    after = sizes[-1] + sum(entry.nbytes for entry in (*loose, *waiting[:1]))
    if waiting and after <= limit and all(waiting[0].nbytes % entry.dtype.itemsize == 0 for entry in loose):
        add(waiting.pop(0))  # loose tensors may follow it: their elements stay aligned
    for entry in loose:
        add(entry)
    for entry in waiting:
        fits = (i for i, size in enumerate(sizes) if size % ALIGNMENT == 0 and size + entry.nbytes <= limit)
        add(entry, next(fits, len(shards)))
    return [shard for shard in shards if shard] or [[]]


def shard_names(count: int, stem: str = "model") -> list[str]:
    """File names as Hugging Face's libraries have them: ``model.safetensors``, or a numbered name for each of several.

    >>> shard_names(2)
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(
    path: Path, shard: Shard, fetch: Callable[[str], torch.Tensor], progress: bool = False
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write one safetensors file, a tensor at a time, and bring it to the disk; return what was written.

    A tensor is hashed in two threads, for the file and for itself, while it is written and the next one is fetched.

    Raises:
        ExportError: when a tensor is not what was planned.
        OSError: when the disk is full or the file cannot be written.
    """
    whole, digests = hashlib.sha256(shard.header()), {}
    entries = counted(shard.entries, f"writing {path.name}", progress)
    with path.open("wb") as file, ThreadPoolExecutor(1) as in_order, ThreadPoolExecutor(1) as beside:
        file.write(shard.header())
        hashing: tuple[Future[Any], ...] = ()
        for entry in entries:
            tensor = fetch(entry.name)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ExportError(
                    f"tensor {entry.name!r} changed while it was exported: planned {entry.dtype} {entry.shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}; export a model that nothing else modifies"
                )
            data = raw_bytes(tensor)
            for future in hashing:
                future.result()  # two tensors are held, and no more
            digests[entry.name] = beside.submit(hashlib.sha256, data)
            hashing = (in_order.submit(whole.update, data), digests[entry.name])
            file.write(data)
        for future in hashing:
            future.result()
        size = file.tell()
    tensors = {
        entry.name: TensorRecord(
            file=path.name,
            dtype=DTYPE_NAMES[entry.dtype],
            shape=entry.shape,
            sha256=digests[entry.name].result().hexdigest(),
        )
        for entry in shard.entries
    }
    return FileRecord(bytes=size, sha256=whole.hexdigest()), tensors


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Read the headers of several files.

    Raises:
        LoadError: when a file is missing or not a whole safetensors file (header unreadable, data truncated).
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Header] = {}
    for path in files:
        try:
            if not path.is_file():  # a pipe would be waited for
                raise FileNotFoundError(f"{path.name} is no file")
            with path.open("rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
            if length > min(MOST_TEXT, path.stat().st_size - 8):
                raise ValueError(f"its header would have {length} bytes")
            position = 8 + length
            with safe_open(path, framework="pt") as opened:
                for name in opened.offset_keys():  # the format has no holes, so that the order gives the offsets
                    view = opened.get_slice(name)
                    entry = TensorEntry(name, DTYPES_BY_NAME[view.get_dtype()], tuple(view.get_shape()))
                    found[name] = Header(path.name, entry, position)
                    position += entry.nbytes
        except (OSError, SafetensorError, struct.error, KeyError, ValueError) as error:
            raise LoadError(
                f"{path.name} in {str(path.parent)!r} is not a whole safetensors file that qat can read: {error}; "
                "copy or export it again"
            ) from error
    return found


def header_faults(
    headers: Mapping[str, Header], recorded: Mapping[str, TensorRecord], codes: Collection[str]
) -> list[str]:
    """Where headers differ from what was recorded when the files were written, and which ``codes`` are not aligned."""
    faults = [f"{name} is missing" for name in recorded if name not in headers]
    faults += [f"{name} is unexpected" for name in headers if name not in recorded]
    for name, (file, entry, start) in headers.items():
        kept = recorded.get(name)
        if kept is None:
            continue
        if file != kept.file:
            faults.append(f"{name} lies in {file} instead of {kept.file}")
        if (DTYPE_NAMES[entry.dtype], entry.shape) != (kept.dtype, kept.shape):
            faults.append(
                f"{name} is {DTYPE_NAMES[entry.dtype]} {list(entry.shape)} instead of {kept.dtype} {list(kept.shape)}"
            )
        if name in codes and start % ALIGNMENT:
            faults.append(f"{name} starts at byte {start}, which is not a multiple of {ALIGNMENT}")
    return faults
