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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qat.formats.quanto_types import QUANTO_NAMES

__all__ = [
    "can_optimize",
    "is_tinygemm_on_cpu",
    "parts_of_tinygemm",
    "plain",
    "rows_of_tinygemm",
    "tinygemm_from_plain",
    "unpacked",
]

_BLOCKS = (64, 32)  # rows of a block with and without AVX-512


def can_optimize(weight: Any) -> bool:
    """Whether ``optimize()`` can convert a weight: TinyGemm's packing raises on other row counts."""
    if weight.ndim != 2:
        return False  # kernels multiply matrices
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
    return _unpack(_stored(weight._data), block), scale, 8 * scale - middle


def rows_of_tinygemm(weight: Any, ids: Tensor) -> Tensor | None:
    """The values of rows, ``(len(ids), in)``; None if the weight is not the kernel's or its order not known."""
    if not is_tinygemm_on_cpu(weight) or (block := _block(*weight._data.size())) is None:
        return None
    rows, columns = weight._data.size()
    last = rows - rows % block  # where the rows begin that fill no block
    inside, rest = ids < last, rows - last or block
    first = torch.where(inside, ids - ids % block, last)
    size = torch.where(inside, block, rest)
    place = torch.where(inside, _places(block)[ids % block], _places(rest)[(ids - first) % rest])
    start = first * (columns // 2) + place // 2
    codes = _stored(weight._data).reshape(-1)[start[:, None] + size[:, None] // 2 * torch.arange(columns)]
    codes = codes.bitwise_right_shift_((place % 2 * 4).to(torch.uint8)[:, None]).bitwise_and_(15)
    # An index would take negative ids.
    scale, middle = (part.index_select(1, ids).T.reshape(-1, 1) for part in weight._scale_shift.unbind(2))
    values: Tensor = scale * codes.view(-1, weight._group_size)
    return values.sub_(8 * scale - middle).view(len(ids), columns)


def unpacked(data: Any) -> Tensor:
    """What ``data.unpack()`` gives of quanto's packed codes, with no memory but that of the result."""
    packed: Tensor = data._data
    bits: int = data._bits
    codes = packed.new_empty((packed.shape[0] * (8 // bits), *packed.shape[1:]))
    for shift, part in zip(range(0, 8, bits), torch.split(codes, packed.shape[0]), strict=True):
        torch.bitwise_right_shift(packed, shift, out=part).bitwise_and_(2**bits - 1)
    return codes[: data.shape[0]]


def tinygemm_from_plain(weight: Any) -> Any:
    """What ``weight.optimize()`` gives of an int4 weight in bfloat16 on a CPU, packed by the order of codes.

    Quanto packs by way of int32, four times the codes' memory and ten times the work. None for other weights, and
    unknown orders.
    """
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor, TinyGemmWeightQBitsTensor

    size, stride = weight.size(), weight.stride()
    types = (weight._qtype.bits, weight.dtype, weight._group_size, weight._data._data.device.type)
    if types != (4, torch.bfloat16, 128, "cpu") or (block := _block(*size)) is None:
        return None
    packed = TinyGemmPackedTensor(_pack(unpacked(weight._data).view(size), block), size, stride)
    scale_shift = torch.stack((weight._scale, 8 * weight._scale - weight._shift), 2).view(size[0], -1, 2)
    form = (weight._qtype, weight._axis, weight._group_size)
    return TinyGemmWeightQBitsTensor(*form, size, stride, packed, scale_shift.transpose(0, 1).contiguous())


def _pack(codes: Tensor, block: int) -> Tensor:
    """Codes, ``(out, in)``, two a byte in the kernel's order: ``(out, in / 2)``."""
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
    for rows, stored, order in _blocks(codes, packed, block):
        pairs = torch.empty(len(stored), len(order), codes.shape[1], dtype=torch.uint8)
        for at, (low, high) in enumerate(order):
            torch.bitwise_left_shift(rows[:, high], 4, out=pairs[:, at]).bitwise_or_(rows[:, low])
        stored.copy_(pairs.transpose(1, 2))
    return packed


def _unpack(packed: Tensor, block: int) -> Tensor:
    """The codes that `_pack` packed."""
    codes = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.uint8)
    for rows, stored, order in _blocks(codes, packed, block):
        pairs = torch.stack(stored.unbind(2), 1)  # a transposed copy takes twice as long
        for at, (low, high) in enumerate(order):
            torch.bitwise_and(pairs[:, at], 15, out=rows[:, low])
            torch.bitwise_right_shift(pairs[:, at], 4, out=rows[:, high])
    return codes


def _blocks(codes: Tensor, packed: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor, list[list[int]]]]:
    """Views of whole blocks, and of the rest: ``(blocks, rows, in)``, ``(blocks, in, rows / 2)``, and rows in pairs."""
    rows, columns = codes.shape
    whole = rows - rows % block
    for part, size in ((slice(whole), block), (slice(whole, rows), rows - whole)):
        if len(codes[part]):
            stored = packed[part].view(-1, columns, size // 2)
            yield codes[part].view(-1, size, columns), stored, _order(size).view(-1, 2).tolist()


@functools.cache
def _order(block: int) -> Tensor:
    """The row of each code in a packed column of ``block`` rows."""
    numbers = torch.arange(block, dtype=torch.uint8)[:, None].expand(-1, 32)
    found = torch.zeros(block, dtype=torch.int64)
    for shift in (0, 4):  # a code has four bits
        stored = _packed(numbers >> shift & 15).view(32, -1)[0]
        found += torch.stack((stored & 15, stored >> 4), 1).reshape(-1).long() << shift
    return found


@functools.cache
def _places(block: int) -> Tensor:
    """Where the code of each row stands in a packed column."""
    return _order(block).argsort()


@functools.cache
def _block(rows: int, columns: int) -> int | None:
    """The rows of a block by which codes of this shape come back; None if there is no such number."""
    rows = min(rows, 2 * _BLOCKS[0] + rows % _BLOCKS[0])  # blocks do not depend on each other
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = _packed(codes)
    for block in _BLOCKS:
        sizes = [size for size in (block if rows >= block else 0, rows % block) if size]
        known = all(sorted(_order(size).tolist()) == list(range(size)) for size in sizes)
        if known and torch.equal(_unpack(packed, block), codes) and torch.equal(_pack(codes, block), packed):
            return block
    return None


def _packed(codes: Tensor) -> Tensor:
    """Codes as quanto packs them."""
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmPackedTensor

    return _stored(TinyGemmPackedTensor.pack(codes))


def _stored(packed: Any) -> Tensor:
    """The bytes of a packed tensor, ``(out, in / 2)``."""
    data: Tensor = packed._data.view(torch.uint8)
    return data.reshape(packed.shape[0], -1)
