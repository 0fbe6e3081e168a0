"""The default: for each type the algorithm that won back most in `scripts/benchmark_quality.py` (docs/results.md).

At 8 bits the range of the current weight costs nothing that learning could win back. With fewer bits learned ranges
win back far more, and their start decides how much.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qat.numerics import QType
from qat.quantizers.base import Algorithm, WeightQuantizer
from qat.quantizers.learned_affine import LearnedAffine
from qat.quantizers.straight_through import StraightThrough

__all__ = ["Automatic"]

_WIDE = 8  # bits, from which on a weight's own range is enough


class Automatic(Algorithm):
    """`StraightThrough` for types of 8 bits, `LearnedAffine` for those of fewer; a spec may mix them."""

    kind: Literal["automatic"] = "automatic"

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> WeightQuantizer:
        """What the algorithm for ``qtype`` makes.

        >>> import qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 64))
        >>> _ = qat.prepare(model, qat.QuantSpec(weights="int4"))
        >>> type(model[0].weight_quantizer).__name__
        'LearnedRange'
        """
        algorithm = StraightThrough() if qtype.bits >= _WIDE else LearnedAffine(start="best")
        return algorithm.make(weight, qtype, dtype)
