"""The arithmetic of quantization: pure functions, and the specification of every faster kernel.

Everything follows one rule, *serving arithmetic in the forward*. A loader computes, in the serving dtype,

    value = scale * code            (int8, float8)
    value = scale * code - shift    (int4, int2; product and difference rounded separately)

so training computes the same: scale and shift are first rounded to the serving dtype, codes are found in float32
from those rounded numbers, and the product and the difference are rounded one after the other. Skipping one
rounding would change about half of the bfloat16 weights.

A weight is handled as rows of ``(groups, size)``: a whole row, or one group of it. Scales and shifts have the
shape ``(groups, 1)`` and are always float32 here, holding numbers that the serving dtype can represent.

Codes are found by a true division, as optimum-quanto does (multiplying by a reciprocal moves codes), rounded half
to even. A scale of 0 (a constant group) gives the code 0; a float8 scale is kept above zero by an epsilon that the
serving dtype can hold, because float8 has NaN and 0/0 would be one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.operators import fake_operator, operator
from qat.qtypes import QTYPES, group_size

__all__ = [
    "decode",
    "encode",
    "fake_quantize",
    "grouped",
    "meets_tinygemm",
    "moved_scale_shift",
    "range_scale_shift",
    "round_to",
    "scale_gradients",
    "serving_pair",
    "serving_scale",
    "serving_shift",
    "weight_range",
]


class _RoundTo(torch.autograd.Function):
    """Round to a narrower dtype and come back, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.ops.qat.round_to(tensor, dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@operator
def _round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # An operator of its own because a compiler is free to drop a narrowing cast that is followed by a widening one.
    return tensor.to(dtype).to(torch.float32, copy=True)


@fake_operator("round_to")
def _(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.float32)


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` rounded to ``dtype``, as float32, straight-through; the same eagerly and compiled."""
    if dtype is torch.float32:
        return tensor.float()
    return _RoundTo.apply(tensor, dtype)  # type: ignore[no-any-return,no-untyped-call]


def grouped(weight: Tensor, qtype: str) -> Tensor:
    """View a weight of shape ``(out, in)`` as ``(groups, size)``, the rows that share one scale.

    >>> grouped(torch.zeros(4, 256), "int4").shape
    torch.Size([8, 128])
    """
    size = group_size(qtype, weight.shape[1])
    return weight if size is None else weight.reshape(-1, size)


def smallest_scale(dtype: torch.dtype) -> float:
    """The epsilon that keeps a float8 scale above zero and that ``dtype`` can hold."""
    # float16 reaches down only by its subnormals: its smallest normal, 6e-5, would widen ordinary rows.
    return 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny


def _row_ranges(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each row, ``(rows, 1)``. On a CPU two reductions are ten times faster than ``aminmax``."""
    if rows.device.type == "cpu":
        return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    return low, high


def _over(tensor: Tensor, number: float) -> Tensor:
    """``tensor / number``, rounded once. By a Python number CUDA multiplies with the reciprocal, which rounds twice."""
    return tensor / tensor.new_full((), number)


def weight_range(weight: Tensor, qtype: str) -> tuple[Tensor | None, Tensor]:
    """The ends of each group's range, float32, ``(groups, 1)``: min and max, or None and ``max|w|`` for 8-bit types.

    >>> weight_range(torch.tensor([[-1.0, 2.0], [0.0, 6.0]]), "int2")
    (tensor([[-1.],
            [ 0.]]), tensor([[2.],
            [6.]]))
    """
    low, high = _row_ranges(grouped(weight.detach(), qtype))
    if QTYPES[qtype].affine:
        return low.float(), high.float()
    return None, torch.maximum(-low, high).float()


def range_scale_shift(low: Tensor | None, high: Tensor, qtype: str) -> tuple[Tensor, Tensor | None]:
    """Scale and shift, not yet rounded, whose codes reach from ``low`` to ``high`` (8-bit types: to ``high``).

    >>> range_scale_shift(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), "int2")
    (tensor([[1.]]), tensor([[1.]]))
    """
    if low is None:
        return _over(high, QTYPES[qtype].scale_max), None
    return _over(high - low, QTYPES[qtype].code_max), -low


_NARROWEST = (
    2.0**-7
)  # of the start range: ends that are moved towards each other stop there, and the scale stays above 0


def moved_scale_shift(
    low: Tensor | None, high: Tensor, low_move: Tensor | None, high_move: Tensor, qtype: str
) -> tuple[Tensor, Tensor | None]:
    """Scale and shift, not yet rounded, of a range whose ends were moved outwards.

    The unit of a move is half the range's width (8-bit types: ``high``), so that moves of m turn a symmetric range
    into ``1 + m`` times itself. A range keeps at least 1/128 of its width, straight-through, so that it can recover.

    Args:
        low: the low end at the start, float32, ``(groups, 1)``; None for 8-bit types.
        high: the high end at the start.
        low_move: how far down the low end went.
        high_move: how far up the high end went.
        qtype: the target format's name.

    >>> moved_scale_shift(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), torch.zeros(1, 1), torch.ones(1, 1), "int2")
    (tensor([[1.]]), tensor([[1.]]))
    """
    unit = high if low is None else (high - low) / 2
    moved_high = high + high_move * unit
    moved_low = None if low is None or low_move is None else low - low_move * unit
    width = moved_high if moved_low is None else moved_high - moved_low
    narrowest = unit * (_NARROWEST if low is None else 2 * _NARROWEST)
    missing = (narrowest - width).clamp(min=0).detach()
    return range_scale_shift(moved_low, moved_high + missing, qtype)


def meets_tinygemm(qtype: str, dtype: torch.dtype, in_features: int) -> bool:
    """Whether the format's int4 kernel (bfloat16, groups of 128) will re-associate scale and shift."""
    return qtype == "int4" and dtype is torch.bfloat16 and group_size(qtype, in_features) == 128


def serving_scale(scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    """``scale`` as the serving dtype holds it, float32, straight-through; at least an epsilon for float8."""
    rounded = round_to(scale, dtype)
    return rounded.clamp(min=smallest_scale(dtype)) if QTYPES[qtype].floating else rounded


def serving_shift(shift: Tensor, scale: Tensor, dtype: torch.dtype, *, tinygemm: bool = False) -> Tensor:
    """``shift`` as the serving dtype holds it, float32, straight-through.

    Args:
        shift: float32, ``(groups, 1)``.
        scale: the serving scale of the same groups.
        dtype: the serving dtype.
        tinygemm: move the shift to a fixed point of ``8 * scale - (8 * scale - shift)`` in ``dtype``. optimum-quanto's
            int4 kernel stores ``8 * scale - shift`` and recovers the shift by the outer difference; at the fixed
            point that loses nothing, and the values survive moves between kernels and devices.
    """
    rounded = round_to(shift, dtype)
    if not tinygemm:
        return rounded
    with torch.no_grad():
        half = scale * 8  # a power of two: exact in every binary dtype
        fixed = round_to(half - round_to(half - rounded, dtype), dtype)
    return rounded + (fixed - rounded.detach())


def serving_pair(
    scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of a weight with ``in_features`` columns as the serving dtype holds them, straight-through."""
    scale = serving_scale(scale, qtype, dtype)
    if shift is None:
        return scale, None
    return scale, serving_shift(shift, scale, dtype, tinygemm=meets_tinygemm(qtype, dtype, in_features))


def encode(weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str) -> Tensor:
    """Codes of a weight.

    Args:
        weight: ``(out, in)``, any float dtype.
        scale: serving scale, float32, ``(groups, 1)``.
        shift: serving shift, float32, ``(groups, 1)``; None for 8-bit types.
        qtype: the target format's name.

    Returns:
        Codes of shape ``(out, in)``: int8, float8_e4m3fn, or uint8 for the affine types.

    >>> encode(torch.tensor([[-1.0, 0.5, 2.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]), "int2")
    tensor([[0, 2, 3]], dtype=torch.uint8)
    """
    kind = QTYPES[qtype]
    codes = _float_codes(grouped(weight.detach(), qtype).float(), scale, shift, qtype)
    return codes.to(getattr(torch, kind.storage)).reshape(weight.shape)


def _float_codes(rows: Tensor, scale: Tensor, shift: Tensor | None, qtype: str) -> Tensor:
    kind = QTYPES[qtype]
    codes = (rows / scale) if shift is None else (rows + shift).div_(scale)
    if not kind.floating:
        codes.round_()
        codes.masked_fill_(scale == 0, 0)  # 0/0 and x/0: see the module's docstring
    return codes.clamp_(kind.code_min, kind.code_max)


def decode(codes: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype) -> Tensor:
    """Values of codes in the serving dtype: ``scale * code - shift`` with the loader's own two roundings.

    Args:
        codes: ``(out, in)`` as `encode` gives them.
        scale: serving scale, float32, ``(groups, 1)``.
        shift: serving shift or None.
        qtype: the target format's name.
        dtype: serving dtype; also the result's.

    >>> codes = torch.tensor([[0, 2, 3]], dtype=torch.uint8)
    >>> decode(codes, torch.tensor([[1.0]]), torch.tensor([[1.0]]), "int2", torch.float32)
    tensor([[-1.,  1.,  2.]])
    """
    rows = grouped(codes, qtype).to(dtype)
    values = scale.to(dtype) * rows
    if shift is not None:
        values -= shift.to(dtype)
    return values.reshape(codes.shape)


def fake_quantize(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """The weight that a loader will rebuild, in ``out_dtype``: ``decode(encode(weight))``.

    It has no gradient; `qat.layers` defines that.

    >>> weight, scale = torch.tensor([[-1.0, 0.6, 99.0]]), torch.tensor([[0.5]])
    >>> fake_quantize(weight, scale, None, "int8", torch.float32, torch.float32)
    tensor([[-1.0000,  0.5000, 63.5000]])
    """
    return decode(encode(weight, scale, shift, qtype), scale, shift, qtype, dtype).to(out_dtype)


def scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Straight-through gradients of ``v = s q(w) - z`` with respect to scale and shift, and the inside mask.

    With ``x = (w + z) / s`` and ``in`` where x lies within the codes' range (LSQ, Esser et al. 2020, eq. 3; LSQ+,
    Bhalgat et al. 2020, eq. 5-6): ``dv/ds = q - x in``, ``dv/dz = in - 1``, ``dv/dw = in``.

    Returns:
        ``grad_scale`` and ``grad_shift`` (float32, ``(groups, 1)``; None without a shift), and ``in`` (bool,
        ``(out, in)``).

    >>> weight, ones = torch.tensor([[1.25, 200.0]]), torch.ones(1, 2)
    >>> scale_gradients(weight, torch.tensor([[1.0]]), None, "int8", ones)  # (1 - 1.25) + 127
    (tensor([[126.7500]]), None, tensor([[ True, False]]))
    """
    kind = QTYPES[qtype]
    rows = grouped(weight.detach(), qtype).float()
    grad_rows = grouped(grad, qtype).float()
    x = rows / scale if shift is None else (rows + shift) / scale
    x = x.masked_fill(scale == 0, 0)
    inside = (x >= kind.code_min) & (x <= kind.code_max)
    clamped = x.clamp(kind.code_min, kind.code_max)
    codes = clamped.to(torch.float8_e4m3fn).float() if kind.floating else clamped.round()
    grad_scale = (grad_rows * (codes - torch.where(inside, x, 0.0))).sum(1, keepdim=True)
    grad_shift = None if shift is None else (grad_rows * (inside.float() - 1.0)).sum(1, keepdim=True)
    return grad_scale, grad_shift, inside.reshape(weight.shape)
