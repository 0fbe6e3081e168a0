"""GPTQ: weights are rounded one column after another, and the columns that follow make up for the error.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, eq. 2 and 3 with algorithm 1. With U the upper Cholesky factor of
the inverse of H + damping, column j of a row w in order gives

    e_j = (w_j - served(w_j)) / U_jj        w_k -= e_j U_jk for k > j

The range of each group is fixed before, so columns come in the order of falling H_jj ("activation order") whatever
their groups. The master weight to begin with is the compensated weight just before its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.numerics import QType, round_to
from qat.starts.base import Ends, chunks_with_ends

__all__ = ["compensated_weight"]

_DAMPING = 0.01  # of the mean of the diagonal
_BLOCK = 128
_CUDA_ELEMENTS = 1 << 28  # 1 GiB of float32: each chunk of rows costs a pass over all columns, in Python


@torch.no_grad()
def compensated_weight(weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor, ends: Ends) -> Tensor:
    """A master weight, like ``weight``, whose codes by the range ``ends`` make a smaller output error.

    ``weight`` is ``(out, in)``, ``moments`` float32, ``(in, in)``, ``ends`` float32, ``(groups, 1)``. Groups without a
    range keep their weights.

    >>> from qat.formats import QUANTO
    >>> int2, weight = QUANTO.qtypes["int2"], torch.tensor([[0.4, 0.4]])  # both round to 0, their sum to 1
    >>> ends = torch.tensor([[0.0]]), torch.tensor([[3.0]])
    >>> compensated = compensated_weight(weight, int2, torch.float32, torch.ones(2, 2), ends)
    >>> compensated.round()
    tensor([[0., 1.]])
    """
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order])
    parts = chunks_with_ends(weight, ends, _CUDA_ELEMENTS if weight.is_cuda else None)
    return torch.cat([_of_rows(part, own, qtype, dtype, order, factor) for part, own in parts])


def inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of ``moments`` with damping, which grows until there is one."""
    size = moments.diagonal().mean()
    size = torch.where(size > 0, size, torch.ones_like(size))  # no input at all: nothing is compensated
    damping = _DAMPING
    for _ in range(6):
        damped = moments.clone()
        damped.diagonal().add_(damping * size)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper
        damping *= 10
    return torch.eye(len(moments), device=moments.device)


def _of_rows(weight: Tensor, ends: Ends, qtype: QType, dtype: torch.dtype, order: Tensor, factor: Tensor) -> Tensor:
    flat = (round_to(qtype.scale_shift(*ends)[0], qtype.scale_dtype(dtype)) == 0).view(len(weight), -1).t()
    scale, shift = qtype.serve(*qtype.scale_shift(*ends), dtype, weight.shape[1])
    scale, shift = _by_group(scale, len(weight)), None if shift is None else _by_group(shift, len(weight))
    copies = qtype.group_size(1) or 1  # of a column, which make a group; one where a type has no fixed group size
    # Transposed, so that a column lies together in memory.
    masters, columns, some_flat = weight.t(), order.tolist(), bool(flat.any())
    rest, made = masters[order].float(), torch.empty_like(masters, memory_format=torch.contiguous_format)
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        errors = torch.empty_like(rest[start:end])
        for j in range(start, end):
            column, group = columns[j], columns[j] * len(flat) // len(columns)
            own = rest[j].to(weight.dtype)
            own = torch.where(flat[group], masters[column], own) if some_flat else own
            made[column] = own
            scales = scale[group], None if shift is None else shift[group]
            served = qtype.fake_quantize(own[:, None].expand(-1, copies), *scales, dtype, torch.float32)[:, 0]
            torch.sub(rest[j], served, out=errors[j - start]).div_(factor[j, j])
            rest[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return made.t().contiguous()


def _by_group(values: Tensor, rows: int) -> Tensor:
    """Values of all groups, ``(rows * groups, 1)``, as ``(groups, rows, 1)``, contiguous."""
    return values.view(rows, -1).t().contiguous()[..., None]
