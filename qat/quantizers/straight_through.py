"""Straight-through with a dynamic range: the range is the current weight's own, found anew at every step.

Nothing is learned but the weight. The gradient passes through the rounding as if it were not there (Bengio, Leonard
and Courville 2013, https://arxiv.org/abs/1308.3432). What it trades away: a range that always covers the outliers
is wide, which costs little at 8 bits and much at 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qat import kernels
from qat.numerics import QType
from qat.quantizers.base import Algorithm, Quantized, WeightQuantizer

__all__ = ["StraightThrough"]


class DynamicRange(WeightQuantizer):
    """The range of the weight as it is now: absmax, or minimum to maximum."""

    by_groups = True

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Find the range and quantize; scale and shift have no gradient."""
        return Quantized(*kernels.quantize_own_range(weight.detach(), self.qtype.key, self.dtype, out_dtype))

    def quantize_to_codes(self, weight: Tensor) -> Quantized:
        """The same in one pass."""
        return self.quantize(weight, self.qtype.storage)


class StraightThrough(Algorithm):
    """Straight-through estimator with the range taken from the current weight."""

    kind: Literal["straight_through"] = "straight_through"
    mask_saturated: bool = False
    """Stop the gradient of weights outside the range (here only what rounding the scale pushed there)."""

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> DynamicRange:
        """A quantizer without state."""
        return DynamicRange(qtype, dtype, masked=self.mask_saturated)
