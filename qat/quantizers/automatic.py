"""The default: for each type what our measurements found best, a layer at a time, since a spec may mix types.

At int4 and int2 that is `LearnedAffine` from the output error, which never changes the float weights. At 8 bits
`StraightThrough` is as good as anything, and the cheapest. docs/decisions/0009-best-for-the-type.md has the reasons.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qat.numerics import QType
from qat.quantizers.base import Algorithm, WeightQuantizer
from qat.quantizers.learned_affine import LearnedAffine, StartName
from qat.quantizers.straight_through import StraightThrough

__all__ = ["Automatic"]


class Automatic(Algorithm):
    """The best for each type: `LearnedAffine` below 8 bits, else `StraightThrough`, with the same general options."""

    kind: Literal["automatic"] = "automatic"
    start: StartName = "output"
    """What layers below 8 bits begin with; see `LearnedAffine.start`."""

    def for_type(self, qtype: QType) -> Algorithm:
        """`LearnedAffine` or `StraightThrough`.

        >>> from qat.formats import QUANTO
        >>> print(Automatic().for_type(QUANTO.qtypes["int4"]), Automatic().for_type(QUANTO.qtypes["int8"]))
        LearnedAffine(start='output') StraightThrough()
        """
        general = {name: getattr(self, name) for name in Algorithm.model_fields if name != "kind"}
        return LearnedAffine(start=self.start, **general) if qtype.bits < 8 else StraightThrough(**general)

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> WeightQuantizer:
        """What the algorithm for the type makes."""
        return self.for_type(qtype).make(weight, qtype, dtype)
