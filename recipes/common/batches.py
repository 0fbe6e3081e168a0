"""Batches to train on, and whether there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset

import qat

__all__ = ["require_whole_batch", "training_batches"]


def require_whole_batch(count: int, batch_size: int) -> None:
    """Check that there is a batch to train on, before anything is made of the examples.

    Raises:
        DataError: there are fewer examples than one batch holds, so there would be no step at all.
    """
    if count < batch_size:
        raise qat.DataError(
            f"optimization.batch_size: {batch_size} is more than the {count} examples to train on, so there is no "
            "whole batch: give more data, or a smaller batch_size (or data.block_size)"
        )


def training_batches(
    examples: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    """Shuffle examples into whole batches, by torch's global random numbers.

    Args:
        examples: what to train on.
        batch_size: examples a batch.
        collate: puts a batch together; none: torch's own way.

    Raises:
        DataError: as `require_whole_batch`.
    """
    require_whole_batch(len(examples), batch_size)  # type: ignore[arg-type]
    return DataLoader(examples, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
