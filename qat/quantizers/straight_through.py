"""Straight-through with a dynamic range: the range is the current weight's own, found anew at every step.

Nothing is learned but the weight. The gradient passes through the rounding as if it were not there (Bengio, Leonard
and Courville 2013, https://arxiv.org/abs/1308.3432). What it trades away: a range that always covers the outliers
is wide, which costs little at 8 bits and much at 2.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from qat import kernels, numerics
from qat.quantizers.base import Algorithm, WeightQuantizer

__all__ = ["StraightThrough"]


class DynamicRange(WeightQuantizer):
    """Absmax for int8 and float8, min to max for int4 and int2, of the weight as it is now."""

    own_range: ClassVar[bool] = True

    def scale_shift(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The range of ``weight``, without a gradient."""
        return numerics.range_scale_shift(*numerics.weight_range(weight, self.qtype), self.qtype)

    def serving(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same as the base class gives, as one opaque operator: equal bits eagerly and compiled, and faster."""
        return kernels.serving_range(weight.detach(), self.qtype, self.dtype)


class StraightThrough(Algorithm):
    """Straight-through estimator with the range taken from the current weight."""

    kind: Literal["straight_through"] = "straight_through"
    """Names the algorithm in a configuration file."""
    mask_saturated: bool = False
    """Stop the gradient of weights outside the range (here only what rounding the scale pushed there)."""

    def make(self, weight: Tensor, qtype: str, dtype: torch.dtype) -> DynamicRange:
        """A quantizer without state."""
        return DynamicRange(qtype, dtype, masked=self.mask_saturated)
