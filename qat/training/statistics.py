"""Statistics of one quantized weight or activation, as pure functions: error, saturation, use of codes, scale.

They make no tensor as large as a large weight, and nothing waits for a device. `qat.training.guards` judges them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.numerics import QType

__all__ = ["ActivationStatistics", "WeightStatistics", "activation_statistics", "weight_statistics"]

_CHUNK = 1 << 24  # elements that are looked at in one pass
_SMALL_GROUP = 16  # elements of a group, below which few codes mean nothing
_REACH = 1e-3  # of the largest weight: a range that reaches less far has collapsed


class WeightStatistics(NamedTuple):
    """What `weight_statistics` finds: float32 scalars on the weight's device."""

    error: Tensor
    """Root of the mean square of the quantization error, relative to that of the weight."""
    saturated: Tensor
    """Share of weights more than a step beyond the range."""
    code_use: Tensor
    """Share of the range of codes that a group spans, on average."""
    dead: Tensor
    """Share of groups that use one or two codes alone."""
    collapsed: Tensor
    """Share of groups whose scale is zero, or far too small for their weights."""
    nonfinite: Tensor
    """Share of groups that hold inf or NaN."""
    log2_scale: Tensor
    """Mean of the binary logarithms of scales other than zero."""


class ActivationStatistics(NamedTuple):
    """What `activation_statistics` finds: float32 scalars on the activation's device."""

    error: Tensor
    """Root of the mean square of the quantization error, relative to that of the activation."""
    saturated: Tensor
    """Share of values beyond the range."""
    code_use: Tensor
    """The largest magnitude, as a share of what the range reaches to; at most 1."""
    nonfinite: Tensor
    """Share of values that are inf or NaN, which codes hide from what comes after."""
    log2_scale: Tensor
    """Binary logarithm of the scale."""


@torch.no_grad()
def weight_statistics(weight: Tensor, value: Tensor, codes: Tensor, scale: Tensor, qtype: QType) -> WeightStatistics:
    """Statistics of one quantized weight; nothing waits for a device.

    Args:
        weight: master weight, ``(out, in)``, any float dtype.
        value: the fake-quantized weight, of the same shape.
        codes: its codes, in the type's `storage` dtype.
        scale: the serving scale, ``(groups, 1)``.
        qtype: the type of the codes.

    >>> from qat.formats import QUANTO
    >>> int8, weight = QUANTO.qtypes["int8"], torch.tensor([[1.0, -1.0] * 16, [0.0] * 32])
    >>> scale, _ = int8.scale_shift(*int8.weight_range(weight))
    >>> value = int8.fake_quantize(weight, scale, None, torch.float32, torch.float32)
    >>> found = weight_statistics(weight, value, int8.encode(weight, scale, None), scale, int8)
    >>> float(found.dead), float(found.collapsed), float(found.saturated)
    (1.0, 0.0, 0.0)
    """
    parts = [qtype.grouped(tensor) for tensor in (weight, value, codes)]
    groups, size = parts[0].shape
    scale = scale.detach().float().abs().expand(groups, 1)
    step = scale * (qtype.code_max * torch.finfo(qtype.storage).eps / 1.75 if qtype.floating else 1.0)
    # Of a floating type the step at the end: e4m3 has 1.75 * 2^8 and, one code below it, 1.625 * 2^8.
    span = qtype.code_max - qtype.code_min
    few = size >= _SMALL_GROUP
    sums = []
    rows = max(1, _CHUNK // size)
    for w, v, c, s, unit in zip(*(torch.split(tensor, rows) for tensor in (*parts, scale, step)), strict=True):
        w, c = w.float(), c.float() if qtype.floating else c
        off, largest = (w - v).abs_(), w.abs().amax(1, keepdim=True)
        low, high = c.amin(1, keepdim=True), c.amax(1, keepdim=True)
        dead = ((c == low) | (c == high)).all(1) if few else torch.zeros_like(low[:, 0], dtype=torch.bool)
        narrow = (s * qtype.steps < _REACH * largest) & (off.amax(1, keepdim=True) > largest / 2)
        spans = (high.float() - low.float()) / span
        counts = ((off > unit).sum(), spans.sum(), dead.sum(), narrow.sum(), (~largest.isfinite()).sum())
        sums.append(torch.stack([off.square().sum(), w.square().sum(), *(count.float() for count in counts)]))
    off_squares, squares, saturated, used, dead_groups, narrow_groups, spoilt = torch.stack(sums).sum(0)
    logs = torch.where(scale > 0, scale, 1.0).log2()
    return WeightStatistics(
        (off_squares / squares.clamp(min=1e-30)).sqrt(),
        saturated / weight.numel(),
        used / groups,
        dead_groups / groups,
        narrow_groups / groups,
        spoilt / groups,
        logs.sum() / (scale > 0).sum().clamp(min=1),
    )


@torch.no_grad()
def activation_statistics(x: Tensor, scale: Tensor, qtype: QType, dtype: torch.dtype) -> ActivationStatistics:
    """Statistics of one activation, any shape, by its serving scale, a scalar; ``dtype`` is the serving dtype.

    >>> from qat.formats import QUANTO
    >>> x, scale = torch.tensor([0.5, -1.0, 4.0, 0.0]), torch.tensor(1 / 127)
    >>> found = activation_statistics(x, scale, QUANTO.qtypes["int8"], torch.float32)
    >>> float(found.saturated), float(found.code_use)
    (0.25, 1.0)
    """
    wide, reach = x.float(), scale.float() * qtype.steps
    off = wide - qtype.fake_quantize_activation(x, scale, dtype).float()
    size = wide.abs()
    return ActivationStatistics(
        (off.square().sum() / wide.square().sum().clamp(min=1e-30)).sqrt(),
        (size > reach * (1 + 1 / 128)).float().mean(),  # int8 has a code more below zero
        (size.amax() / reach.clamp(min=1e-30)).clamp(max=1),
        (~size.isfinite()).float().mean(),
        scale.float().clamp(min=1e-30).log2(),
    )
