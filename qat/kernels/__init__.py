"""The fast form of `qat.numerics`, behind opaque operators (docs/numerics.md says why they are opaque).

An operator is implemented once per device: in cache-sized blocks on a CPU (`qat.kernels.cpu`), by Triton on CUDA
(`qat.kernels.triton`), or plainly as `qat.numerics` says, which is what tests compare both with. A further device is
one file, and its `implement` below.

The operators have no gradient of their own; `qat.layers` and `qat.quantizers` define it around them. A missing shift
is an empty tensor in their results, since an operator cannot return None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import QType, moved_range, qtype_of
from qat.operators import implement, operator

__all__ = [
    "fake_quantize_activation",
    "fake_quantize_weight",
    "moved_scale_shift",
    "quantize_own_range",
    "scale_gradients",
]


def _scale_shapes(weight: Tensor, qtype: str) -> tuple[Tensor, Tensor]:
    found = qtype_of(qtype)
    scale = weight.new_empty((found.grouped(weight).shape[0], 1), dtype=torch.float32)
    return scale, torch.empty_like(scale) if found.has_shift else scale.new_empty(0)


def _or_empty(shift: Tensor | None, scale: Tensor) -> Tensor:
    return scale.new_empty(0) if shift is None else shift


@operator(lambda weight, scale, shift, qtype, dtype, out_dtype, after: weight.new_empty(weight.shape, dtype=out_dtype))
def _fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    qtype: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    after: Tensor | None,
) -> Tensor:
    return qtype_of(qtype).fake_quantize(weight, scale, shift, dtype, out_dtype)


def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    qtype: QType,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    after: Tensor | None = None,
) -> Tensor:
    """The weight that a loader will rebuild: `QType.fake_quantize`, bit for bit, without a gradient.

    ``after`` must exist first, and is never read. A backward pass names its incoming gradient here, so that a compiler
    cannot move this recomputation into the forward pass and keep its result in memory.
    """
    return torch.ops.qat.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, out_dtype, after)  # type: ignore[no-any-return]


@operator(
    lambda weight, qtype, dtype, out_dtype: (
        weight.new_empty(weight.shape, dtype=out_dtype),
        *_scale_shapes(weight, qtype),
    )
)
def _quantize_own_range(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    found = qtype_of(qtype)
    scale, shift = found.serve(*found.scale_shift(*found.weight_range(weight)), dtype, weight.shape[1])
    value = torch.ops.qat.fake_quantize_weight(weight, scale, shift, qtype, dtype, out_dtype, None)
    return value, scale.clone(), _or_empty(shift, scale).clone()


def quantize_own_range(
    weight: Tensor, qtype: QType, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fake-quantize a weight by its own range: absmax of a row, or minimum to maximum of a group. One pass on CUDA.

    Returns the fake-quantized weight with its serving scale and shift (float32, ``(groups, 1)``; None for types without
    one): the same bits on every device.
    """
    value, scale, shift = torch.ops.qat.quantize_own_range(weight, qtype.key, dtype, out_dtype)
    return value, scale, shift if qtype.has_shift else None


@operator(
    lambda low, high, low_move, high_move, qtype, dtype, in_features: (
        torch.empty_like(high),
        high.new_empty(0) if low is None else torch.empty_like(high),
    )
)
def _moved_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, Tensor]:
    found = qtype_of(qtype)
    ends = moved_range(low, high, low_move, high_move)
    scale, shift = found.serve(*found.scale_shift(*ends), dtype, in_features)
    return scale.clone(), _or_empty(shift, scale).clone()


def moved_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: QType,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, Tensor | None]:
    """The serving scale and shift of a `numerics.moved_range`; a compiler would fuse its products with its sums."""
    scale, shift = torch.ops.qat.moved_scale_shift(low, high, low_move, high_move, qtype.key, dtype, in_features)
    return scale, None if low is None else shift


@operator(
    lambda weight, scale, shift, qtype, grad: (
        torch.empty_like(scale),
        scale.new_empty(0) if shift is None else torch.empty_like(scale),
        grad.new_empty(grad.shape),
    )
)
def _scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale, grad_shift, masked = qtype_of(qtype).scale_gradients(weight, scale, shift, grad)
    return grad_scale, _or_empty(grad_shift, grad_scale), masked


def scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: QType, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`QType.scale_gradients`, with sums in the same order eagerly and compiled."""
    grad_scale, grad_shift, masked = torch.ops.qat.scale_gradients(weight, scale, shift, qtype.key, grad)
    return grad_scale, None if shift is None else grad_shift, masked


@operator(lambda x, scale, qtype, dtype: torch.empty_like(x))
def _fake_quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
    return qtype_of(qtype).fake_quantize_activation(x, scale, dtype)


def fake_quantize_activation(x: Tensor, scale: Tensor, qtype: QType, dtype: torch.dtype) -> Tensor:
    """See `QType.fake_quantize_activation`."""
    return torch.ops.qat.fake_quantize_activation(x, scale, qtype.key, dtype)  # type: ignore[no-any-return]


implement(_fake_quantize_weight, "CPU", "qat.kernels.cpu")
implement(_scale_gradients, "CPU", "qat.kernels.cpu")
implement(_fake_quantize_weight, "CUDA", "qat.kernels.triton")
implement(_quantize_own_range, "CUDA", "qat.kernels.triton")
implement(_scale_gradients, "CUDA", "qat.kernels.triton")
