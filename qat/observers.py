"""Statistics of activations, as buffers: what calibration records and a scale is taken from.

Each observer gives a result that does not depend on the order of the batches, nor on whether activation
checkpointing shows it the same batch twice in a row: a maximum is idempotent, and a histogram that counts
everything twice has the same percentiles. None averages. `initialized` says whether anything was seen; no value of
a range ever stands for "unset".
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from qat.errors import CalibrationError

__all__ = ["Absmax", "AbsmaxObserver", "Observer", "ObserverChoice", "Percentile", "PercentileObserver"]


class Observer(nn.Module):
    """Records the largest magnitude of a stream of tensors; a subclass may record more."""

    initialized: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("largest", torch.zeros((), dtype=torch.float32))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Record ``x`` (any shape, any float dtype); an empty tensor changes nothing."""
        if not x.numel():
            return
        largest = x.abs().amax().float()
        if not bool(largest.isfinite()):
            raise CalibrationError("observer: a batch holds inf or NaN activations: check the model and the data")
        torch.maximum(self.largest, largest, out=self.largest)
        self.initialized.fill_(True)

    def magnitude(self) -> Tensor:
        """The magnitude that the largest code stands for: float32 scalar."""
        if not bool(self.initialized):
            raise CalibrationError("observer: the range was asked for before any batch was seen: calibrate first")
        return self.largest.clone()

    def reduce(self) -> None:
        """Make the statistics those of all ranks of the default process group."""
        torch.distributed.all_reduce(self.largest, torch.distributed.ReduceOp.MAX)
        seen = self.initialized.to(torch.int32)
        torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        self.initialized.copy_(seen.bool())

    def reset(self) -> None:
        """Forget everything seen."""
        for buffer in self.buffers():
            buffer.zero_()


class AbsmaxObserver(Observer):
    """The largest magnitude ever seen."""


class PercentileObserver(Observer):
    """A percentile of all magnitudes seen, from one histogram with a range that only ever doubles.

    The bins span ``[0, 2^exponent]``. When a larger value arrives the exponent grows and neighbouring bins are
    added in pairs, which is exact; so the final histogram, and the percentile, are the same for every order of the
    batches. The percentile is read at the upper edge of its bin (an error of at most 1/2048 of the range, upwards).
    """

    counts: Tensor
    exponent: Tensor

    def __init__(self, percentile: float = 99.99, bins: int = 4096) -> None:
        super().__init__()
        self.percentile = percentile
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Record ``x``."""
        super().update(x)
        largest, bins = float(self.largest), self.counts.numel()
        self._grow(max(-100, math.ceil(math.log2(largest))) if largest > 0 else -100)
        # A bin holds its upper edge and not its lower one, so that the very largest value, a power of two, lies where
        # it would lie after any number of doublings: the last of 2n bins becomes the last of n, and so on.
        values = x.abs().float().flatten().mul_(bins * 2.0 ** -int(self.exponent))
        self.counts += torch.bincount(values.ceil_().long().sub_(1).clamp_(0, bins - 1), minlength=bins)

    def _grow(self, exponent: int) -> None:
        current = int(self.exponent) if bool(self.counts.any()) else exponent
        while current < exponent:
            paired = self.counts.view(-1, 2).sum(1)
            self.counts.zero_()
            self.counts[: paired.numel()] = paired
            current += 1
        self.exponent.fill_(current)

    def magnitude(self) -> Tensor:
        """The smallest bin edge below which ``percentile`` percent of the magnitudes lie."""
        largest = super().magnitude()
        cumulative = self.counts.cumsum(0)
        wanted = math.ceil(float(cumulative[-1]) * self.percentile / 100)
        index = int(torch.searchsorted(cumulative, wanted))
        edge = (index + 1) / self.counts.numel() * 2.0 ** int(self.exponent)
        return torch.clamp(largest.new_tensor(edge), max=largest)

    def reduce(self) -> None:
        """Sum of the ranks' histograms, at the widest rank's range."""
        exponent = self.exponent.clone() if bool(self.initialized) else self.exponent.new_tensor(-(2**30))
        torch.distributed.all_reduce(exponent, torch.distributed.ReduceOp.MAX)
        self._grow(int(exponent))
        torch.distributed.all_reduce(self.counts, torch.distributed.ReduceOp.SUM)
        super().reduce()


class Absmax(BaseModel):
    """Scale activations by the largest magnitude seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["absmax"] = "absmax"

    def make(self) -> AbsmaxObserver:
        """A new observer."""
        return AbsmaxObserver()


class Percentile(BaseModel):
    """Scale activations by a percentile of their magnitudes; what lies beyond saturates."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["percentile"] = "percentile"
    percentile: float = Field(default=99.99, gt=0, le=100)
    """Percent of the magnitudes that stay within the range."""

    def make(self) -> PercentileObserver:
        """A new observer."""
        return PercentileObserver(self.percentile)


ObserverChoice = Annotated[Absmax | Percentile, Field(discriminator="kind")]
