"""Clipped ranges: for each group the two ends that give the smallest squared weight error.

At 2 bits the range from min to max spends its four values on outliers: for 128 normally distributed weights it spans
±2.6 σ, where ±1.5 σ has less than half the squared error. The search moves both ends towards the group's mean, first
together, then each alone, and judges every candidate by the arithmetic of serving: rounded scale and shift, codes,
and values with the loader's roundings.

Weight error is not output error. It sees no data, and what it gains has to be measured (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qat.numerics import QType
from qat.starts.base import Ends, by_chunks, quantized

__all__ = ["clipped_range", "search", "weight_error"]

_TOGETHER = tuple(1 - 0.05 * step for step in range(1, 17))  # down to 0.2 of the range
_ALONE = (0.1, 0.05, 0.025)


def weight_error(weight: Tensor, low: Tensor | None, high: Tensor, qtype: QType, dtype: torch.dtype) -> Tensor:
    """Sum of ``(served - weight)^2`` of each group, in units of its largest magnitude: ``(groups, 1)``, float32.

    ``low`` and ``high`` are the ends of each group's range, as `clipped_range` gives them.
    """
    error = qtype.grouped(quantized(weight, (low, high), qtype, dtype).sub_(weight))
    # In units of the group's own size, the squares of no group overflow or vanish.
    size = qtype.grouped(weight).abs().amax(1, keepdim=True).float()
    error /= size.clamp_(min=torch.finfo(torch.float32).tiny)
    return error.square_().sum(1, keepdim=True)


@torch.no_grad()
def clipped_range(weight: Tensor, qtype: QType, dtype: torch.dtype) -> Ends:
    """The ends of each group's range that give the smallest `weight_error` found, which is never above min-max's.

    Low end (None for symmetric types) and high end: float32, ``(groups, 1)``. The weight is read in chunks of rows.

    >>> from qat.formats import QUANTO
    >>> _, high = clipped_range(torch.tensor([[0.1, -0.2, 0.3, 0.4]]), QUANTO.qtypes["int8"], torch.float32)
    >>> bool(high <= 0.4)
    True
    """
    return by_chunks(weight, lambda part: search(part, qtype, partial(weight_error, part, qtype=qtype, dtype=dtype)))


def search(weight: Tensor, qtype: QType, error: Callable[[Tensor | None, Tensor], Tensor]) -> Ends:
    """The ends with the smallest ``error(low, high)``, ``(groups, 1)``, of those that the search tries."""
    low, high = qtype.weight_range(weight)
    center = torch.zeros_like(high) if low is None else qtype.grouped(weight).float().mean(1, keepdim=True)
    ones = torch.ones_like(high)

    def ends(low_factor: Tensor, high_factor: Tensor) -> Ends:
        # Written so that a factor of 1 gives the very end.
        return (
            None if low is None else low + (center - low) * (1 - low_factor),
            high + (center - high) * (1 - high_factor),
        )

    best = (ones, ones, error(low, high))

    def attempt(low_factor: Tensor, high_factor: Tensor) -> None:
        nonlocal best
        found = error(*ends(low_factor, high_factor))
        better = found < best[2]  # never where the error is not a number
        candidate = (low_factor, high_factor, found)
        best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))  # type: ignore[assignment]

    for factor in _TOGETHER:
        attempt(ones * factor, ones * factor)
    for step in _ALONE:
        for sign in (1, -1):
            attempt(best[0], (best[1] + sign * step).clamp(0.05, 1))
            if low is not None:
                attempt((best[0] + sign * step).clamp(0.05, 1), best[1])
    return ends(best[0], best[1])
