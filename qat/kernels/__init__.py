"""The fast form of `qat.numerics`, behind opaque operators (docs/numerics.md says why they are opaque).

An operator is implemented once per device: in cache-sized blocks on a CPU (`qat.kernels.cpu`), by Triton on CUDA
(`qat.kernels.triton`), or plainly as here, in the words of `qat.numerics`, which is what tests compare both with. A
further device is one file, and its name at the operators that it computes.

Operators take a type by its `QType.key`, and have no gradient of their own; `qat.layers` and `qat.quantizers` define
it around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.numerics import moved_range, pack_bits, qtype_of, unpack_bits
from qat.operators import OptionalResult, operator

__all__ = [
    "dequantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "float8_gradients",
    "linear_codes",
    "linear_codes_quantized",
    "masked_gradient",
    "masked_product",
    "moved_scale_shift",
    "quantize_activation",
    "quantize_own_range",
    "scale_gradients",
]


@operator(
    lambda weight, scale, shift, qtype, dtype, out_dtype, **_: weight.new_empty(weight.shape, dtype=out_dtype),
    CPU="qat.kernels.cpu",
    CUDA="qat.kernels.triton",
)
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
    """The weight that a loader will rebuild: `QType.fake_quantize`, bit for bit, contiguous, without a gradient.

    Asked for in the type's `storage` dtype, it is the codes.

    ``after`` must exist first, and is never read. A backward pass names its incoming gradient here, so that a compiler
    cannot move this recomputation into the forward pass and keep its result in memory.
    """
    return qtype_of(qtype).fake_quantize(weight, scale, shift, dtype, out_dtype).contiguous()


def _own_range_shapes(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    found = qtype_of(qtype)
    scale = weight.new_empty((found.grouped(weight).shape[0], 1), dtype=torch.float32)
    shift = torch.empty_like(scale) if found.has_shift else None
    return weight.new_empty(weight.shape, dtype=out_dtype), scale, shift


@operator(_own_range_shapes, CPU="qat.kernels.cpu", CUDA="qat.kernels.triton")
def quantize_own_range(
    weight: Tensor, qtype: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, OptionalResult]:
    """Fake-quantize a weight by its own range: absmax of a row, or minimum to maximum of a group. One pass on CUDA.

    Returns the fake-quantized weight with its serving scale and shift (float32, ``(groups, 1)``; None for types without
    one): the same bits on every device.
    """
    found = qtype_of(qtype)
    scale, shift = found.serve(*found.scale_shift(*found.weight_range(weight)), dtype, weight.shape[1])
    return fake_quantize_weight(weight, scale, shift, qtype, dtype, out_dtype), scale, shift


@operator(
    lambda low, high, *_: (torch.empty_like(high), None if low is None else torch.empty_like(high)),
    CUDA="qat.kernels.triton",
)
def moved_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_move: Tensor | None,
    high_move: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, OptionalResult]:
    """The serving scale and shift of a `numerics.moved_range`; a compiler would fuse its products with its sums."""
    found = qtype_of(qtype)
    return found.serve(*found.scale_shift(*moved_range(low, high, low_move, high_move)), dtype, in_features)


@operator(
    lambda weight, scale, shift, qtype, grad: (
        torch.empty_like(scale),
        None if shift is None else torch.empty_like(scale),
        grad.new_empty(grad.shape),
    ),
    CPU="qat.kernels.cpu",
    CUDA="qat.kernels.triton",
)
def scale_gradients(
    weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: str, grad: Tensor
) -> tuple[Tensor, OptionalResult, Tensor]:
    """`QType.scale_gradients`, with sums in the same order eagerly and compiled; the masked gradient is contiguous."""
    grad_scale, grad_shift, masked = qtype_of(qtype).scale_gradients(weight, scale, shift, grad)
    return grad_scale, grad_shift, masked.contiguous()


def _activation_shapes(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=qtype_of(qtype).storage)
    return codes, x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8), torch.empty_like(scale)


@operator(_activation_shapes, CUDA="qat.kernels.triton_codes")
def quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`QType.encode_activation`: contiguous codes, where ``x`` lies in their range (`pack_bits`), and the scale.

    ``scale`` is a float32 scalar. It comes back as NaN if ``x`` holds NaN, since no integer code does.
    """
    codes, inside = qtype_of(qtype).encode_activation(x, scale, dtype)
    return codes.contiguous(), pack_bits(inside), torch.where(x.isnan().any(), torch.nan, scale)


