"""What a start is, and how starts are compared: by the squared error of the layer's output.

With a row's error e = served - weight and the second moments H = mean(x x^T) of the layer's inputs, the mean squared
error of its output is e^T H e. "Served" means the loader's arithmetic: rounded scale and shift, codes, rounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from qat import kernels
from qat.numerics import QType, round_to

__all__ = [
    "DataStart",
    "Ends",
    "RangeStart",
    "Start",
    "block_product",
    "by_chunks",
    "chosen",
    "chunks",
    "chunks_with_ends",
    "joined",
    "output_error",
    "quantized",
    "served",
]

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32, and a few copies: far below the weight itself in a large model

Ends: TypeAlias = tuple[Tensor | None, Tensor]
"""Low end (None for symmetric types) and high end of each group's range: float32, ``(groups, 1)``."""


class Start(NamedTuple):
    """What training begins with."""

    name: str
    """Of the start that made it."""
    ends: Ends
    weight: Tensor
    """The master weight to begin with, ``(out, in)``: the layer's own, or a compensated one."""


RangeStart: TypeAlias = Callable[[Tensor, QType, torch.dtype], Ends]
"""Of a weight, ``(out, in)``, its type and the serving dtype."""
DataStart: TypeAlias = Callable[[Tensor, QType, torch.dtype, Tensor], Start]
"""The same with the second moments of the inputs, float32, ``(in, in)``."""


def chunks(weight: Tensor, elements: int | None = None) -> Iterator[Tensor]:
    """Blocks of rows, so that a search holds little more than the weight. ``elements``: default `CHUNK_ELEMENTS`."""
    rows = max(1, (elements or CHUNK_ELEMENTS) // max(1, weight.shape[1]))
    return iter(torch.split(weight.detach(), rows))


def chunks_with_ends(weight: Tensor, ends: Ends, elements: int | None = None) -> Iterator[tuple[Tensor, Ends]]:
    """`chunks` of a weight, each with the ends of its own groups."""
    (low, high), at = ends, 0
    for part in chunks(weight, elements):
        own = slice(at, at := at + len(part) * (len(high) // len(weight)))
        yield part, (None if low is None else low[own], high[own])


def by_chunks(weight: Tensor, find: Callable[[Tensor], Ends]) -> Ends:
    """What ``find`` gives of each chunk, in one."""
    return joined([find(part) for part in chunks(weight)])


def joined(found: Sequence[Ends]) -> Ends:
    """The ends of chunks, in one."""
    lows = [low for low, _ in found if low is not None]
    return torch.cat(lows) if lows else None, torch.cat([high for _, high in found])


def chosen(which: Tensor, ends: Ends, others: Ends) -> Ends:
    """``ends`` where ``which`` says so, ``(groups, 1)``, and the ``others`` elsewhere."""
    low = None if ends[0] is None or others[0] is None else torch.where(which, ends[0], others[0])
    return low, torch.where(which, ends[1], others[1])


def quantized(
    weight: Tensor, ends: Ends, qtype: QType, dtype: torch.dtype, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that a range gives, ``(out, in)``, or the codes, as `kernels.fake_quantize_weight` does."""
    scale, shift = qtype.serve(*qtype.scale_shift(*ends), dtype, weight.shape[1])
    return kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, out_dtype)


def served(weight: Tensor, ends: Ends, qtype: QType, dtype: torch.dtype) -> Tensor:
    """The values that will be served, float32, ``(out, in)``. A group too narrow to have a scale follows its weights.

    That is how `qat.quantizers.learned_affine` reads a range.
    """
    flat = round_to(qtype.scale_shift(*ends)[0], qtype.scale_dtype(dtype)) == 0
    return quantized(weight, chosen(flat, qtype.weight_range(weight), ends), qtype, dtype)


def output_error(start: Start, weight: Tensor, qtype: QType, dtype: torch.dtype, moments: Tensor) -> float:
    """``tr(E H E^T)``: the squared error of the output, summed over outputs, a mean over the calibration's inputs.

    ``weight`` is the float weight that `Start.weight` stands for.

    >>> from qat.formats import QUANTO
    >>> weight, int8 = torch.tensor([[0.3, -127.0]]), QUANTO.qtypes["int8"]
    >>> start = Start("minmax", int8.weight_range(weight), weight)
    >>> round(output_error(start, weight, int8, torch.float32, torch.eye(2)), 4)
    0.09
    """
    total = 0.0
    for (master, ends), part in zip(chunks_with_ends(start.weight, start.ends), chunks(weight), strict=True):
        error = served(master, ends, qtype, dtype) - part.float()
        total += float(((error @ moments) * error).sum(dtype=torch.float64))
    return max(total, 0.0)


def block_product(x: Tensor, moments: Tensor, qtype: QType) -> Tensor:
    """``x_g H_gg`` of each group, side by side: ``(rows, in)``. ``moments`` is float32, ``(in, in)``."""
    size = qtype.group_size(x.shape[1])
    if size is None:
        return x @ moments
    count = x.shape[1] // size
    blocks = moments.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (x.view(-1, count, size).transpose(0, 1) @ blocks).transpose(0, 1).reshape(x.shape)
