"""Fake quantization on CUDA by Triton: kernels that read the weight once (its range in a long row: twice).

The same operations as `qat.numerics`, in the same order and rounding: a true division (Triton's ``/`` is an
approximation), half-to-even rounding, and no fused multiply-add, which would skip the rounding of the product. Only
`scale_gradients` adds in another order.

A weight is worked on as `QType.grouped` views it, in tiles of whole groups where those are short and of a part of
one row where they are long: the scale is then read once a row of a tile, and no element needs an index divided.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qat.numerics import NARROWEST, qtype_of, smallest_scale

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA brings no Triton
    triton = None

__all__ = [
    "device_of",
    "fake_quantize_weight",
    "moved_scale_shift",
    "quantize_own_range",
    "scale_gradients",
    "supports",
    "triton",
]

_TILE = 2048  # elements of a tile: sixteen for each thread of four warps
_WIDEST = 1024  # columns of a tile
_LONGEST = 16384  # columns of a tile that finds a row's range


def supports(*args: Any) -> bool:
    """Whether Triton computes an operator of these arguments: it rounds to float8 from compute capability 8.9 on."""
    found = qtype_of(next(argument for argument in args if isinstance(argument, str)))
    if triton is None or not found.fused:
        return False
    return not found.floating or torch.cuda.get_device_capability() >= (8, 9)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _tile(first, step, groups, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
        """Row numbers, offsets of the elements, and where both exist, of the tile at column ``step * columns``."""
        row = first * rows + tl.arange(0, rows)
        column = step * columns + tl.arange(0, columns)
        exists = (row < groups)[:, None] & (column < size)[None, :]
        return row, row.to(tl.int64)[:, None] * size + column[None, :], exists

    @triton.jit  # type: ignore[untyped-decorator]
    def _position(value, s, z, affine: tl.constexpr, floating: tl.constexpr):  # type: ignore[no-untyped-def]
        """Where a weight lies among the codes, before rounding; 0 in a group without a range."""
        if affine:
            value = value + z
        x = tl.div_rn(value, s)
        if not floating:
            x = tl.where(s == 0.0, 0.0, x)
        return x

    @triton.jit  # type: ignore[untyped-decorator]
    def code_at(x, floating: tl.constexpr, code_min: tl.constexpr, code_max: tl.constexpr):  # type: ignore[no-untyped-def]
        """The code at a position, as float32, and the position clamped to the codes; NaN stays NaN."""
        x = tl.maximum(x, code_min, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, code_max, propagate_nan=tl.PropagateNan.ALL)
        # The worth of this number's last bit is 1: adding it rounds half to even, and a zero loses its sign, which
        # integer codes have not.
        code = x.to(tl.float8e4nv).to(tl.float32) if floating else (x + 12582912.0) - 12582912.0
        return code, x

    @triton.jit  # type: ignore[untyped-decorator]
    def _value(code, s, z, affine: tl.constexpr, serving: tl.constexpr, out: tl.constexpr):  # type: ignore[no-untyped-def]
        """What a loader makes of a code, in the serving dtype; the code itself where codes are asked for."""
        if out.primitive_bitwidth == 8:
            return code.to(out)
        value = (code * s).to(serving)
        if affine:
            value = (value.to(tl.float32) - z).to(serving)
        return value.to(out)

    @triton.jit  # type: ignore[untyped-decorator]
    def _fake_quantize_kernel(  # type: ignore[no-untyped-def]
        weight, scale, shift, out, groups, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
        affine: tl.constexpr, floating: tl.constexpr, code_min: tl.constexpr, code_max: tl.constexpr,
        serving: tl.constexpr,
    ):  # fmt: skip
        row, offset, exists = _tile(tl.program_id(0), tl.program_id(1), groups, size, rows, columns)
        value = tl.load(weight + offset, mask=exists, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=row < groups, other=1.0)[:, None]
        z = tl.load(shift + row, mask=row < groups, other=0.0)[:, None]
        code, _ = code_at(_position(value, s, z, affine, floating), floating, code_min, code_max)
        tl.store(out + offset, _value(code, s, z, affine, serving, out.dtype.element_ty), mask=exists)

    @triton.jit
    def _smaller(a, b):  # type: ignore[no-untyped-def]
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def larger(a, b):  # type: ignore[no-untyped-def]
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit  # type: ignore[untyped-decorator]
    def _served(  # type: ignore[no-untyped-def]
        width, low, affine: tl.constexpr, serving: tl.constexpr, steps: tl.constexpr, smallest: tl.constexpr,
        anchor: tl.constexpr,
    ):  # fmt: skip
        """`QType.serve` of ranges: scale, and shift (without one: the scale again)."""
        s = tl.div_rn(width, tl.full(width.shape, steps, tl.float32)).to(serving).to(tl.float32)
        if smallest > 0.0:
            s = tl.maximum(s, smallest, propagate_nan=tl.PropagateNan.ALL)
        z = s
        if affine:
            z = (-low).to(serving).to(tl.float32)
            if anchor > 0:
                part = s * anchor
                inner = (part - z).to(serving).to(tl.float32)
                z = z + ((part - inner).to(serving).to(tl.float32) - z)
        return s, z

    @triton.jit  # type: ignore[untyped-decorator]
    def _own_range_kernel(  # type: ignore[no-untyped-def]
        weight, scale, shift, out, groups, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
        affine: tl.constexpr, floating: tl.constexpr, code_min: tl.constexpr, code_max: tl.constexpr,
        serving: tl.constexpr, steps: tl.constexpr, smallest: tl.constexpr, anchor: tl.constexpr,
    ):  # fmt: skip
        """Scale and shift of each group's own range, and the fake-quantized weight."""
        row, offset, exists = _tile(tl.program_id(0), 0, groups, size, rows, columns)
        value = tl.load(weight + offset, mask=exists, other=0.0).to(tl.float32)
        low, high = tl.where(exists, value, float("inf")), tl.where(exists, value, float("-inf"))
        for step in range(1, tl.cdiv(size, columns)):
            _, offset, exists = _tile(tl.program_id(0), step, groups, size, rows, columns)
            value = tl.load(weight + offset, mask=exists, other=0.0).to(tl.float32)
            low = _smaller(low, tl.where(exists, value, float("inf")))
            high = larger(high, tl.where(exists, value, float("-inf")))
        low = tl.reduce(low, 1, _smaller)
        high = tl.reduce(high, 1, larger)
        width = high - low if affine else larger(-low, high)
        s, z = _served(width, low, affine, serving, steps, smallest, anchor)
        tl.store(scale + row, s, mask=row < groups)
        if affine:
            tl.store(shift + row, z, mask=row < groups)
        s, z = s[:, None], z[:, None]
        if size > columns:  # a long row is read again, from the cache; a tile of whole groups is still at hand
            for step in range(tl.cdiv(size, columns)):
                _, offset, exists = _tile(tl.program_id(0), step, groups, size, rows, columns)
                value = tl.load(weight + offset, mask=exists, other=0.0).to(tl.float32)
                code, _ = code_at(_position(value, s, z, affine, floating), floating, code_min, code_max)
                tl.store(out + offset, _value(code, s, z, affine, serving, out.dtype.element_ty), mask=exists)
        else:
            code, _ = code_at(_position(value, s, z, affine, floating), floating, code_min, code_max)
            tl.store(out + offset, _value(code, s, z, affine, serving, out.dtype.element_ty), mask=exists)

    @triton.jit  # type: ignore[untyped-decorator]
    def _scale_gradients_kernel(  # type: ignore[no-untyped-def]
        weight, scale, shift, grad, grad_scale, grad_shift, masked, groups, size: tl.constexpr, rows: tl.constexpr,
        columns: tl.constexpr, affine: tl.constexpr, floating: tl.constexpr, code_min: tl.constexpr,
        code_max: tl.constexpr, serving: tl.constexpr,
    ):  # fmt: skip
        of_scale = tl.zeros((rows, columns), tl.float32)
        of_shift = tl.zeros((rows, columns), tl.float32)
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        s = tl.load(scale + row, mask=row < groups, other=1.0)[:, None]
        z = tl.load(shift + row, mask=row < groups, other=0.0)[:, None]
        for step in range(tl.cdiv(size, columns)):
            _, offset, exists = _tile(tl.program_id(0), step, groups, size, rows, columns)
            value = tl.load(weight + offset, mask=exists, other=0.0).to(tl.float32)
            given = tl.load(grad + offset, mask=exists, other=0.0).to(tl.float32)
            x = tl.where(s == 0.0, 0.0, _position(value, s, z, affine, floating))
            code, clamped = code_at(x, floating, code_min, code_max)
            inside = x == clamped
            tl.store(masked + offset, (given * inside.to(tl.float32)).to(masked.dtype.element_ty), mask=exists)
            of_scale += given * (code - tl.where(inside, x, 0.0))
            of_shift -= tl.where(inside, 0.0, given)
        tl.store(grad_scale + row, tl.sum(of_scale, 1), mask=row < groups)
        if affine:
            tl.store(grad_shift + row, tl.sum(of_shift, 1), mask=row < groups)

    @triton.jit  # type: ignore[untyped-decorator]
    def _moved_kernel(  # type: ignore[no-untyped-def]
        low, high, low_move, high_move, scale, shift, groups, affine: tl.constexpr, serving: tl.constexpr,
        steps: tl.constexpr, smallest: tl.constexpr, anchor: tl.constexpr, narrowest: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Serving scale and shift of each group's moved range."""
        group = tl.program_id(0) * block + tl.arange(0, block)
        exists = group < groups
        top = tl.load(high + group, mask=exists, other=0.0)
        unit = top
        if affine:
            bottom = tl.load(low + group, mask=exists, other=0.0)
            unit = (top - bottom) * 0.5
            bottom = bottom - tl.load(low_move + group, mask=exists, other=0.0) * unit
        top = top + tl.load(high_move + group, mask=exists, other=0.0) * unit
        width = top - bottom if affine else top
        least = unit * (2.0 * narrowest if affine else narrowest)
        top = top + tl.maximum(least - width, 0.0, propagate_nan=tl.PropagateNan.ALL)
        width = top - bottom if affine else top
        s, z = _served(width, bottom if affine else top, affine, serving, steps, smallest, anchor)
        tl.store(scale + group, s, mask=exists)
        if affine:
            tl.store(shift + group, z, mask=exists)


@functools.cache
def _form(out_features: int, in_features: int, qtype: str, dtype: torch.dtype) -> tuple[int, int, int, dict[str, Any]]:
    """Groups of a weight, tiles down and across that cover it, and a kernel's constant arguments."""
    found = qtype_of(qtype)
    size = found.group_size(in_features) or in_features
    groups = out_features * in_features // size
    columns = min(_WIDEST, triton.next_power_of_2(size))
    rows = _TILE // columns
    form = {
        "size": size,
        "rows": rows,
        "columns": columns,
        "affine": found.has_shift,
        "floating": found.floating,
        "code_min": float(found.code_min),
        "code_max": float(found.code_max),
        "serving": getattr(tl, str(dtype).removeprefix("torch.")),
        "enable_fp_fusion": False,  # a fused multiply-add would skip a rounding
    }
    return groups, triton.cdiv(groups, rows), triton.cdiv(size, columns), form


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """The tensor's device as the current one; nothing to do with a single GPU."""
    return nullcontext() if tensor.device.index == torch.cuda.current_device() else torch.cuda.device(tensor.device)


def fake_quantize_weight(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """See `qat.kernels.fake_quantize_weight`: the bits of the specification; tensors on CUDA."""
    weight = weight.detach().contiguous()
    out = torch.empty_like(weight, dtype=out_dtype)
    groups, programs, parts, form = _form(*weight.shape, qtype, dtype)
    tensors = (weight, scale, scale if shift is None else shift, out)
    with device_of(weight):
        _fake_quantize_kernel[(programs, parts)](*tensors, groups, **form)
    return out


def quantize_own_range(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `qat.kernels.quantize_own_range`: the bits of the specification; tensors on CUDA."""
    found = qtype_of(qtype)
    weight = weight.detach().contiguous()
    groups, _, _, form = _form(*weight.shape, qtype, dtype)
    scale = torch.empty((groups, 1), dtype=torch.float32, device=weight.device)
    shift = torch.empty_like(scale) if found.has_shift else None
    out = torch.empty_like(weight, dtype=out_dtype)
    tensors = (weight, scale, scale if shift is None else shift, out)
    # A whole row at once where it fits into registers, so that it is read once.
    columns = min(_LONGEST, triton.next_power_of_2(form["size"]))
    rows = max(1, _TILE // columns)
    form = form | {"rows": rows, "columns": columns, "num_warps": min(16, max(4, columns // 512))}
    with device_of(weight):
        _own_range_kernel[(triton.cdiv(groups, rows),)](
            *tensors, groups, **form, **_serving_of(qtype, dtype, weight.shape[1])
        )
    return out, scale, shift


def moved_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, Tensor | None]:
    """See `qat.kernels.moved_scale_shift`: the bits of the specification; tensors on CUDA."""
    scale = torch.empty_like(high)
    shift = None if low is None else torch.empty_like(high)
    ends = (high if low is None else low, high, high if low_move is None else low_move, high_move)
    with device_of(high):
        _moved_kernel[(triton.cdiv(high.numel(), 1024),)](
            *ends, scale, scale if shift is None else shift, high.numel(), low is not None,
            getattr(tl, str(dtype).removeprefix("torch.")), narrowest=NARROWEST, block=1024, enable_fp_fusion=False,
            **_serving_of(qtype, dtype, in_features),
        )  # fmt: skip
    return scale, shift


@functools.cache
def _serving_of(qtype: str, dtype: torch.dtype, in_features: int) -> dict[str, float]:
    """The numbers of `QType.serve`."""
    found = qtype_of(qtype)
    smallest = smallest_scale(dtype) if found.floating else 0.0
    return {"steps": float(found.steps), "smallest": smallest, "anchor": float(found.anchor(dtype, in_features))}


def scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `qat.kernels.scale_gradients`: the results of the specification, but for the order of the sums."""
    weight, grad = weight.detach().contiguous(), grad.contiguous()
    groups, programs, _, form = _form(*weight.shape, qtype, torch.float32)
    grad_scale, masked = torch.empty_like(scale), torch.empty_like(grad)
    grad_shift = None if shift is None else torch.empty_like(scale)
    tensors = (weight, scale, scale if shift is None else shift, grad)
    made = (grad_scale, grad_scale if grad_shift is None else grad_shift, masked)
    with device_of(weight):
        _scale_gradients_kernel[(programs,)](*tensors, *made, groups, **form)
    return grad_scale, grad_shift, masked
