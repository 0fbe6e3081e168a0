"""HQQ: half-quadratic quantization, which needs no data (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/).

It minimizes the lp norm of the weight's error, with p = 0.7, so that a few outliers may be far off. The error is split
into a sparse part e and a rest, and two steps alternate. With x = (w - v) / s, the error in units of the scale:

    e = sign(x) max(|x| - |x|^(p - 1) / beta, 0)        beta grows by 1 % each time
    z = mean(s q - w + s e)

Here v = s q - z is the served value. Units of the scale make one beta fit weights of any size. Symmetric types have no
shift: there the second step is the least-squares scale ``s = sum q (w - s e) / sum q^2``. The best range that was met
is kept, judged by the lp norm of what is served; the first one is that from min to max.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat import kernels
from qat.numerics import QType
from qat.starts.base import Ends, by_chunks, chosen

__all__ = ["half_quadratic_range"]

_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


@torch.no_grad()
def half_quadratic_range(weight: Tensor, qtype: QType, dtype: torch.dtype) -> Ends:
    """The ends of each group's range, float32, ``(groups, 1)``, after 20 steps.

    >>> from qat.formats import QUANTO
    >>> weight = torch.tensor([[0.0, 0.1, 0.9, 1.0, 1.1, 2.0, 2.9, 3.1]])
    >>> low, high = half_quadratic_range(weight, QUANTO.qtypes["int2"], torch.float32)
    >>> bool(high - low <= 3.2)
    True
    """
    return by_chunks(weight, lambda part: _of_chunk(part, qtype, dtype))


def _of_chunk(weight: Tensor, qtype: QType, dtype: torch.dtype) -> Ends:
    rows, options = qtype.grouped(weight).float(), (qtype.key, dtype)
    best = ends = qtype.weight_range(weight)
    smallest, beta = torch.full_like(ends[1], torch.inf), _BETA
    for step in range(_STEPS + 1):
        scale, shift = qtype.serve(*qtype.scale_shift(*ends), dtype, weight.shape[1])
        stored = kernels.fake_quantize_weight(weight, scale, shift, *options, qtype.storage)
        unit = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
        error = (rows - qtype.grouped(qtype.decode(stored, scale, shift, dtype))).div_(unit)
        size = error.abs()
        power = size.pow(_NORM)  # slow on a CPU
        norm = (power * unit.abs().pow(_NORM)).sum(1, keepdim=True)
        better = norm < smallest
        smallest = torch.where(better, norm, smallest)
        best = chosen(better, ends, best)
        if step == _STEPS:
            break
        sparse = error.sign() * (size - power.div_(size) / beta).clamp_(min=0).nan_to_num_(0.0)
        codes = qtype.grouped(stored).float()
        if shift is None:
            squares = codes.square().sum(1, keepdim=True)
            fitted = (codes * (rows - unit * sparse)).sum(1, keepdim=True) / squares * qtype.steps
            ends = None, torch.where((squares > 0) & (fitted * ends[1].sign() > 0), fitted, ends[1])
        else:
            moved = (scale * codes - rows + unit * sparse).mean(1, keepdim=True)
            ends = -moved, scale * qtype.steps - moved
        beta *= _GROWTH
    return best
