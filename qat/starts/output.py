"""Ranges by the error of the layer's output: for each group ``e_g^T H_gg e_g``, with H from calibration batches.

First the search of `qat.starts.clip` by this error; a group whose inputs are all zero keeps what that start has. Then
for the codes C that were found, scale and shift have a least-squares solution; it is kept where the served error falls:

    minimize (s C - z - w)^T H (s C - z - w)        2 equations in s and z; symmetric types: s = C^T H w / C^T H C

Last, errors of groups of one row add up in its output. So each group in turn is fitted again, with what the others
leave: ``c_g = sum over k != g of H_gk e_k`` joins the error as ``2 e_g^T c_g``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import kernels
from qat.numerics import QType
from qat.starts.base import Ends, Start, block_product, chunks, finish
from qat.starts.clip import clipped_range, search

__all__ = ["output_range", "output_start"]

_FITS, _SWEEPS = 4, 2


def output_start(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Start:
    """`output_range` as a start."""
    return Start("output", output_range(weight, qtype, dtype, moments), weight)


@torch.no_grad()
def output_range(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> Ends:
    """The ends of each group's range, float32, ``(groups, 1)``; ``moments`` is float32, ``(in, in)``.

    >>> from qat.formats import QUANTO
    >>> weight, int2 = torch.tensor([[-1.0, 0.1, 0.2, 5.0]]), QUANTO.qtypes["int2"]
    >>> moments = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))  # nothing arrives at the outlier
    >>> bool(output_range(weight, int2, torch.float32, moments)[1] < 1)
    True
    """
    return finish([_Rows(part, qtype, dtype, moments).find() for part in chunks(weight)])


class _Rows:
    """The search for a block of rows."""

    def __init__(self, weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> None:
        self.weight, self.qtype, self.dtype, self.moments = weight, qtype, dtype, moments

    def find(self) -> Ends:
        ends = clipped_range(self.weight, self.qtype, self.dtype)
        found = search(self.weight, self.qtype, lambda low, high: self._judge(slice(None), (low, high)))
        ends = self._better(slice(None), ends, found)
        for _ in range(_FITS):
            ends = self._better(slice(None), ends, self._fit(slice(None), ends))
        size = self.qtype.group_size(self.weight.shape[1])
        return ends if size is None else self._sweep(ends, size)

    def _sweep(self, ends: Ends, size: int) -> Ends:
        count = self.weight.shape[1] // size
        low, high = (None if end is None else end.clone().view(-1, count) for end in ends)
        assert high is not None
        error = self._error(slice(None), ends)
        for _ in range(_SWEEPS):
            for group in range(count):
                columns, own = slice(group * size, (group + 1) * size), slice(group, group + 1)
                here = (None if low is None else low[:, own], high[:, own])
                others = error @ self.moments[:, columns] - error[:, columns] @ self.moments[columns, columns]
                better = self._better(columns, here, self._fit(columns, here, others), others)
                if low is not None and better[0] is not None:
                    low[:, own] = better[0]
                high[:, own] = better[1]
                error[:, columns] = self._error(columns, better)
        return None if low is None else low.reshape(-1, 1), high.reshape(-1, 1)

    def _quantized(self, columns: slice, ends: Ends, out_dtype: torch.dtype) -> Tensor:
        scale, shift = self.qtype.serve(*self.qtype.scale_shift(*ends), self.dtype, self.weight.shape[1])
        options = self.qtype.key, self.dtype, out_dtype
        return kernels.fake_quantize_weight(self.weight[:, columns].contiguous(), scale, shift, *options)

    def _error(self, columns: slice, ends: Ends) -> Tensor:
        return self._quantized(columns, ends, torch.float32) - self.weight[:, columns]

    def _product(self, columns: slice, x: Tensor) -> Tensor:
        return block_product(x, self.moments[columns, columns], self.qtype)

    def _judge(self, columns: slice, ends: Ends, others: Tensor | None = None) -> Tensor:
        error = self._error(columns, ends)
        product = self._product(columns, error)
        product = product if others is None else product + 2 * others
        return self.qtype.grouped(product.mul_(error)).sum(1, keepdim=True)

    def _better(self, columns: slice, ends: Ends, new: Ends, others: Tensor | None = None) -> Ends:
        better = self._judge(columns, new, others) < self._judge(columns, ends, others)
        low = None if ends[0] is None or new[0] is None else torch.where(better, new[0], ends[0])
        return low, torch.where(better, new[1], ends[1])

    def _fit(self, columns: slice, ends: Ends, others: Tensor | None = None) -> Ends:
        """The least-squares range of the codes that ``ends`` give; ``ends`` where there is none."""
        weight, grouped = self.weight[:, columns].float(), self.qtype.grouped
        codes = self._quantized(columns, ends, self.qtype.storage).float()
        of_codes, of_weight = self._product(columns, codes), self._product(columns, weight)
        of_weight = of_weight if others is None else of_weight - others

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return grouped(a * b).sum(1, keepdim=True)

        squares, target = inner(codes, of_codes), inner(codes, of_weight)
        if ends[0] is None:
            scale, low = target / squares, None
        else:
            ones = torch.ones_like(weight)
            cross, one, mean = (
                inner(ones, of_codes),
                inner(ones, self._product(columns, ones)),
                grouped(of_weight).sum(1, keepdim=True),
            )
            scale = (target * one - cross * mean) / (squares * one - cross.square())
            low = (mean - scale * cross) / one
        high = scale * self.qtype.steps + (0 if low is None else low)
        usable = (scale > 0) & high.isfinite() & (True if low is None else low.isfinite())
        return None if low is None or ends[0] is None else torch.where(usable, low, ends[0]), torch.where(
            usable, high, ends[1]
        )
