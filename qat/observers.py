"""What calibration sees of an activation, and the rules that take a scale from it.

An `Observer` keeps one histogram of magnitudes, in buffers. Its bins are the numbers of bfloat16, so no bin ever moves:
the result depends neither on the order of the batches, nor on whether activation checkpointing shows a batch twice,
and the histograms of several processes add up. Nothing waits for the device. Only `MovingAverage` depends on the order.

A rule is the configuration by which scales are taken. The default `Best` looks at what a scale does to the layer's
*output*. Of an output that is its own squared error. Of an input the squared error of each channel counts as much as
the weight's column for it is long. So a channel of outliers that small weights follow may be clipped. Plain squared
error, or a maximum, would give the range to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qat.numerics import QType
from qat.spec import NamedArguments

__all__ = ["Absmax", "Best", "MovingAverage", "Mse", "Observer", "ObserverChoice", "Percentile"]

_OCTAVES = (-40, 24)
"""Exponents of the smallest and the largest bin; what lies beyond counts in these."""
_BINS = 128 * (_OCTAVES[1] - _OCTAVES[0])
_OFFSET = (127 + _OCTAVES[0]) * 128
_CHUNK = 1 << 22  # elements that are widened at a time
_SPREAD = 128  # copies of the histogram on a GPU, so that fewer threads wait for one bin
_POINTS = 2  # of a bin, at which errors are computed
_WINDOW = 128 * 22  # bins below the largest one that counts; smaller magnitudes add less than 2^-40 of the squares
_CANDIDATES = 121  # twelve scales in each of ten octaves


class Observer(nn.Module):
    """A histogram of the magnitudes of a stream of tensors, which may count some channels more than others.

    >>> observer = Observer()
    >>> observer.update(torch.tensor([[0.5, -2.0]]))
    >>> float(observer.largest), int(observer.counts.sum())
    (2.0, 2)
    """

    counts: Tensor
    """int64, ``(bins,)``."""
    largest: Tensor
    initialized: Tensor
    """Whether anything was seen; no value of a range ever stands for "unset"."""
    nonfinite: Tensor
    """Whether inf, NaN or a number beyond the bins was seen."""
    calls: Tensor
    """How often something was recorded."""
    average: Tensor
    """Of the largest magnitudes of all calls; only with ``momentum``."""

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__()
        self.momentum = momentum
        if momentum is not None:  # of the largest magnitudes of all calls
            self.register_buffer("average", torch.zeros((), dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(_BINS, dtype=torch.int64))
        self.register_buffer("largest", torch.zeros((), dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("nonfinite", torch.tensor(False))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor, importance: Tensor | None = None, most: int | None = None) -> None:
        """Record ``x`` (any shape, any float dtype); an empty tensor changes nothing.

        Args:
            x: what to record.
            importance: integers, int64, ``(x.shape[-1],)``: how much an element of each channel counts.
            most: elements to count, about; of a larger tensor every n-th row counts n times, other ones in each call,
                and ``largest`` stays that of all.
        """
        if not x.numel():
            return
        # On a GPU without a second tensor; on a CPU the norm takes seven times as long.
        largest = (torch.linalg.vector_norm(x, torch.inf) if x.is_cuda else x.abs().amax()).float()
        self.nonfinite.logical_or_(~(largest < 2.0 ** _OCTAVES[1]))
        torch.maximum(self.largest, largest.nan_to_num(), out=self.largest)
        self.initialized.fill_(True)
        if self.momentum is not None:
            kept = torch.where(self.calls == 0, 0.0, self.momentum)
            self.average.mul_(kept).add_((1 - kept) * largest.nan_to_num())
        self.calls += 1
        rows = x.detach().reshape(-1, x.shape[-1] if x.ndim else 1)
        step = 1 if most is None or x.numel() <= most else -(-x.numel() // most)
        if step > 1:  # by a tensor, so that nothing waits for the device, and a resumed run goes on alike
            rows = rows[(torch.arange(0, len(rows), step, device=x.device) + self.calls) % len(rows)]
        weight = x.new_full((1,), step, dtype=torch.int64) if importance is None else importance * step
        columns = torch.arange(rows.shape[1], dtype=torch.int32, device=x.device)
        spread = _SPREAD if x.is_cuda else 1
        counts = self.counts.new_zeros(spread * _BINS)
        for part in torch.split(rows, max(1, _CHUNK // rows.shape[1])):
            bits = part.abs().float().view(torch.int32) >> 16  # a magnitude in bfloat16, cut off
            index = (bits - _OFFSET).clamp_(0, _BINS - 1)
            if spread > 1:
                index += columns % spread * _BINS
            counts.index_add_(0, index.flatten(), weight.expand_as(part).flatten())
        self.counts += counts.view(spread, _BINS).sum(0)

    def merge(self, other: Observer) -> None:
        """Add what another observer saw."""
        if self.momentum is not None:
            shares = torch.stack([self.calls, other.calls]).float()
            self.average.copy_((torch.stack([self.average, other.average]) * shares).sum() / shares.sum().clamp(min=1))
        for name in ("counts", "calls"):
            getattr(self, name).add_(getattr(other, name))
        for name in ("initialized", "nonfinite"):
            getattr(self, name).logical_or_(getattr(other, name))
        torch.maximum(self.largest, other.largest, out=self.largest)

    def percentile(self, percent: float) -> Tensor:
        """The smallest magnitude, float32, below which ``percent`` percent lie; at most 1/128 of itself too large."""
        total = self.counts.double().cumsum(0)  # of integers: sums may be larger than those that float64 tells apart
        index = torch.searchsorted(total, total[-1:] * (percent / 100)).clamp(max=_BINS - 1)
        edge = _edges(self.counts.device).index_select(0, index + 1)  # an index of no dimension would be waited for
        return torch.where(index == _BINS - 1, self.largest, torch.minimum(edge, self.largest)).squeeze(0)

    def errors(self, scales: Tensor, qtype: QType) -> Tensor:
        """Squared error of quantizing what was seen, relative to its squares: float64, the shape of ``scales``."""
        edges, bins = _edges(self.counts.device), torch.arange(_BINS, device=self.counts.device)
        last = (bins * (self.counts > 0)).max().clamp(min=_WINDOW - 1)
        window = last - bins[:_WINDOW]  # of a fixed size, so that nothing waits for the device
        within = (torch.arange(_POINTS, device=edges.device) + 0.5) / _POINTS
        points = (edges[window] + within[:, None] * (edges[window + 1] - edges[window])).flatten()
        counts = self.counts[window].double().repeat(_POINTS)
        found = qtype.fake_quantize_activation(points, scales.float().reshape(-1, 1), torch.float32)
        error = (found - points).double().square_() @ counts
        return (error / (points.double().square() @ counts).clamp(min=1e-300)).reshape(scales.shape)

    def saturated(self, magnitude: Tensor) -> Tensor:
        """The share of what was seen beyond ``magnitude``, float64 scalar, as far as bins tell; by importance."""
        beyond = self.counts[_edges(self.counts.device)[:-1] >= magnitude].sum()
        return beyond.double() / self.counts.sum().clamp(min=1)

    def reduce(self) -> None:
        """Make the statistics those of all ranks of the default process group."""
        if self.momentum is not None:
            sums = torch.stack([self.average * self.calls, self.calls.float()])
            torch.distributed.all_reduce(sums)
            self.average.copy_(sums[0] / sums[1].clamp(min=1))
        for buffer in (self.counts, self.calls):
            torch.distributed.all_reduce(buffer)
        for flag in (self.initialized, self.nonfinite):
            seen = flag.to(torch.int32)
            torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
            flag.copy_(seen.bool())
        torch.distributed.all_reduce(self.largest, op=torch.distributed.ReduceOp.MAX)

    def reset(self) -> None:
        """Forget everything seen."""
        for buffer in self.buffers():
            buffer.zero_()


def _edges(device: torch.device) -> Tensor:
    """The lower ends of all bins, and the upper end of the last one: float32."""
    bits = torch.arange(_BINS + 1, dtype=torch.int32, device=device) + _OFFSET
    edges = (bits << 16).view(torch.float32)
    edges[0] = 0
    return edges


class _Rule(NamedArguments, ABC):
    weighted: ClassVar[bool] = False
    """Whether the channels of an input count as much as the weight that follows them."""
    kind: Any
    largest_error: float = Field(default=1.0, gt=0)
    """A layer whose output would be further off keeps float activations: squared error relative to its squares."""

    @abstractmethod
    def magnitude(self, observer: Observer, qtype: QType) -> Tensor:
        """The magnitude that the largest code stands for: float32 scalar."""


class Absmax(_Rule):
    """Scale activations by the largest magnitude seen."""

    kind: Literal["absmax"] = "absmax"

    def magnitude(self, observer: Observer, qtype: QType) -> Tensor:
        """The largest magnitude seen."""
        return observer.largest.clone()


class Percentile(_Rule):
    """Scale activations by a percentile of their magnitudes; what lies beyond saturates."""

    kind: Literal["percentile"] = "percentile"
    percentile: float = Field(default=99.99, gt=0, le=100)
    """Percent of the magnitudes that stay within the range."""

    def magnitude(self, observer: Observer, qtype: QType) -> Tensor:
        """The percentile."""
        return observer.percentile(self.percentile)


class MovingAverage(_Rule):
    """Scale activations by an exponential average of the largest magnitude of each batch.

    ``a <- momentum * a + (1 - momentum) * max|x|``, from the first batch's maximum on (Jacob et al. 2018, section 3.1,
    https://arxiv.org/abs/1712.05877). So it depends on the order of the batches, as no other rule does.
    """

    kind: Literal["moving_average"] = "moving_average"
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """What is kept of the average in each call."""

    def magnitude(self, observer: Observer, qtype: QType) -> Tensor:
        """The average."""
        return observer.average.clone()


class Mse(_Rule):
    """Scale activations so that quantizing them makes the smallest squared error."""

    kind: Literal["mse"] = "mse"

    def magnitude(self, observer: Observer, qtype: QType) -> Tensor:
        """The best of 121 magnitudes, from the largest to a thousandth of it."""
        steps = torch.arange(_CANDIDATES, device=observer.largest.device)
        candidates = observer.largest * 2.0 ** (steps / -12.0)
        best = observer.errors(candidates / qtype.steps, qtype).argmin(0, keepdim=True)
        return candidates.index_select(0, best).squeeze(0)


class Best(Mse):
    """Scale activations for the smallest squared error of the layer's output, rather than of its input; the default.

    Channels of an input count by the squared length of their columns in the weight. That is the expected squared error
    of the output where errors of channels do not depend on each other.
    """

    weighted: ClassVar[bool] = True
    kind: Literal["best"] = "best"  # type: ignore[assignment]
    largest_error: float = Field(default=0.01, gt=0)


ObserverChoice = Annotated[Absmax | Percentile | MovingAverage | Best | Mse, Field(discriminator="kind")]
