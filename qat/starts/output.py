"""Ranges by the error of the layer's output: for each group ``e_g^T H_gg e_g``, with H from calibration batches.

First the search of `qat.starts.clip` by this error; a group whose inputs are all zero keeps what that start has. Then
for the codes C that were found, scale and shift have a least-squares solution; it is kept where the served error falls:

    minimize (s C - z - w)^T H (s C - z - w)        2 equations in s and z; symmetric types: s = C^T H w / C^T H C

Groups are judged apart from each other. To go over the groups of a row in turn, each with the errors that the others
leave, was measured: GPTQ after it gains nothing from that (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import QType
from qat.starts.base import Ends, Start, block_product, chosen, chunks_with_ends, joined, quantized
from qat.starts.clip import clipped_range, search

__all__ = ["fitted_range", "output_range", "output_start"]

_FITS = 4


def output_start(
    weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor, clipped: Ends | None = None
) -> Start:
    """`output_range` as a start."""
    return Start("output", output_range(weight, qtype, dtype, moments, clipped), weight)


@torch.no_grad()
def output_range(
    weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor, clipped: Ends | None = None
) -> Ends:
    """The ends of each group's range, float32, ``(groups, 1)``; ``moments`` is float32, ``(in, in)``.

    ``clipped`` is what `clipped_range` gives, where it is at hand.

    >>> from qat.formats import QUANTO
    >>> weight, int2 = torch.tensor([[-1.0, 0.1, 0.2, 5.0]]), QUANTO.qtypes["int2"]
    >>> moments = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))  # nothing arrives at the outlier
    >>> bool(output_range(weight, int2, torch.float32, moments)[1] < 4)
    True
    """
    clipped = clipped or clipped_range(weight, qtype, dtype)
    return joined([_of_chunk(*part, qtype, dtype, moments) for part in chunks_with_ends(weight, clipped)])


def _of_chunk(weight: Tensor, clipped: Ends, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Ends:
    def judge(low: Tensor | None, high: Tensor) -> Tensor:
        error = quantized(weight, (low, high), qtype, dtype).sub_(weight)
        return qtype.grouped(block_product(error, moments, qtype).mul_(error)).sum(1, keepdim=True)

    ends, error = clipped, judge(*clipped)
    for fit in range(_FITS + 1):
        tried = fitted_range(weight, ends, qtype, dtype, moments) if fit else search(weight, qtype, judge)
        found = judge(*tried)
        better = found < error  # never where an error is not a number
        ends, error = chosen(better, tried, ends), torch.where(better, found, error)
    return ends


def fitted_range(weight: Tensor, ends: Ends, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Ends:
    """The least-squares range of the codes that ``ends`` give, ``(groups, 1)``; ``ends`` where there is none."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return qtype.grouped(a * b).sum(1, keepdim=True)

    codes = quantized(weight, ends, qtype, dtype, qtype.storage).float()
    of_codes, of_weight = (block_product(x, moments, qtype) for x in (codes, weight.float()))
    squares, target = inner(codes, of_codes), inner(codes, of_weight)
    if ends[0] is None:
        scale, low = target / squares, None
    else:
        ones = torch.ones_like(codes)
        cross, mean = inner(ones, of_codes), inner(ones, of_weight)
        one = inner(ones, block_product(ones, moments, qtype))
        scale = (target * one - cross * mean) / (squares * one - cross.square())
        low = (mean - scale * cross) / one
    high = scale * qtype.steps + (0 if low is None else low)
    usable = (
        (scale * (1 if low is not None else ends[1].sign()) > 0)
        & high.isfinite()
        & (True if low is None else low.isfinite())
    )
    return chosen(usable, (low, high), ends)
