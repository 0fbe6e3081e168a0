"""Fake quantization on a CPU: `numerics.fake_quantize` in blocks that stay in the cache.

The plain form makes six passes over the weight through main memory. Here a block of rows goes through all six
while it sits in the cache, so that memory sees one read and one write. Same operations, same order, same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import grouped
from qat.qtypes import QTYPES

__all__ = ["fake_quantize"]

_BLOCK_ELEMENTS = 1 << 17  # half a MiB of float32: fits the second-level cache of two cores, and feeds both


def fake_quantize(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """See `qat.numerics.fake_quantize`: the same arguments, the same bits."""
    kind = QTYPES[qtype]
    weight = weight.detach()
    rows = grouped(weight, qtype)
    # Types narrower than float32 are promoted exactly by the division; float64 would be divided in float64.
    wide = rows.dtype is torch.float64
    out = torch.empty(rows.shape, dtype=out_dtype)
    narrow = dtype is not torch.float32
    serving_shift = None if shift is None else shift.to(dtype)
    serving_scale = scale.to(dtype)
    constant = not kind.floating and bool((scale == 0).any())
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    buffer = torch.empty((min(step, rows.shape[0]), rows.shape[1]), dtype=torch.float32)
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        row_scale = scale[block]
        codes = buffer[: row_scale.shape[0]]
        values = rows[block].float() if wide else rows[block]
        if shift is None:
            torch.div(values, row_scale, out=codes)
        else:
            torch.add(values, shift[block], out=codes).div_(row_scale)
        if kind.floating:
            codes.clamp_(kind.code_min, kind.code_max)
            _round_to_float8(codes)
        else:
            codes.round_()
            if constant:
                codes.masked_fill_(row_scale == 0, 0)
            # Adding 0 turns -0.0, which no integer code can store, into the 0.0 that a loader will rebuild.
            codes.clamp_(kind.code_min, kind.code_max).add_(0.0)
        if narrow:
            served = codes.to(dtype).mul_(serving_scale[block])
            if serving_shift is not None:
                served.sub_(serving_shift[block])
            out[block] = served
        elif serving_shift is not None:
            torch.sub(codes.mul_(row_scale), serving_shift[block], out=codes)
            out[block] = codes
        else:
            out[block] = codes.mul_(row_scale)
    return out.view(weight.shape)


def _round_to_float8(values: Tensor) -> None:
    """Round float32 values within ±448 to float8_e4m3fn's grid, in place, half to even, the sign of zero kept.

    torch's conversion back from float8 is six times slower than this on a CPU. Above 2^-6 the grid has three bits after
    the leading one: rounding is integer arithmetic on the float's own bits. Below, its spacing is 2^-9 throughout:
    adding and subtracting 1.5 * 2^14, whose last bit is worth 2^-9, rounds to it.
    """
    below = (values + 24576.0).sub_(24576.0).copysign_(values)
    is_below = values.abs().lt_(2.0**-6).bool()
    bits = values.view(torch.int32)
    odd = bits.bitwise_right_shift(20).bitwise_and_(1)
    bits.add_(odd).add_(0x7FFFF).bitwise_and_(~0xFFFFF)
    torch.where(is_below, below, values, out=values)
