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
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_tinygemm_on_cpu", "plain_from_tinygemm"]

_BLOCKS = (64, 32)  # rows of a block with and without AVX-512


def is_tinygemm_on_cpu(weight: Any) -> bool:
    """Whether a weight is in the kernel's class, and on a CPU."""
    return type(weight).__name__ == "TinyGemmWeightQBitsTensor" and weight._data._data.device.type == "cpu"


def plain_from_tinygemm(weight: Any) -> Any:
    """What ``weight.weight_qbits_tensor()`` gives, without its product with the identity matrix."""
    from optimum.quanto import WeightQBitsTensor

    packed = weight._data
    block = _block(*packed.size())
    if block is None:
        return weight.weight_qbits_tensor()
    codes = _unpack(packed, block).view(-1, weight._group_size)
    scale, middle = (part.T.reshape(-1, 1) for part in weight._scale_shift.unbind(2))
    shift = 8 * scale - middle
    form = (weight._qtype, weight._axis, weight._group_size, weight.size(), weight.stride())
    return WeightQBitsTensor(*form, codes, scale, shift)


def _unpack(packed: Any, block: int) -> Tensor:
    rows, columns = packed.size()
    whole, data = rows - rows % block, packed._data.view(torch.uint8).reshape(-1)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for start, stop, size in ((0, whole, block), (whole, rows, rows - whole)):
        if start == stop:
            continue
        stored = data[start * columns // 2 : stop * columns // 2].reshape(-1, columns, size // 2)
        stored, place = stored.transpose(1, 2).contiguous(), codes[start:stop].view(-1, size, columns)
        low, high = _order(size).view(-1, 2).T
        place[:, low], place[:, high] = stored & 15, stored >> 4
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
