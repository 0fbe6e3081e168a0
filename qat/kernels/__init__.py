"""The fast form of `qat.numerics`, behind opaque operators and one dispatch.

Fake quantization is an *operator*, not a chain of tensor expressions, for two reasons. A compiler that sees the
chain drops its narrowing casts and fuses its two roundings, and then trains other weights than are served. And an
operator can be implemented once per device: in cache-sized blocks on a CPU (`qat.kernels.cpu`), by Triton on
CUDA (`qat.kernels.triton`), or plainly as `qat.numerics` says, which is what tests compare both with.

The operators have no gradient of their own; `qat.layers` defines the straight-through gradient around them.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from qat import numerics
from qat.operators import fake_operator, operator
from qat.qtypes import QTYPES

__all__ = [
    "fake_quantize_activation",
    "fake_quantize_weight",
    "inside_range",
    "moved_scale_shift",
    "quantize_own_range",
    "scale_gradients",
    "serving_range",
]


def _triton(weight: Tensor, qtype: str) -> ModuleType | None:
    """`qat.kernels.triton` where it can work on this weight."""
    if weight.device.type != "cuda":
        return None
    from qat.kernels import triton

    return triton if triton.available(qtype) else None


@operator
def _fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    qtype: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    if weight.device.type == "cpu":
        from qat.kernels import cpu

        return cpu.fake_quantize(weight, scale, shift, qtype, dtype, out_dtype)
    if (triton := _triton(weight, qtype)) is not None:
        return triton.fake_quantize(weight, scale, shift, qtype, dtype, out_dtype)  # type: ignore[no-any-return]
    return numerics.fake_quantize(weight, scale, shift, qtype, dtype, out_dtype)


@fake_operator("fake_quantize_weight")
def _(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    qtype: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=out_dtype)


def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    qtype: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    after: Tensor | None = None,
) -> Tensor:
    """The weight that a loader will rebuild: `numerics.fake_quantize`, bit for bit, without a gradient.

    Args:
        weight: master weight, ``(out, in)``, any float dtype.
        scale: serving scale, float32, ``(groups, 1)``.
        shift: serving shift, float32, ``(groups, 1)``, or None for 8-bit types.
        qtype: the target format's name.
        dtype: serving dtype, in which ``scale * code - shift`` is rounded.
        out_dtype: dtype of the result.
        after: a tensor that must exist first; never read. A backward pass names its incoming gradient here, so
            that a compiler cannot move this recomputation into the forward pass and keep its result in memory.
    """
    return torch.ops.qat.fake_quantize_weight(weight, scale, shift, qtype, dtype, out_dtype, after)  # type: ignore[no-any-return]


@operator
def _serving_range(weight: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shift: Tensor | None
    if (triton := _triton(weight, qtype)) is not None:
        _, scale, shift = triton.own_range(weight, qtype, dtype, None)
    else:
        scale, shift = numerics.range_scale_shift(*numerics.weight_range(weight, qtype), qtype)
        scale, shift = numerics.serving_pair(scale, shift, qtype, dtype, weight.shape[1])
        scale, shift = scale.clone(), None if shift is None else shift.clone()
    return scale, scale.new_empty(0) if shift is None else shift


@fake_operator("serving_range")
def _serving_range_shapes(weight: Tensor, qtype: str, dtype: object = None) -> tuple[Tensor, Tensor]:
    groups = numerics.grouped(weight, qtype).shape[0]
    scale = weight.new_empty((groups, 1), dtype=torch.float32)
    return scale, torch.empty_like(scale) if QTYPES[qtype].affine else scale.new_empty(0)


def serving_range(weight: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Serving scale and shift of the weight's own range: absmax a row for 8-bit types, min to max a group for others.

    Args:
        weight: ``(out, in)``, any float dtype.
        qtype: the target format's name.
        dtype: the serving dtype.

    Returns:
        float32, ``(groups, 1)`` each; no shift for 8-bit types. The same bits on every device.
    """
    scale, shift = torch.ops.qat.serving_range(weight, qtype, dtype)
    return scale, shift if QTYPES[qtype].affine else None


