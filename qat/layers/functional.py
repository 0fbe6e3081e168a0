"""The linear map with a fake-quantized weight, and what it keeps for backward: nothing that `nn.Linear` does not.

`nn.Linear` keeps its input and its weight. So does this: input, master weight, and two small tensors with scales.
The fake-quantized weight is computed again in the backward pass, which costs one pass over the weight and saves a
copy of every weight in the model. The input, if it is quantized too, is likewise quantized again.

Under autocast, `nn.Linear` pays a cast of the weight to the compute dtype; here the fake quantization is that cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat import kernels

__all__ = ["compute_dtype", "quantized_linear"]


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype the matrix product runs in: autocast's where it is on, the weight's otherwise."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _QuantizedLinear(torch.autograd.Function):
    """``y = fq(x) fq(W)^T + b`` with straight-through gradients; see `quantized_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        bias: Tensor | None,
        input_scale: Tensor | None,
        qtype: str,
        input_qtype: str,
        dtype: torch.dtype,
        masked: bool,
    ) -> Tensor:
        if scale is None:
            quantized, scale, shift = kernels.quantize_own_range(weight, qtype, dtype, x.dtype)
        else:
            quantized = kernels.fake_quantize_weight(weight, scale, shift, qtype, dtype, x.dtype)
        ctx.save_for_backward(x, weight, scale, shift, input_scale)
        ctx.options = qtype, input_qtype, dtype, masked
        if input_scale is not None:
            x = kernels.fake_quantize_activation(x, input_scale, input_qtype, dtype)
        return torch.nn.functional.linear(x, quantized, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, input_scale = ctx.saved_tensors
        qtype, input_qtype, dtype, masked = ctx.options
        needs_x, needs_weight, needs_scale, needs_shift, needs_bias = ctx.needs_input_grad[:5]
        grad_x = grad_weight = grad_scale = grad_shift = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_x:
            quantized = kernels.fake_quantize_weight(weight, scale, shift, qtype, dtype, grad.dtype, after=grad)
            grad_x = (rows @ quantized).view(x.shape)
            if input_scale is not None:
                grad_x = grad_x * kernels.inside_range(x, input_scale, input_qtype)
        if needs_weight or needs_scale or needs_shift:
            if input_scale is not None:
                x = kernels.fake_quantize_activation(x, input_scale, input_qtype, dtype)
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
            if needs_scale or needs_shift or masked:
                grad_scale, grad_shift, inside = kernels.scale_gradients(weight, scale, shift, qtype, grad_weight)
                if masked:
                    grad_weight = inside
            grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_scale, grad_shift, grad_bias, None, None, None, None, None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    *,
    qtype: str,
    dtype: torch.dtype,
    masked: bool = False,
    input_scale: Tensor | None = None,
    input_qtype: str = "",
) -> Tensor:
    """Linear map with the weight, and perhaps the input, fake-quantized.

    Args:
        x: ``(..., in)``.
        weight: master weight, ``(out, in)``.
        scale: serving scale, float32, ``(groups, 1)``; gets LSQ's gradient if it requires one. None: scale and shift
            are those of the weight's own range.
        shift: serving shift likewise, or None for 8-bit types.
        bias: ``(out,)`` or None.
        qtype: the weight's format.
        dtype: the serving dtype.
        masked: no gradient for weights outside the codes' range.
        input_scale: float32 scalar; quantizes the input, with no gradient for elements that saturate.
        input_qtype: the input's format, with ``input_scale``.

    Returns:
        ``(..., out)`` in the compute dtype.
    """
    compute = compute_dtype(x, weight)
    x = x.to(compute) if torch.is_autocast_enabled(x.device.type) else x
    if bias is not None:
        bias = bias.to(compute)
    y: Tensor = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, scale, shift, bias, input_scale, qtype, input_qtype, dtype, masked
    )
    return y
