"""LSQ's start: a step size from the mean magnitude (Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1).

At 8 bits this range is several times the largest magnitude of a normally distributed row: it is for few bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import QType
from qat.starts.base import Ends

__all__ = ["step_size_range"]


def step_size_range(weight: Tensor, qtype: QType, dtype: torch.dtype) -> Ends:
    """Ends of the range with ``s = 2 mean|w| / sqrt(Qp)``, float32, ``(groups, 1)``.

    An affine type has it around its group's mean, with half its steps as Qp.

    >>> from qat.formats import QUANTO
    >>> step_size_range(torch.tensor([[-3.0, 1.0, 1.0, 1.0]]), QUANTO.qtypes["int2"], torch.float32)
    (tensor([[-3.6742]]), tensor([[3.6742]]))
    """
    rows = qtype.grouped(weight.detach()).float()
    center = rows.mean(1, keepdim=True) if qtype.has_shift else torch.zeros_like(rows[:, :1])
    size = 2 * (rows - center).abs().mean(1, keepdim=True)
    half = size * (qtype.steps / 2 if qtype.has_shift else qtype.steps) ** 0.5
    return (center - half, center + half) if qtype.has_shift else (None, half)
