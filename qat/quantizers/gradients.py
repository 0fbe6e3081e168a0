"""Gradients of a weight other than the straight-through one, as functions in front of the fake quantization.

Each returns the very weight, without a copy, and changes what comes back to it. So no layer knows of them. They are
plain torch: options that cost a few passes over the weight in backward, where the default costs none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.numerics import QType

__all__ = ["masked_beyond", "smooth_rounding"]

AMPLITUDE = 0.21  # of StableQAT; below 1 / (sqrt(2) pi), so that the gradient stays above 0


class _SmoothRounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: QType) -> Tensor:
        ctx.save_for_backward(weight, scale, shift)
        ctx.qtype = qtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, shift = ctx.saved_tensors
        rows = ctx.qtype.grouped(weight).float()
        x = (rows if shift is None else rows + shift) / scale
        wave = math.sqrt(2) * math.pi * AMPLITUDE * torch.cos(math.pi * (x - x.round()))
        factor = torch.where(scale == 0, 1.0, 2 / (1 + wave) - 1)
        return (grad * factor.view(grad.shape)).to(grad.dtype), None, None, None


def smooth_rounding(weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: QType) -> Tensor:
    """``weight``, ``(out, in)``, whose gradient is multiplied by StableQAT's of the rounding, for integer codes.

    With ``x = (w + z) / s`` it is ``g = 2 / (1 + sqrt(2) pi A cos(pi (x + round x))) - 1`` (arXiv 2601.19320): 1 midway
    between two codes and 0.03 on a code. ``scale`` and ``shift`` are float32, ``(groups, 1)``; they get no gradient
    here.

    >>> from qat.formats import QUANTO
    >>> weight = torch.tensor([[2.0, 0.5, 127.0]], requires_grad=True)
    >>> smooth_rounding(weight, torch.ones(1, 1), None, QUANTO.qtypes["int8"]).sum().backward()
    >>> weight.grad.round(decimals=2)
    tensor([[0.0300, 1.0000, 0.0300]])
    """
    return _SmoothRounding.apply(weight, scale, shift, qtype)  # type: ignore[no-any-return,no-untyped-call]


class _MaskedBeyond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: QType, margin: float) -> Tensor:
        ctx.save_for_backward(weight, scale, shift)
        ctx.qtype, ctx.margin = qtype, margin
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_scale, grad_shift, masked = ctx.qtype.scale_gradients(*ctx.saved_tensors, grad, ctx.margin)
        return masked, grad_scale, grad_shift, None, None


def masked_beyond(weight: Tensor, scale: Tensor, shift: Tensor | None, qtype: QType, margin: float) -> Tensor:
    """``weight``, ``(out, in)``, through which the gradients of weight, scale and shift go: `QType.scale_gradients`.

    The mask begins ``margin`` steps beyond the range. What comes back must be the gradient of the fake-quantized weight
    itself. ``scale`` and ``shift`` are float32, ``(groups, 1)``.

    >>> from qat.formats import QUANTO
    >>> weight = torch.tensor([[-0.4, 1.0, 3.4, 3.6]], requires_grad=True)
    >>> masked_beyond(weight, torch.ones(1, 1), torch.zeros(1, 1), QUANTO.qtypes["int2"], 0.5).sum().backward()
    >>> weight.grad
    tensor([[1., 1., 1., 0.]])
    """
    return _MaskedBeyond.apply(weight, scale, shift, qtype, margin)  # type: ignore[no-any-return,no-untyped-call]
