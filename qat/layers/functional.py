"""Straight-through gradients around fake-quantized weights.

`fake_quantized` is autograd on a weight: its result goes into any operation, which keeps that copy for backward.
`quantized_linear` keeps what `nn.Linear` keeps, the input and the master weight, and two small tensors with scales. In
backward it computes the fake-quantized weight once more, if the master has the compute dtype. Else `nn.Linear` pays a
cast under autocast, and keeps its result. Here the fake quantization is that cast, and its result, or its codes, is
kept: a step quantizes once.

Of a quantized input it keeps the codes, a byte each, and a bit that says whether the element saturated; with a learned
scale it keeps the input itself. Where weight and input have codes of one type, and the compute dtype is the serving
dtype, it multiplies codes as the loader does, and quantizes the output in the same pass. Of that it keeps a bit an
element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat import kernels
from qat.numerics import QType
from qat.quantizers.activation import ActivationQuantizer, activation_gradients, fake_quantize_output
from qat.quantizers.base import Quantized, WeightQuantizer

__all__ = ["Recipe", "autocast_dtype", "fake_quantized", "quantized_linear"]


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


class Recipe(NamedTuple):
    """How an effective weight that is computed is computed again: ``make(*arguments, *parts)``."""

    make: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    parts: tuple[Tensor | None, ...]


class _Options(NamedTuple):
    """What the functions below keep of the quantizers, which they must not keep themselves."""

    qtype: QType
    dtype: torch.dtype
    masked: bool
    input_key: str = ""
    output_key: str = ""
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
    weight, scale, shift = quantizer.through(weight, scale, shift)
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
        learned: Tensor | None,
        value: Tensor,
        codes: Tensor | None,
        inside: Tensor | None,
        x_scale: Tensor | None,
        y_scale: Tensor | None,
        options: _Options,
        recipe: Recipe | None,
    ) -> Tensor:
        ctx.options, ctx.recipe = options, None if recipe is None else recipe._replace(parts=())
        y_inside = None
        if codes is None or x_scale is None:
            y = torch.nn.functional.linear(x, value, bias).data  # no view, so that a model may add to it in place
        elif value.dtype is not options.qtype.storage:
            given = kernels.dequantize(codes, x_scale, options.dtype, value.dtype)
            y = torch.nn.functional.linear(given, value, bias).data
        else:
            factors, key = (codes, x_scale, value, scale, bias), options.qtype.key
            if y_scale is None:
                y = kernels.linear_codes(*factors, key, options.dtype)
            else:
                y, y_inside = kernels.linear_codes_quantized(*factors, y_scale, key, options.output_key, options.dtype)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[5]
        kept = value if needed and weight.dtype is not y.dtype and recipe is None else None
        if learned is not None:  # whose gradient needs the input itself
            codes, inside, x_scale = None, None, learned
        saved = (x if codes is None else codes, weight if recipe is None else None, scale, shift, inside, x_scale, kept)
        ctx.save_for_backward(*saved, y_inside, *(() if recipe is None else recipe.parts))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, inside, x_scale, kept, y_inside, *parts = ctx.saved_tensors
        if ctx.recipe is not None:
            weight = ctx.recipe.make(*ctx.recipe.arguments, *parts)
        qtype, dtype, _, input_key, _, float8 = ctx.options
        needs_x, *needs_scales, needs_bias, learned = ctx.needs_input_grad[:6]
        needs_x, needs_weight = needs_x or learned, any(needs_scales)
        grad_x: Any = None
        grad_weight: Any = None
        grad_scale = grad_shift = grad_bias = grad_learned = None
        if y_inside is not None:
            grad = kernels.masked_gradient(grad, y_inside)
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        codes, given = x_rows, x_rows
        if x_scale is not None and inside is None:
            codes, inside, _ = kernels.quantize_activation(x_rows, x_scale, input_key, dtype)
        masked = None if learned else inside
        # Hopper multiplies float8 in steps of 16; others get the exact gradient.
        if float8 and inside is not None and all(n and n % 16 == 0 for n in (*rows.shape, x.shape[-1])):
            source = weight if kept is None or kept.dtype is not qtype.storage else kept
            grad_x, grad_weight = kernels.float8_gradients(
                rows, source, scale, masked, codes, x_scale, qtype.key, needs_x, needs_weight
            )
        else:
            if needs_x:
                w = kept
                if w is None:
                    w = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, grad.dtype, after=grad)
                elif w.dtype is qtype.storage:
                    w = kernels.dequantize(w, scale, dtype, grad.dtype, after=grad)
                grad_x = rows @ w if masked is None else kernels.masked_product(rows, w, masked)
            if needs_weight:
                values = given
                if inside is not None:
                    values = kernels.dequantize(codes, x_scale, dtype, grad.dtype, after=grad)
                grad_weight = rows.t() @ values
        if learned:
            grad_learned, grad_x = activation_gradients(given, x_scale, input_key, grad_x)
        if grad_x is not None:
            grad_x = grad_x.view(x.shape)
        if needs_weight:
            grad_weight, grad_scale, grad_shift = _weight_gradients(ctx, grad_weight, weight, scale, shift)
        if needs_bias:
            grad_bias = rows.sum(0)
        found = grad_x, grad_weight, grad_scale, grad_shift, grad_bias, grad_learned
        return *found, None, None, None, None, None, None, None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantized: Quantized,
    quantizer: WeightQuantizer,
    activation: ActivationQuantizer | None = None,
    output: ActivationQuantizer | None = None,
    recipe: Recipe | None = None,
) -> Tensor:
    """Linear map with the weight, and perhaps input and output, fake-quantized: ``(..., in)`` to ``(..., out)``.

    ``weight`` is the effective master weight, ``(out, in)``; ``quantized`` is what the quantizer made of it in the
    compute dtype, which is the result's, or its codes. ``activation`` quantizes the input, and ``output`` the result;
    what saturates there gets no gradient. With a ``recipe``, neither the master nor a quantized copy is kept.

    Raises:
        CalibrationError: input or output is quantized, has elements, and there is no scale yet.
    """
    codes: tuple[Tensor | None, ...] = (None, None, None)
    learned, key, y_scale, y_key = None, "", None, ""
    if activation is not None:
        learned, key = activation.learned_scale(), activation.qtype.key
        codes = activation.quantize(x, learned)
    value, scale, shift = quantized
    weight, scale, shift = quantizer.through(weight, scale, shift)
    coded = value.dtype is quantizer.qtype.storage
    dtype = quantizer.dtype if coded else value.dtype
    if coded and output is not None and x.numel() and output.learned_scale() is None:
        output.require_scale()
        y_scale, y_key, output = output.serving_scale(), output.qtype.key, None
    if autocast_dtype(x) is not None:
        x = x.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    options = _Options(quantizer.qtype, quantizer.dtype, quantizer.masked, key, y_key, quantizer.float8_backward)
    y: Tensor = _QuantizedLinear.apply(x, weight, scale, shift, bias, learned, value, *codes, y_scale, options, recipe)  # type: ignore[no-untyped-call]
    return y if output is None else fake_quantize_output(y, output)
