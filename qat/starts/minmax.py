"""The weight's own range: nothing is clipped, and outliers take what they need."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import QType
from qat.starts.base import Ends

__all__ = ["whole_range"]


def whole_range(weight: Tensor, qtype: QType, dtype: torch.dtype) -> Ends:
    """Each group's minimum and maximum, or None and its largest magnitude; see `QType.weight_range`.

    >>> from qat.formats import QUANTO
    >>> whole_range(torch.tensor([[-1.0, 2.0]]), QUANTO.qtypes["int4"], torch.float32)
    (tensor([[-1.]]), tensor([[2.]]))
    """
    return qtype.weight_range(weight)
