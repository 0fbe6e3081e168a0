"""SEQ, the stretched elastic grid of ParetoQ at 2 bits: four values that lie evenly around zero, none of them zero.

Liu et al. 2025, https://arxiv.org/abs/2502.02631, section 3.2: ``alpha (round(2 clip(w / alpha, ±0.99) - 0.5) + 0.5) /
2`` with ``alpha = max|w|``. The values are ±alpha/4 and ±3 alpha/4: a scale of ``alpha / 2`` and a shift of 1.5 scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.numerics import QType
from qat.starts.base import Ends

__all__ = ["balanced_range", "fits"]


def fits(qtype: QType) -> bool:
    """Whether the type has four codes, and a shift that may be 1.5 scales."""
    return qtype.bits == 2 and qtype.has_shift and not qtype.whole_shift


def balanced_range(weight: Tensor, qtype: QType, dtype: torch.dtype) -> Ends:
    """Ends at ``±0.75 max|w|`` of each group, float32, ``(groups, 1)``.

    Raises:
        SpecError: the type has more than 2 bits.

    >>> from qat.formats import QUANTO
    >>> balanced_range(torch.tensor([[-1.0, 2.0]]), QUANTO.qtypes["int2"], torch.float32)
    (tensor([[-1.5000]]), tensor([[1.5000]]))
    """
    if not fits(qtype):
        raise SpecError(
            f"algorithm: start='seq' needs 2 bits and a float shift, but a layer has {qtype.name} weights: use "
            "start='clip', or leave layers of other types out of the spec"
        )
    high = qtype.grouped(weight.detach()).abs().amax(1, keepdim=True).float() * 0.75
    return -high, high
