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
from qat.starts.base import Ends, Start, block_product, by_chunks, chosen, quantized
from qat.starts.clip import clipped_range, search

__all__ = ["fitted_range", "output_range", "output_start"]

_FITS = 4


def output_start(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Start:
    """`output_range` as a start."""
    return Start("output", output_range(weight, qtype, dtype, moments), weight)


@torch.no_grad()
def output_range(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Ends:
    """The ends of each group's range, float32, ``(groups, 1)``; ``moments`` is float32, ``(in, in)``.

    >>> from qat.formats import QUANTO
    >>> weight, int2 = torch.tensor([[-1.0, 0.1, 0.2, 5.0]]), QUANTO.qtypes["int2"]
    >>> moments = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))  # nothing arrives at the outlier
    >>> bool(output_range(weight, int2, torch.float32, moments)[1] < 4)
    True
    """
    return by_chunks(weight, lambda part: _of_chunk(part, qtype, dtype, moments))


def _of_chunk(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Ends:
    def judge(low: Tensor | None, high: Tensor) -> Tensor:
        error = quantized(weight, (low, high), qtype, dtype).sub_(weight)
        return qtype.grouped(block_product(error, moments, qtype).mul_(error)).sum(1, keepdim=True)

    def better(one: Ends, other: Ends) -> Ends:
        return chosen(judge(*other) < judge(*one), other, one)  # never where an error is not a number

    ends = better(clipped_range(weight, qtype, dtype), search(weight, qtype, judge))
    for _ in range(_FITS):
        ends = better(ends, fitted_range(weight, ends, qtype, dtype, moments))
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
    usable = (scale > 0) & high.isfinite() & (True if low is None else low.isfinite())
    return chosen(usable, (low, high), ends)