@operator
def _quantize_own_range(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if (triton := _triton(weight, qtype)) is not None:
        value, scale, shift = triton.own_range(weight, qtype, dtype, out_dtype)
    else:
        scale, shift = serving_range(weight, qtype, dtype)
        value = fake_quantize_weight(weight, scale, shift, qtype, dtype, out_dtype)
    return value, scale, scale.new_empty(0) if shift is None else shift


@fake_operator("quantize_own_range")
def _(weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=out_dtype), *_serving_range_shapes(weight, qtype)


def quantize_own_range(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`serving_range`, and `fake_quantize_weight` with it: on CUDA in one kernel.

    Returns:
        the fake-quantized weight in ``out_dtype``, the scale, and the shift (None for 8-bit types).
    """
    value, scale, shift = torch.ops.qat.quantize_own_range(weight, qtype, dtype, out_dtype)
    return value, scale, shift if QTYPES[qtype].affine else None


@operator
def _moved_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    scale, shift = numerics.moved_scale_shift(low, high, low_move, high_move, qtype)
    scale, shift = numerics.serving_pair(scale, shift, qtype, dtype, in_features)
    return scale.clone(), scale.new_empty(0) if shift is None else shift.clone()


@fake_operator("moved_scale_shift")
def _(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(high), high.new_empty(0) if low is None else torch.empty_like(high)


def moved_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, Tensor | None]:
    """The serving scale and shift of `numerics.moved_scale_shift`; a compiler would fuse its products with its sums.

    Args:
        low: see there, as of the next four.
        high: float32, ``(groups, 1)``.
        low_move: None without ``low``.
        high_move: like ``high``.
        qtype: the target format's name.
        dtype: the serving dtype.
        in_features: columns of the weight, which decide whether the shift needs its fixed point.
    """
    scale, shift = torch.ops.qat.moved_scale_shift(low, high, low_move, high_move, qtype, dtype, in_features)
    return scale, None if low is None else shift


@operator
def _scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.device.type == "cpu":
        from qat.kernels import cpu

        grad_scale, grad_shift, masked = cpu.scale_gradients(weight, scale, shift, qtype, grad)
    elif (triton := _triton(weight, qtype)) is not None:
        grad_scale, grad_shift, masked = triton.scale_gradients(weight, scale, shift, qtype, grad)
    else:
        grad_scale, grad_shift, inside = numerics.scale_gradients(weight, scale, shift, qtype, grad)
        masked = grad * inside
    return grad_scale, grad_scale.new_empty(0) if grad_shift is None else grad_shift, masked


@fake_operator("scale_gradients")
def _(weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_shift = scale.new_empty(0) if shift is None else torch.empty_like(scale)
    return torch.empty_like(scale), grad_shift, grad.new_empty(grad.shape)


def scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`numerics.scale_gradients`, with sums in the same order eagerly and compiled.

    Returns:
        ``grad_scale`` and ``grad_shift`` as there, and ``grad`` where the weight lies inside the range, else 0.
    """
    grad_scale, grad_shift, masked = torch.ops.qat.scale_gradients(weight, scale, shift, qtype, grad)
    return grad_scale, None if shift is None else grad_shift, masked


@operator
def _fake_quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    kind = QTYPES[qtype]
    scale = scale.to(dtype)
    codes = x.to(dtype) / scale  # rounded to the serving dtype before it is rounded to a code, as the loader does
    if not kind.floating:
        codes.round_()
    codes.clamp_(kind.code_min, kind.code_max)
    if kind.floating:
        codes = codes.to(torch.float8_e4m3fn).to(dtype)
    return codes.mul_(scale).to(x.dtype)


@fake_operator("fake_quantize_activation")
def _(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


def fake_quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    """``scale * clamp(round(x / scale))`` with one scale a tensor, every step rounded to the serving dtype.

    Args:
        x: any shape, any float dtype; also the result's.
        scale: float32 scalar.
        qtype: ``"int8"`` or ``"float8"``.
        dtype: the serving dtype.
    """
    return torch.ops.qat.fake_quantize_activation(x, scale, qtype, dtype)  # type: ignore[no-any-return]


def inside_range(x: Tensor, scale: Tensor, qtype: str) -> Tensor:
    """Where ``x / scale`` lies within the codes' range: bool, the shape of ``x``."""
    kind = QTYPES[qtype]
    scale = scale.to(x.dtype)
    return (x >= scale * kind.code_min) & (x <= scale * kind.code_max)