@operator(
    lambda x, scale, qtype, dtype: (x.new_empty(x.shape), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)),
    CUDA="qat.kernels.triton_codes",
)
def fake_quantize_activation(x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values of `quantize_activation`, contiguous, in the dtype of ``x``, and its flags; NaN stays where it is."""
    codes, inside = qtype_of(qtype).encode_activation(x, scale, dtype)
    value = (scale.to(dtype) * codes.to(dtype)).to(x.dtype)
    return value.masked_fill_(x.isnan(), torch.nan).contiguous(), pack_bits(inside)


@operator(
    lambda codes, scale, dtype, out_dtype, **_: codes.new_empty(codes.shape, dtype=out_dtype),
    CUDA="qat.kernels.triton_codes",
)
def dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, out_dtype: torch.dtype, *, after: Tensor | None = None
) -> Tensor:
    """Values of contiguous codes, rounded to ``dtype``, in ``out_dtype``; ``after`` as in `fake_quantize_weight`.

    ``scale`` is float32: a scalar, or ``(rows, 1)`` for codes of shape ``(rows, size)``.
    """
    return (scale.to(dtype) * codes.to(dtype)).to(out_dtype, copy=True)


@operator(
    lambda x, x_scale, codes, scale, bias, qtype, dtype: x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=dtype),
    CUDA="qat.kernels.triton_codes",
)
def linear_codes(
    x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, qtype: str, dtype: torch.dtype
) -> Tensor:
    """`QType.linear` of contiguous codes: int8 to the bit, float8 but for the rounding of sums and of scales."""
    return qtype_of(qtype).linear(x, x_scale, codes, scale, bias, dtype)


def _quantized_shapes(x: Tensor, x_scale: Tensor, codes: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=options[-1])
    return y, x.new_empty((y.numel() + 7) // 8, dtype=torch.uint8)


@operator(_quantized_shapes, CUDA="qat.kernels.triton_codes")
def linear_codes_quantized(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    y_scale: Tensor,
    qtype: str,
    y_qtype: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`fake_quantize_activation` of `linear_codes`, by ``y_scale`` and ``y_qtype``: the same bits, in one pass."""
    y = linear_codes(x, x_scale, codes, scale, bias, qtype, dtype)
    return fake_quantize_activation(y, y_scale, y_qtype, dtype)


@operator(lambda grad, inside: torch.empty_like(grad), CUDA="qat.kernels.triton_codes")
def masked_gradient(grad: Tensor, inside: Tensor) -> Tensor:
    """``grad`` where the packed ``inside`` says so, and zero elsewhere."""
    return grad.masked_fill(~unpack_bits(inside, grad.shape), 0)


@operator(
    lambda grad, weight, inside: grad.new_empty((grad.shape[0], weight.shape[1])), CUDA="qat.kernels.triton_codes"
)
def masked_product(grad: Tensor, weight: Tensor, inside: Tensor) -> Tensor:
    """`masked_gradient` of ``grad @ weight``, ``(rows, out)`` and ``(out, in)``; on CUDA, in the product's memory."""
    return masked_gradient(grad @ weight, inside)


def _float8_shapes(grad: Tensor, weight: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
    *_, needs_x, needs_weight = rest
    of_x = grad.new_empty((grad.shape[0], weight.shape[1])) if needs_x else None
    return of_x, grad.new_empty(weight.shape) if needs_weight else None


@operator(_float8_shapes, CUDA="qat.kernels.triton_float8")
def float8_gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    inside: Tensor | None,
    x: Tensor,
    x_scale: Tensor,
    qtype: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[OptionalResult, OptionalResult]:
    """Gradients of input and weight with ``grad``, ``(rows, out)``, in float8 too; None where one is not needed.

    That of the input, ``grad fq(W)``, is masked by ``inside`` if given. ``weight`` is a float8 weight, ``(out, in)``,
    or its codes, and ``scale`` its serving scale, ``(out, 1)``, which the gradient takes before each row is quantized
    by its largest magnitude. That of the weight is ``grad^T fq(x)``, with a scale a column of ``grad``. ``x`` are
    float8 codes, ``(rows, in)``, and ``x_scale`` is a scalar. All sizes are multiples of 16.
    """
    grad_x = grad_weight = None
    with torch.autocast(grad.device.type, enabled=False):
        if needs_x:
            found = qtype_of(qtype)
            codes = weight if weight.dtype is found.storage else found.encode(weight, scale, None)
            rounded, row_scale = _float8_rows(grad.float() * scale.t())
            grad_x = ((rounded @ codes.float()) * row_scale).to(grad.dtype)
            grad_x = grad_x if inside is None else masked_gradient(grad_x, inside)
        if needs_weight:
            rounded, row_scale = _float8_rows(grad.float().t())
            grad_weight = ((rounded @ x.float()) * (row_scale * x_scale)).to(grad.dtype)
    return grad_x, grad_weight


def _float8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.abs().amax(1, keepdim=True) / 448).clamp_(min=1e-30)
    return (rows / scale).to(torch.float8_e4m3fn).float(), scale
