"""The best of all starts: for each layer the one with the smallest served output error on calibration batches.

Every start is good at something else, and none always wins. So each is made, and judged by what it is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import QType
from qat.starts.base import Start, output_error
from qat.starts.clip import clipped_range
from qat.starts.gptq import compensated_weight
from qat.starts.hqq import half_quadratic_range
from qat.starts.output import output_start
from qat.starts.seq import balanced_range, fits

__all__ = ["best_start", "gptq_start"]


def best_start(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Start:
    """The best of all ranges, and the same after GPTQ, whichever has the smaller `output_error`.

    >>> from qat.formats import QUANTO
    >>> weight, int2, moments = torch.randn(4, 8), QUANTO.qtypes["int2"], torch.eye(8) + 1
    >>> minmax = Start("minmax", int2.weight_range(weight), weight)
    >>> best, found = best_start(weight, int2, torch.float32, moments), []
    >>> for start in (minmax, best):
    ...     found.append(output_error(start, weight, int2, torch.float32, moments))
    >>> found[1] <= found[0]
    True
    """
    ranges, error = _best_range(weight, qtype, dtype, moments)
    compensated = _compensated(ranges, qtype, dtype, moments)
    return compensated if output_error(compensated, weight, qtype, dtype, moments) < error else ranges


def gptq_start(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Start:
    """GPTQ within the best of all ranges."""
    return _compensated(_best_range(weight, qtype, dtype, moments)[0], qtype, dtype, moments)


def _compensated(start: Start, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Start:
    return Start("gptq", start.ends, compensated_weight(start.weight, qtype, dtype, moments, start.ends))


def _best_range(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> tuple[Start, float]:
    """With its `output_error`."""
    clipped = clipped_range(weight, qtype, dtype)
    ranges = {
        "clip": clipped,
        "minmax": qtype.weight_range(weight),
        "hqq": half_quadratic_range(weight, qtype, dtype),
    }
    if fits(qtype):
        ranges["seq"] = balanced_range(weight, qtype, dtype)
    starts = [Start(name, ends, weight) for name, ends in ranges.items()]
    starts.append(output_start(weight, qtype, dtype, moments, clipped))
    errors = [output_error(start, weight, qtype, dtype, moments) for start in starts]
    smallest = min(errors)
    return starts[errors.index(smallest)], smallest  # the first of equals
