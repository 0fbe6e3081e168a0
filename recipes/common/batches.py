"""Batches to train on: their order, and the noise of each step, are a function of a seed and of a batch's number.

So a fit that goes on from a checkpoint sees what it would have seen without a break, whatever was drawn in between. All
random numbers begin anew at each batch: those that put it together, such as the noise of diffusion, and those that the
step then draws, such as dropout. The price is a seeding of each generator a batch, which takes microseconds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from torch.utils.data import Dataset, default_collate

from recipes.data import DataError

__all__ = ["FitBatches", "TrainingBatches", "mixed_seed", "require_whole_batch"]


def mixed_seed(*numbers: int) -> int:
    """Return a seed of 32 bits, another one for each combination of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


def require_whole_batch(count: int, batch_size: int) -> None:
    """Check that there is a batch to train on, before anything is made of the examples.

    Raises:
        DataError: there are fewer examples than one batch holds, so there would be no step at all.
    """
    if count < batch_size:
        raise DataError(
            f"optimization.batch_size: {batch_size} is more than the {count} examples to train on, so there is no "
            "whole batch: give more data, or a smaller batch_size (or data.block_size)"
        )


@functools.lru_cache(maxsize=2)  # all batches of a pass share it
def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class TrainingBatches:
    """Whole batches of shuffled examples, another order in each pass; an iteration is one pass from the first on.

    Raises:
        DataError: as `require_whole_batch`.

    >>> batches = TrainingBatches(list(range(8)), 2, seed=3)
    >>> torch.equal(torch.cat(list(batches)).sort().values, torch.arange(8))
    True
    >>> torch.equal(batches.batch(5), TrainingBatches(list(range(8)), 2, seed=3).batch(5))
    True
    """

    dataset: Dataset[Any]
    """The examples."""
    batch_size: int
    """Examples a batch."""
    collate_fn: Callable[[list[Any]], Any] = default_collate
    """Puts a batch together; it may draw from torch's global random numbers."""
    seed: int = 0
    """Decides order and noise."""
    rank: int = 0
    """Which of several processes this is; each has batches of its own."""
    processes: int = 1
    """How many there are."""

    def __post_init__(self) -> None:
        require_whole_batch(len(self.dataset), self.batch_size)  # type: ignore[arg-type]

    @property
    def _in_a_pass(self) -> int:
        count: int = len(self.dataset)  # type: ignore[arg-type]
        return count // self.batch_size

    def __len__(self) -> int:
        return max(1, self._in_a_pass // self.processes)

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, range(len(self)))

    def batch(self, number: int) -> Any:
        """Make the batch of a number, which may be beyond the first pass; all random numbers begin anew."""
        number = number * self.processes + self.rank
        passed, place = divmod(number, self._in_a_pass)
        order = _order(len(self.dataset), mixed_seed(self.seed, passed))  # type: ignore[arg-type]
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        lightning.seed_everything(mixed_seed(self.seed, passed, place), verbose=False)
        return self.collate_fn([self.dataset[index] for index in chosen])


class FitBatches:
    """The batches of one fit, pass after pass. Lightning keeps their place in checkpoints, as of any stateful loader.

    A copy begins at the first batch, for a calibration within the fit.

    Args:
        batches: of all processes.
        trainer: knows which process this is, once it fits.
        length: how many the fit takes.
    """

    def __init__(self, batches: TrainingBatches, trainer: lightning.Trainer, length: int) -> None:
        self._batches, self._trainer, self._length = batches, trainer, length
        self._position = self._start = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        own = self.__copy__()
        while True:
            self._position += 1
            yield own.batch(self._position - 1)

    def __copy__(self) -> TrainingBatches:
        several = self._trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return replace(self._batches, rank=several["rank"], processes=several["num_replicas"])

    @property
    def resumed_at_end(self) -> bool:
        """Whether a checkpoint left nothing to take."""
        return self._start >= self._length

    def state_dict(self) -> dict[str, int]:
        """How many batches were taken."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after as many."""
        self._position = self._start = state["position"]
