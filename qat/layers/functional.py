"""Straight-through gradients around fake-quantized weights.

`fake_quantized` is autograd on a weight: its result goes into any operation, which keeps that copy for backward.
`quantized_linear` keeps what `nn.Linear` keeps, the input and the master weight, and two small tensors with scales. In
backward it computes the fake-quantized weight once more. Of a quantized input it keeps the codes, a byte each, and a
bit that says whether the element saturated. Where weight and input have codes of one type, and the compute dtype is the
serving dtype, it multiplies codes as the loader does.

Under autocast, `nn.Linear` pays a cast of the weight to the compute dtype; here the fake quantization is that cast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat import kernels
from qat.numerics import QType
from qat.quantizers.activation import ActivationQuantizer
from qat.quantizers.base import Quantized, WeightQuantizer

__all__ = ["autocast_dtype", "fake_quantized", "quantized_linear"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives operations on the device of ``x``; None where it is off, and on the meta device.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_dtype(torch.ones(1)), autocast_dtype(torch.ones(1, device="meta"))
    (torch.bfloat16, None)
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # of the meta device torch cannot tell
        return None
    return torch.get_autocast_dtype(device)


class _Options(NamedTuple):
    """What the functions below keep of the quantizers, which they must not keep themselves."""

    qtype: QType
    dtype: torch.dtype
    masked: bool
    input_qtype: QType | None = None
    float8_backward: bool = False


def _weight_gradients(
    ctx: Any, grad: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of master weight, scale and shift (inputs 1 to 3) from that of the fake-quantized weight."""
    _, needs_weight, needs_scale, needs_shift = ctx.needs_input_grad[:4]
    grad_scale = grad_shift = None
    if needs_scale or needs_shift or ctx.options.masked:
        grad_scale, grad_shift, masked = kernels.scale_gradients(weight, scale, shift, ctx.options.qtype.key, grad)
        grad = masked if ctx.options.masked else grad
    return grad.to(weight.dtype) if needs_weight else None, grad_scale, grad_shift


class _FakeQuantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, scale: Tensor, shift: Tensor | None, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, shift)
        ctx.options = options
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_weight_gradients(ctx, grad, *ctx.saved_tensors), None


def fake_quantized(weight: Tensor, quantized: Quantized, quantizer: WeightQuantizer) -> Tensor:
    """``quantized.value``, with the straight-through gradient to the master weight and to learned scales.

    ``weight`` is the effective master weight, ``(out, in)``; ``quantized`` is what the quantizer made of it.
    """
    value, scale, shift = quantized
    options = _Options(quantizer.qtype, quantizer.dtype, quantizer.masked)
    return _FakeQuantized.apply(value, weight, scale, shift, options)  # type: ignore[no-any-return,no-untyped-call]


class _QuantizedLinear(torch.autograd.Function):
    """``y = fq(x) fq(W)^T + b`` with straight-through gradients; see `quantized_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        bias: Tensor | None,
        value: Tensor,
        input_scale: Tensor | None,
        options: _Options,
    ) -> Tensor:
        inside, kept = None, x
        if input_scale is not None and options.input_qtype is not None:
            key = options.input_qtype.key
            kept, inside, input_scale = kernels.quantize_activation(x, input_scale, key, options.dtype)
        ctx.save_for_backward(kept, weight, scale, shift, inside, input_scale)
        ctx.options = options
        if input_scale is not None:
            if value.dtype is options.qtype.storage:
                return kernels.linear_codes(kept, input_scale, value, scale, bias, options.qtype.key, options.dtype)
            x = kernels.dequantize_activation(kept, input_scale, options.dtype, x.dtype)
        return torch.nn.functional.linear(x, value, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, inside, input_scale = ctx.saved_tensors
        qtype, dtype, _, _, float8 = ctx.options
        needs_x, *needs_scales, needs_bias = ctx.needs_input_grad[:5]
        grad_x = grad_weight = grad_scale = grad_shift = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        # Hopper multiplies float8 in steps of 16; others get the exact gradient.
        float8 = float8 and inside is not None and all(n % 16 == 0 for n in (*rows.shape, x.shape[-1]))
        if needs_x and float8:
            codes = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, qtype.storage, after=grad)
            grad_x = kernels.float8_input_gradient(rows, codes, scale, inside).view(x.shape)
        elif needs_x:
            value = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, grad.dtype, after=grad)
            grad_x = rows @ value if inside is None else kernels.masked_product(rows, value, inside)
            grad_x = grad_x.view(x.shape)
        if any(needs_scales):
            if inside is not None and not float8:
                x = kernels.dequantize_activation(x, input_scale, dtype, grad.dtype, after=grad)
            x = x.reshape(-1, x.shape[-1])
            grad_weight = kernels.float8_weight_gradient(rows, x, input_scale) if float8 else rows.t() @ x
            grad_weight, grad_scale, grad_shift = _weight_gradients(ctx, grad_weight, weight, scale, shift)
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_scale, grad_shift, grad_bias, None, None, None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantized: Quantized,
    quantizer: WeightQuantizer,
    activation: ActivationQuantizer | None = None,
) -> Tensor:
    """Linear map with the weight, and perhaps the input, fake-quantized: ``(..., in)`` to ``(..., out)``.

    ``weight`` is the effective master weight, ``(out, in)``; ``quantized`` is what the quantizer made of it in the
    compute dtype, which is the result's, or its codes. ``activation`` quantizes the input; what saturates there gets no
    gradient.

    Raises:
        CalibrationError: the input is quantized, has elements, and there is no scale yet.
    """
    if activation is not None:
        activation.require_scale(x)
    value, scale, shift = quantized
    dtype = quantizer.dtype if value.dtype is quantizer.qtype.storage else value.dtype
    if autocast_dtype(x) is not None:
        x = x.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    input_scale, input_qtype = (None, None) if activation is None else (activation.scale, activation.qtype)
    float8 = quantizer.float8_backward and activation is not None
    options = _Options(quantizer.qtype, quantizer.dtype, quantizer.masked, input_qtype, float8)
    y: Tensor = _QuantizedLinear.apply(x, weight, scale, shift, bias, value, input_scale, options)  # type: ignore[no-untyped-call]
    return y
