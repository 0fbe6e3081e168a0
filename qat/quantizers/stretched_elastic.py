"""SEQ, the stretched elastic quantizer of ParetoQ (Liu et al. 2025, https://arxiv.org/abs/2502.02631).

Its values lie in equal numbers on both sides of zero, and none is zero: at 2 bits ±alpha/4 and ±3 alpha/4. So it is an
affine grid with ``s = alpha / 2`` and ``z = 1.5 s``, and one number a group is learned. docs/numerics.md has the
formulas. What it trades away: the second end. A group whose weights are not centred is served worse.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.numerics import QType
from qat.quantizers.base import Algorithm, Quantized
from qat.quantizers.learned_affine import LearnedRange

__all__ = ["StretchedElastic"]

_CLIP = 0.99  # of alpha: the paper's bound, within which a weight rounds to a code and keeps its gradient


def _grid(weight: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Lowest and highest value for ``alpha = max|w|`` of each group."""
    low, high = qtype.weight_range(weight)
    assert low is not None
    end = torch.maximum(-low, high) * (qtype.steps / (qtype.steps + 1))
    return -end, end


class StretchedRange(LearnedRange):
    """A range around zero that moves with alpha: ``high_move`` moves both ends."""

    def __init__(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> None:
        # alpha reaches half a step beyond the last value.
        margin = 0.5 - (1 - _CLIP) * (qtype.steps + 1) / 2
        super().__init__(*_grid(weight, qtype), qtype, dtype, margin=margin)
        self.low_move = None

    def _own_range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _grid(weight, self.qtype)

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Quantize by the moved alpha."""
        low_move = self.high_move.view_as(self.high_move)  # a compiler refuses one tensor as two arguments
        return self.by_served(weight, *self.served(weight, low_move, self.high_move), out_dtype)


class StretchedElastic(Algorithm):
    """ParetoQ's grid around zero for few bits, with a learned size for each group. For types with a shift."""

    kind: Literal["stretched_elastic"] = "stretched_elastic"

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> StretchedRange:
        """A quantizer that starts from ``alpha = max|w|``.

        Raises:
            SpecError: the type has no shift, so its values cannot lie on both sides of zero in equal numbers.

        >>> from qat.formats import QUANTO
        >>> weight = torch.tensor([[-4.0, 0.1, 1.5, 2.5]])
        >>> StretchedElastic().make(weight, QUANTO.qtypes["int2"], torch.float32).quantize(weight, torch.float32)[0]
        tensor([[-3.,  1.,  1.,  3.]])
        """
        if not qtype.has_shift or qtype.whole_shift:
            raise SpecError(
                f"algorithm: StretchedElastic needs a type with a float shift (quanto's int4, int2), got {qtype.name}: "
                "choose another algorithm such as LearnedAffine, or another type"
            )
        return StretchedRange(weight, qtype, dtype)
