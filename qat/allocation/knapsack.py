"""One option for each layer, with the smallest damage that a number of bytes allows: a multiple-choice knapsack.

Dynamic programming over bytes (Dudzinski and Walukiewicz 1987, https://doi.org/10.1016/0377-2217(87)90165-2). Sizes of
layers share a large common step, so it is exact for most models. Where a budget has more than 65,536 steps, steps are
longer and sizes are rounded up: the result always fits, and leaves less than a step for each layer unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

__all__ = ["allocate"]

_STEPS = 1 << 16


def allocate(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """The number of the option of each layer, or None where even the smallest options do not fit.

    Args:
        options: for each layer its options, bytes and damage of each.
        budget: the most bytes of all layers together.

    >>> allocate([[(1, 5.0), (2, 1.0)], [(1, 3.0), (2, 1.0)]], budget=3)
    [1, 0]
    """
    least = [min(size for size, _ in layer) for layer in options]
    extra = [[size - low for size, _ in layer] for layer, low in zip(options, least, strict=True)]
    slack = min(budget - sum(least), sum(map(max, extra)))
    if slack < 0:
        return None
    step = max(1, gcd(*(size for layer in extra for size in layer)))
    step = step if slack // step <= _STEPS else -(-slack // _STEPS)
    units = [[-(-size // step) for size in layer] for layer in extra]
    capacity = slack // step
    best, choices = torch.zeros(capacity + 1, dtype=torch.float64), list[Tensor]()
    for layer, needed in zip(options, units, strict=True):
        damages = torch.full((len(layer), capacity + 1), torch.inf, dtype=torch.float64)
        for row, ((_, damage), need) in enumerate(zip(layer, needed, strict=True)):
            if need <= capacity:
                damages[row, need:] = best[: capacity + 1 - need] + damage
        best, choice = damages.min(0)
        choices.append(choice.to(torch.uint8))
    found = []
    for choice, needed in zip(reversed(choices), reversed(units), strict=True):
        found.append(int(choice[capacity]))
        capacity -= needed[found[-1]]
    return found[::-1]
