"""Gradients in float8 on CUDA: rows of the gradient, and its columns, get a scale each, and cuBLAS multiplies codes.

Hopper multiplies float8 matrices only if both lie along the sum. So the gradient is quantized along both sides, read
twice: for all its ranges, and for all its codes. The codes of the input are transposed, a byte an element, and those of
the weight are made in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.kernels.triton import device_of, triton
from qat.kernels.triton_codes import mask_in_place, supports

if triton is not None:
    import triton.language as tl

    from qat.kernels.triton import code_at, larger

__all__ = ["float8_gradients", "supports"]

_TILE = 64
_TALL = 256  # rows of which one program finds the columns' largest magnitudes

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _largest(values, axis: tl.constexpr):  # type: ignore[no-untyped-def]
        """The bits of the largest, which are ordered as integers are, NaN above all."""
        return tl.reduce(values, axis, larger).to(tl.int32, bitcast=True)

    @triton.jit  # type: ignore[untyped-decorator]
    def _ranges_kernel(  # type: ignore[no-untyped-def]
        grad, factor, of_rows, of_columns, rows, size, by_row: tl.constexpr, by_column: tl.constexpr,
        tall: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        """The largest magnitudes of rows of ``grad * factor``, and of columns of ``grad``."""
        column = tl.program_id(0) * tile + tl.arange(0, tile)
        scale = tl.load(factor + column, mask=column < size, other=0.0)[None, :]
        found = tl.zeros((tile, tile), tl.float32)
        for step in range(0, tall, tile):
            row = tl.program_id(1).to(tl.int64) * tall + step + tl.arange(0, tile)
            exists = (row < rows)[:, None] & (column < size)[None, :]
            value = tl.load(grad + row[:, None] * size + column[None, :], mask=exists, other=0.0).to(tl.float32)
            if by_row:
                bits = _largest(tl.abs(value * scale), 1)
                tl.atomic_max(of_rows + row, bits, mask=row < rows, sem="relaxed")
            if by_column:
                found = larger(found, tl.abs(value))
        if by_column:
            tl.atomic_max(of_columns + column, _largest(found, 0), mask=column < size, sem="relaxed")

    @triton.jit  # type: ignore[untyped-decorator]
    def _codes_kernel(  # type: ignore[no-untyped-def]
        grad, factor, row_scale, column_scale, codes, transposed, rows, size, by_row: tl.constexpr,
        by_column: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        """Codes of ``grad * factor`` by rows, and of ``grad`` by columns, which come transposed."""
        row = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
        column = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        exists = (row < rows)[:, None] & (column < size)[None, :]
        offset = row[:, None] * size + column[None, :]
        value = tl.load(grad + offset, mask=exists, other=0.0).to(tl.float32)
        if by_row:
            scaled = value * tl.load(factor + column, mask=column < size, other=0.0)[None, :]
            s = tl.broadcast_to(tl.load(row_scale + row, mask=row < rows, other=1.0)[:, None], (tile, tile))
            tl.store(codes + offset, tl.div_rn(scaled, s).to(tl.float8e4nv), mask=exists)
        if by_column:
            s = tl.broadcast_to(tl.load(column_scale + column, mask=column < size, other=1.0)[None, :], (tile, tile))
            turned = tl.trans(tl.div_rn(value, s).to(tl.float8e4nv))
            tl.store(transposed + column[:, None] * rows + row[None, :], turned, mask=tl.trans(exists))

    @triton.jit  # type: ignore[untyped-decorator]
    def _transpose_kernel(  # type: ignore[no-untyped-def]
        values, scale, out, rows, size, scaled: tl.constexpr, tile: tl.constexpr
    ):  # fmt: skip
        """``out`` is the transposed ``values``, or its float8 codes by a scale a row."""
        row = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
        column = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        exists = (row < rows)[:, None] & (column < size)[None, :]
        value = tl.load(values + row[:, None] * size + column[None, :], mask=exists)
        if scaled:
            s = tl.broadcast_to(tl.load(scale + row, mask=row < rows, other=1.0)[:, None], (tile, tile))
            code, _ = code_at(tl.div_rn(value.to(tl.float32), s), True, -448.0, 448.0)
            value = code.to(tl.float8e4nv)
        tl.store(out + column[:, None] * rows + row[None, :], tl.trans(value), mask=tl.trans(exists))


def float8_gradients(
    grad: Tensor, weight: Tensor, scale: Tensor, inside: Tensor | None, x: Tensor, x_scale: Tensor, qtype: str,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """See `qat.kernels.float8_gradients`."""
    grad, scale = grad.contiguous(), scale.contiguous()
    (rows, size), device = grad.shape, grad.device
    bits = torch.zeros((rows + size,), dtype=torch.int32, device=device)
    codes = torch.empty((rows, size) if needs_x else (0,), dtype=torch.float8_e4m3fn, device=device)
    transposed = torch.empty((size, rows) if needs_weight else (0,), dtype=torch.float8_e4m3fn, device=device)
    across = triton.cdiv(size, _TILE)
    with device_of(grad):
        options = (rows, size, needs_x, needs_weight)
        _ranges_kernel[(across, triton.cdiv(rows, _TALL))](grad, scale, bits, bits[rows:], *options, _TALL, _TILE)
        scales = (bits.view(torch.float32) / 448).clamp_(min=1e-30)[:, None]
        row_scale, column_scale = scales[:rows], scales[rows:]
        _codes_kernel[(across, triton.cdiv(rows, _TILE))](
            grad, scale, row_scale, column_scale, codes, transposed, *options, _TILE
        )
    grad_x = grad_weight = None
    if needs_x:
        ones = torch.ones((1, x.shape[1]), device=device)
        turned = _transposed(weight, None if weight.dtype is codes.dtype else scale)
        grad_x = torch._scaled_mm(codes, turned.t(), row_scale, ones, out_dtype=grad.dtype)
        grad_x = grad_x if inside is None else mask_in_place(grad_x, inside)
    if needs_weight:
        x_scales = x_scale.expand(1, x.shape[1]).contiguous()
        grad_weight = torch._scaled_mm(transposed, _transposed(x).t(), column_scale, x_scales, out_dtype=grad.dtype)
    return grad_x, grad_weight


def _transposed(values: Tensor, scale: Tensor | None = None) -> Tensor:
    """The transposed codes, given these, or a weight and its scale a row."""
    values = values.contiguous()
    rows, size = values.shape
    out = torch.empty((size, rows), dtype=torch.float8_e4m3fn, device=values.device)
    # Bytes are moved as they are.
    given, written = (values.view(torch.uint8), out.view(torch.uint8)) if scale is None else (values, out)
    grid = (triton.cdiv(size, _TILE), triton.cdiv(rows, _TILE))
    with device_of(values):
        _transpose_kernel[grid](given, out if scale is None else scale, written, rows, size, scale is not None, _TILE)
    return out
