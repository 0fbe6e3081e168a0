"""Learnable weight clipping (OmniQuant, Shao et al. 2024, https://arxiv.org/abs/2308.13137, eq. 2).

The range is the current weight's own, times a learned part of it: ``high = sigmoid(g) max w`` and ``low = sigmoid(b)
min w``. It follows the weight at every step, where a learned range stays until it is moved. What it trades away: a
range never becomes wider than the weights, and one new outlier widens it at once. docs/numerics.md has the formulas.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.numerics import NARROWEST, QType, qtype_of
from qat.operators import OptionalResult, operator
from qat.quantizers.base import Algorithm, Quantized, WeightQuantizer

__all__ = ["LearnedClipping"]

START = 4.0  # sigmoid(4) = 0.982


def _part(logit: Tensor) -> Tensor:
    # In float64, so that devices agree on the rounded result.
    return logit.double().sigmoid().float()


def _clipped(
    low: Tensor | None, high: Tensor, low_logit: Tensor | None, high_logit: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The ends as they are clipped; they keep 1/128 of the range, straight-through, and a range of one value stays."""
    clipped_high = high * _part(high_logit)
    if low is None or low_logit is None:
        return None, clipped_high
    clipped_low, width = low * _part(low_logit), high - low
    missing = (width * NARROWEST - (clipped_high - clipped_low)).clamp(min=0).detach()
    return torch.where(width == 0, low, clipped_low), torch.where(width == 0, high, clipped_high + missing)


@operator(lambda low, high, *_: (torch.empty_like(high), None if low is None else torch.empty_like(high)))
def _clipped_scale_shift(
    low: Tensor | None,
    high: Tensor,
    low_logit: Tensor | None,
    high_logit: Tensor,
    qtype: str,
    dtype: torch.dtype,
    in_features: int,
) -> tuple[Tensor, OptionalResult]:
    # An operator, since a compiler has another sigmoid and fuses products with sums.
    found = qtype_of(qtype)
    return found.serve(*found.scale_shift(*_clipped(low, high, low_logit, high_logit)), dtype, in_features)


class _ServedClipping(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor | None,
        high: Tensor,
        low_logit: Tensor | None,
        high_logit: Tensor,
        qtype: QType,
        dtype: torch.dtype,
        in_features: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(low, high, low_logit, high_logit)
        ctx.qtype = qtype
        return _clipped_scale_shift(low, high, low_logit, high_logit, qtype.key, dtype, in_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor | None) -> tuple[Tensor | None, ...]:
        low, high, low_logit, high_logit = ctx.saved_tensors
        of_high, of_low = grad_scale / ctx.qtype.steps, None
        if low is not None:
            of_low = (-of_high if grad_shift is None else -of_high - grad_shift) * low * _slope(low_logit)
        return None, None, of_low, of_high * high * _slope(high_logit), None, None, None


def _slope(logit: Tensor) -> Tensor:
    return _part(logit) * _part(-logit)


class ClippedRange(WeightQuantizer):
    """The range of the weight as it is now, times learned parts of its ends."""

    by_groups = True

    def __init__(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> None:
        super().__init__(qtype, dtype, masked=True)
        low, high = qtype.weight_range(weight)
        self.low_logit = None if low is None else nn.Parameter(torch.full_like(low, START))
        self.high_logit = nn.Parameter(torch.full_like(high, START))

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Find the range, clip it and quantize; the range has no gradient to the weight."""
        low, high = self.qtype.weight_range(weight)
        if not self.qtype.fused:  # the gradient of another format's `serve` is not that of `_ServedClipping`
            ends = _clipped(low, high, self.low_logit, self.high_logit)
            return self.by_scale(weight, *self.qtype.scale_shift(*ends), out_dtype)
        options = (self.qtype, self.dtype, weight.shape[1])
        scale, shift = _ServedClipping.apply(low, high, self.low_logit, self.high_logit, *options)  # type: ignore[no-untyped-call]
        return self.by_served(weight, scale, shift, out_dtype)

    def quantize_to_codes(self, weight: Tensor) -> Quantized:
        """The same in one pass."""
        return self.quantize(weight, self.qtype.storage)


class LearnedClipping(Algorithm):
    """Ranges that follow the weights, each end clipped to a learned part of it (OmniQuant)."""

    kind: Literal["learned_clipping"] = "learned_clipping"

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> ClippedRange:
        """A quantizer that starts with 0.982 of the weight's range.

        >>> from qat.formats import QUANTO
        >>> weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
        >>> LearnedClipping().make(weight, QUANTO.qtypes["int2"], torch.float32).quantize(weight, torch.float32).scale
        tensor([[0.9820]], grad_fn=<...>)
        """
        return ClippedRange(weight, qtype, dtype)
