"""Fake quantization on a CPU, and the gradients of its scales, in blocks that stay in the cache.

The plain form of `QType.fake_quantize` makes six passes over the weight through main memory, that of
`QType.scale_gradients` a dozen. Here a block of rows goes through all of them while it sits in the cache, so that
memory sees one read and one write. Same operations, same order, same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qat.numerics import qtype_of

__all__ = ["fake_quantize_weight", "quantize_own_range", "scale_gradients", "supports"]

_BLOCK_ELEMENTS = 1 << 17  # half a MiB of float32: fits the second-level cache of two cores, and feeds both


def supports(*args: object) -> bool:
    """Whether these functions compute a type's arithmetic."""
    return qtype_of(next(argument for argument in args if isinstance(argument, str))).fused


def quantize_own_range(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `qat.kernels.quantize_own_range`: the bits of the specification."""
    found = qtype_of(qtype)
    low, high = _ends(found.grouped(weight.detach()))
    ends = (low, high) if found.has_shift else (None, torch.maximum(-low, high))
    scale, shift = found.serve(*found.scale_shift(*ends), dtype, weight.shape[1])
    return fake_quantize_weight(weight, scale, shift, qtype, dtype, out_dtype), scale, shift


def fake_quantize_weight(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """See `qat.kernels.fake_quantize_weight`: the bits of the specification."""
    found = qtype_of(qtype)
    weight = weight.detach()
    rows = found.grouped(weight)
    out = torch.empty(rows.shape, dtype=out_dtype)
    serving_scale = scale.to(dtype).float()
    serving_shift = None if shift is None else shift.to(dtype)
    constant = not found.floating and bool((scale == 0).any())
    coded = out_dtype is found.storage
    # A cast to int8 takes a sixth of the time of one to uint8.
    stored = out.view(torch.int8) if out_dtype is torch.uint8 and found.code_max < 128 else out
    for block, row_scale, codes, *scratch in _blocks(rows, scale, shift, 3 if found.floating and not coded else 1):
        if not found.floating:
            codes.round_()
            if constant:
                codes.masked_fill_(row_scale == 0, 0)
        codes.clamp_(found.code_min, found.code_max)
        if coded:
            stored[block] = codes  # a cast to float8 rounds as it should
            continue
        if found.floating:
            _round_to_float8(codes, *scratch)
        else:
            codes.add_(0.0)  # turns -0.0, which no integer code can store, into the 0.0 that a loader will rebuild
        # Of bfloat16 and float16 numbers the product is exact in float32: the one rounding is the cast that follows.
        codes.mul_(serving_scale[block])
        if serving_shift is None:
            out[block] = codes if out_dtype is dtype else codes.to(dtype)
        elif out_dtype is dtype:
            out[block].copy_(codes).sub_(serving_shift[block])
        else:
            out[block] = codes.to(dtype).sub_(serving_shift[block])
    return out.view(weight.shape)


def scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `qat.kernels.scale_gradients`: the results of the specification, but for the order of the sums."""
    found = qtype_of(qtype)
    rows, grad_rows = found.grouped(weight.detach()), found.grouped(grad)
    masked = torch.empty_like(grad_rows, memory_format=torch.contiguous_format)
    grad_scale = torch.empty_like(scale)
    grad_shift = None if shift is None else torch.empty_like(scale)
    flat = bool((scale == 0).any())
    for block, row_scale, x, codes, within, *scratch in _blocks(rows, scale, shift, 5 if found.floating else 3):
        given = grad_rows[block].float()
        if flat:
            x.masked_fill_(row_scale == 0, 0)
        torch.clamp(x, found.code_min, found.code_max, out=codes)
        # 1 inside the range and 0 outside, as float32: operations on bool are ten times slower here.
        inside = torch.eq(x, codes, out=x)
        masked[block] = torch.mul(given, inside, out=within)
        torch.mul(codes, inside, out=within)  # the position in the range, where x itself may be infinite
        if found.floating:
            _round_to_float8(codes, *scratch)
        else:
            codes.round_()
        grad_scale[block] = codes.sub_(within).mul_(given).sum(1, keepdim=True)
        if grad_shift is not None:
            grad_shift[block] = inside.sub_(1.0).mul_(given).sum(1, keepdim=True)
    return grad_scale, grad_shift, masked.view(grad.shape)


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's minimum and maximum, float32, ``(rows, 1)``: a reduction of float32 takes a third of the time."""
    if rows.dtype in (torch.float32, torch.float64) or not rows.is_contiguous():
        return rows.amin(1, keepdim=True).float(), rows.amax(1, keepdim=True).float()
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    low, high = torch.empty((2, rows.shape[0], 1), dtype=torch.float32)
    buffer = torch.empty((min(step, rows.shape[0]), rows.shape[1]), dtype=torch.float32)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        wide = buffer[: len(part)].copy_(part)
        torch.amin(wide, 1, keepdim=True, out=low[start : start + step])
        torch.amax(wide, 1, keepdim=True, out=high[start : start + step])
    # Which one of zeros with both signs is taken depends on the order of a reduction, so on its dtype.
    zero = ((low == 0) | (high == 0)).squeeze(1)
    if bool(zero.any()):
        low[zero], high[zero] = rows[zero].amin(1, keepdim=True).float(), rows[zero].amax(1, keepdim=True).float()
    return low, high


def _blocks(rows: Tensor, scale: Tensor, shift: Tensor | None, count: int) -> Iterator[tuple[Any, ...]]:
    """Each block of rows with its scales, its positions among the codes before rounding, and scratch like these."""
    step = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    # Made once: the allocator gives large blocks back to the system, and fresh pages cost more than this.
    buffers = [torch.empty((min(step, rows.shape[0]), rows.shape[1]), dtype=torch.float32) for _ in range(count)]
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        row_scale = scale[block]
        if len(row_scale) < step:
            buffers = [buffer[: len(row_scale)] for buffer in buffers]
        # Types narrower than float32 are promoted exactly, and float64 is rounded to it.
        values = rows[block] if rows.dtype is torch.float32 else buffers[0].copy_(rows[block])
        if shift is not None:
            values = torch.add(values, shift[block], out=buffers[0])
        torch.div(values, row_scale, out=buffers[0])
        yield block, row_scale, *buffers


def _round_to_float8(values: Tensor, power: Tensor, sign: Tensor) -> None:
    """Round float32 values within ±448 to float8_e4m3fn's grid, in place, half to even, the sign of zero kept.

    torch's conversion back from float8 is much slower than this on a CPU. A value between 2^e and 2^(e + 1) has
    neighbours at a distance of 2^(e - 3), which is the worth of the last bit of 1.5 * 2^(e + 20): adding and
    subtracting that rounds to them. Below 2^-6 the distance is 2^-9 throughout, as for e = -6. ``power`` and ``sign``
    are scratch of the same shape.
    """
    bits = values.view(torch.int32)
    torch.bitwise_and(bits, 0x7F800000, out=power.view(torch.int32)).clamp_(min=(127 - 6) << 23)
    torch.bitwise_and(bits, -(1 << 31), out=sign.view(torch.int32))
    values.add_(power.mul_(1.5 * 2.0**20)).sub_(power)
    bits.bitwise_or_(sign.view(torch.int32))
