"""Gradients in float8 on CUDA: rows of the gradient, or its columns, get a scale each, and cuBLAS multiplies codes.

Hopper multiplies float8 matrices only if both lie along the sum. So the gradient is quantized once along each side, and
the codes of weight and input are transposed, a byte an element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.kernels.triton import device_of, triton
from qat.kernels.triton_codes import mask_in_place, supports

if triton is not None:
    import triton.language as tl

__all__ = ["float8_input_gradient", "float8_weight_gradient", "supports"]

_TILE = 64
_TALL = 256  # rows of which one program finds the columns' largest magnitudes

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _rows_kernel(grad, factor, codes, scale, size, smallest: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
        """Quantize a row of ``grad * factor`` by its largest magnitude."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, columns)
        value = tl.load(grad + row * size + column, mask=column < size, other=0.0).to(tl.float32)
        value *= tl.load(factor + column, mask=column < size, other=0.0)
        s = tl.maximum(_largest(tl.abs(value)) / 448.0, smallest, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scale + row, s)
        tl.store(codes + row * size + column, tl.div_rn(value, s).to(tl.float8e4nv), mask=column < size)

    @triton.jit
    def _larger(a, b):  # type: ignore[no-untyped-def]
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _largest(values):  # type: ignore[no-untyped-def]
        return tl.reduce(values, 0, _larger)

    @triton.jit  # type: ignore[untyped-decorator]
    def _column_ranges_kernel(grad, largest, rows, size, tall: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
        column = tl.program_id(0) * tile + tl.arange(0, tile)
        found = tl.zeros((tile, tile), tl.float32)
        for step in range(0, tall, tile):
            row = tl.program_id(1).to(tl.int64) * tall + step + tl.arange(0, tile)
            exists = (row < rows)[:, None] & (column < size)[None, :]
            value = tl.load(grad + row[:, None] * size + column[None, :], mask=exists, other=0.0).to(tl.float32)
            found = tl.maximum(found, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        # The bits of magnitudes are ordered as integers are, NaN above all.
        bits = _largest(found).to(tl.int32, bitcast=True)
        tl.atomic_max(largest + column, bits, mask=column < size)

    @triton.jit  # type: ignore[untyped-decorator]
    def _transpose_kernel(  # type: ignore[no-untyped-def]
        values, scale, out, rows, size, scaled: tl.constexpr, tile: tl.constexpr
    ):  # fmt: skip
        """``out`` is the transposed ``values``, or its float8 codes by a scale a column."""
        row = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
        column = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        exists = (row < rows)[:, None] & (column < size)[None, :]
        value = tl.load(values + row[:, None] * size + column[None, :], mask=exists)
        if scaled:
            s = tl.load(scale + column, mask=column < size, other=1.0)
            value = tl.div_rn(value.to(tl.float32), tl.broadcast_to(s[None, :], (tile, tile))).to(tl.float8e4nv)
        tl.store(out + column[:, None] * rows + row[None, :], tl.trans(value), mask=tl.trans(exists))


def float8_input_gradient(grad: Tensor, codes: Tensor, scale: Tensor, inside: Tensor | None) -> Tensor:
    """See `qat.kernels.float8_input_gradient`."""
    grad = grad.contiguous()
    rows, size = grad.shape
    found = torch.empty_like(grad, dtype=torch.float8_e4m3fn)
    row_scale = torch.empty((rows, 1), device=grad.device)
    with device_of(grad):
        columns = triton.next_power_of_2(size)
        warps = min(16, max(4, columns // 1024))
        _rows_kernel[(rows,)](grad, scale, found, row_scale, size, 1e-30, columns, num_warps=warps)
    ones = torch.ones((1, codes.shape[1]), device=grad.device)
    product = torch._scaled_mm(found, _transposed(codes).t(), row_scale, ones, out_dtype=grad.dtype)
    return product if inside is None else mask_in_place(product, inside)


def float8_weight_gradient(grad: Tensor, x: Tensor, x_scale: Tensor) -> Tensor:
    """See `qat.kernels.float8_weight_gradient`."""
    grad = grad.contiguous()
    rows, size = grad.shape
    bits = torch.zeros((size,), dtype=torch.int32, device=grad.device)
    with device_of(grad):
        grid = (triton.cdiv(size, _TILE), triton.cdiv(rows, _TALL))
        _column_ranges_kernel[grid](grad, bits, rows, size, _TALL, _TILE)
    scale = (bits.view(torch.float32) / 448).clamp_(min=1e-30)[:, None]
    x_scales = x_scale.expand(1, x.shape[1]).contiguous()
    return torch._scaled_mm(_transposed(grad, scale), _transposed(x).t(), scale, x_scales, out_dtype=grad.dtype)


def _transposed(values: Tensor, scale: Any = None) -> Tensor:
    rows, size = values.shape
    out = torch.empty((size, rows), dtype=torch.float8_e4m3fn, device=values.device)
    if scale is None:  # bytes are moved as they are
        values, written = values.view(torch.uint8), out.view(torch.uint8)
    else:
        written = out
    with device_of(values):
        grid = (triton.cdiv(size, _TILE), triton.cdiv(rows, _TILE))
        _transpose_kernel[grid](
            values, values if scale is None else scale, written, rows, size, scale is not None, _TILE
        )
    return out
