"""A weight out of the order in which torch's int4 kernel of a CPU (TinyGemm) wants its codes.

Quanto gets them back by a product with the identity matrix, ``in_features`` times the work of one row: 18 seconds for
5,760 x 5,760 on one core. Yet packing only moves codes: rows are cut into blocks, and each column of a block becomes
its codes in another order, two a byte. That order depends on the processor. So it is read from what packing makes of
row numbers; codes come back by an index, in a hundredth of the time.

Whether a shape is packed that way is not assumed. Random codes of that shape go there and back once; where they do not
return, quanto's way remains.
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.formats.quanto_types import QUANTO_NAMES

__all__ = [
    "can_optimize",
    "is_tinygemm_on_cpu",
    "parts_of_tinygemm",
    "plain",
    "tinygemm_from_plain",
    "unpacked",
    "warn_of_old_locks",
]

logger = logging.getLogger("qat")

_LONGEST_BUILD = 600.0  # seconds
_PACKED_AT_ONCE = 1 << 18  # codes
_BLOCKS = (64, 32)  # rows of a block with and without AVX-512


@functools.cache
def warn_of_old_locks() -> None:
    """Say, once, which locks a killed build of quanto's kernels has left: packed weights wait for them, silently."""
    from optimum.quanto.library import extensions

    for lock in Path(extensions.__file__).parent.glob("*/build/lock"):
        with suppress(FileNotFoundError):  # its build has ended just now
            if (age := time.time() - lock.stat().st_mtime) > _LONGEST_BUILD:
                logger.warning(
                    "%s is %d minutes old: a killed build of optimum-quanto's kernels leaves such a file, and int4 and "
                    "int2 weights then wait for it without end: delete it, unless a compiler runs",
                    *(lock, age / 60),
                )


def can_optimize(weight: Any) -> bool:
    """Whether ``optimize()`` can convert a weight: TinyGemm's packing raises on other row counts."""
    if weight.qtype.bits < 8 and (weight.qtype.name != QUANTO_NAMES["int4"] or weight.dtype == torch.float32):
        return False  # there is no kernel, and quanto would unpack and pack for nothing
    if weight.qtype.bits == 8 or weight.dtype != torch.bfloat16 or weight._group_size != 128:
        return True
    rows: int = weight.shape[0]
    return rows % (16 if weight.device.type == "cpu" else 8) == 0


def is_tinygemm_on_cpu(weight: Any) -> bool:
    """Whether a weight is in the kernel's class, and on a CPU."""
    return type(weight).__name__ == "TinyGemmWeightQBitsTensor" and weight._data._data.device.type == "cpu"


def plain(weight: Any) -> Any:
    """A weight in the plain class, whatever kernel's class it is in."""
    if (parts := parts_of_tinygemm(weight)) is not None:
        from optimum.quanto import WeightQBitsTensor

        codes, *scales = parts
        form = (weight._qtype, weight._axis, weight._group_size, weight.size(), weight.stride())
        return WeightQBitsTensor(*form, codes.view(-1, weight._group_size), *scales)
    if hasattr(weight, "weight_qbits_tensor") and type(weight).__name__ != "WeightQBitsTensor":
        return weight.weight_qbits_tensor()
    if hasattr(weight, "weight_qbytes_tensor") and type(weight).__name__ != "WeightQBytesTensor":
        return weight.weight_qbytes_tensor()
    return weight


def parts_of_tinygemm(weight: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, ``(out, in)``, scale and shift; None if the weight is not the kernel's or its order not known."""
    if not is_tinygemm_on_cpu(weight) or (block := _block(*weight._data.size())) is None:
        return None
    scale, middle = (part.T.reshape(-1, 1) for part in weight._scale_shift.unbind(2))
    return _unpack(weight._data, block), scale, 8 * scale - middle


def unpacked(data: Any) -> Tensor:
    """What ``data.unpack()`` gives of quanto's packed codes, with no memory but that of the result."""
    packed: Tensor = data._data
    bits: int = data._bits
    codes = packed.new_empty((packed.shape[0] * (8 // bits), *packed.shape[1:]))
    for shift, part in zip(range(0, 8, bits), torch.split(codes, packed.shape[0]), strict=True):
        torch.bitwise_right_shift(packed, shift, out=part).bitwise_and_(2**bits - 1)
    return codes[: data.shape[0]]


def tinygemm_from_plain(weight: Any) -> Any:
    """What ``weight.optimize()`` gives of an int4 weight in bfloat16 on a CPU, packed in blocks of rows.

    Quanto packs by way of int32, four times the codes' memory. None for other weights, and unknown orders.
    """
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor, TinyGemmWeightQBitsTensor

    rows, columns = weight.size()
    types = (weight._qtype.bits, weight.dtype, weight._group_size, weight._data._data.device.type)
    if types != (4, torch.bfloat16, 128, "cpu") or (block := _block(rows, columns)) is None:
        return None
    step, groups = block * max(1, _PACKED_AT_ONCE // (block * columns)), columns // 128
    form, codes = (weight._qtype, weight._axis, weight._group_size), unpacked(weight._data)
    parts = []
    for first in range(0, rows, step):
        at = slice(first * groups, (first + step) * groups)
        size = (min(step, rows - first), columns)
        scales = (weight._scale[at], weight._shift[at])
        parts.append(TinyGemmWeightQBitsTensor(*form, size, (columns, 1), codes[at], scales))
    data = torch.cat([part._data._data for part in parts])
    packed = TinyGemmPackedTensor(data, weight.size(), weight.stride())
    scale_shift = torch.cat([part._scale_shift for part in parts], 1)
    return TinyGemmWeightQBitsTensor(*form, weight.size(), weight.stride(), packed, scale_shift)


def _unpack(packed: Any, block: int) -> Tensor:
    rows, columns = packed.size()
    whole, data = rows - rows % block, packed._data.view(torch.uint8).reshape(-1)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for start, stop, size in ((0, whole, block), (whole, rows, rows - whole)):
        if start == stop:
            continue
        stored = data[start * columns // 2 : stop * columns // 2].reshape(-1, columns, size // 2)
        place = codes[start:stop].view(-1, size, columns)
        low, high = _order(size).view(-1, 2).T
        for from_block, to_block in zip(stored, place, strict=True):
            rows_of_block = from_block.T.contiguous()
            to_block[low], to_block[high] = rows_of_block & 15, rows_of_block >> 4
    return codes


@functools.cache
def _order(block: int) -> Tensor:
    """The row of each code in a packed column of ``block`` rows."""
    numbers = torch.arange(block, dtype=torch.uint8)[:, None].expand(-1, 32)
    found = torch.zeros(block, dtype=torch.int64)
    for shift in (0, 4):  # a code has four bits
        stored = _packed(numbers >> shift & 15)._data.view(torch.uint8).reshape(32, -1)[0]
        found += torch.stack((stored & 15, stored >> 4), 1).reshape(-1).long() << shift
    return found


@functools.cache
def _block(rows: int, columns: int) -> int | None:
    """The rows of a block by which codes of this shape come back; None if there is no such number."""
    rows = min(rows, 2 * _BLOCKS[0] + rows % _BLOCKS[0])  # blocks do not depend on each other
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = _packed(codes)
    for block in _BLOCKS:
        sizes = [size for size in (block if rows >= block else 0, rows % block) if size]
        known = all(sorted(_order(size).tolist()) == list(range(size)) for size in sizes)
        if known and torch.equal(_unpack(packed, block), codes):
            return block
    return None


def _packed(codes: Tensor) -> Any:
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor

    return TinyGemmPackedTensor.pack(codes)
