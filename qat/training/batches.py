"""Batches for calibration, from the training dataloaders of a trainer, whose own order stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["default_model_inputs", "training_batches"]


def default_model_inputs(batch: Any) -> Any:
    """What of a dataloader's batch the model is called with: of a tuple or list its first element, else all of it."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def training_batches(
    trainer: Trainer, pl_module: LightningModule, count: int, convert: Callable[[Any], Any]
) -> Iterator[Any]:
    """The first ``count`` batches of an epoch, on the device, as ``convert`` makes them for the model.

    The iterators and generators of the training loaders stay where they are. Global random numbers do not: wrap the
    loop in Lightning's ``isolate_rng``.
    """
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    loaders.flattened = [_apart(loader) for loader in loaders.flattened]
    sources = [source for loader in loaders.flattened for source in (loader, getattr(loader, "sampler", None))]
    generators = [g for source in sources if (g := getattr(source, "generator", None)) is not None]
    states = [generator.get_state() for generator in generators]
    data = trainer.datamodule  # type: ignore[attr-defined]
    hooks = data if data is not None and is_overridden("on_before_batch_transfer", data) else pl_module
    for batch, _, _ in islice(iter(loaders), count):
        batch = hooks.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
        yield convert(trainer.strategy.batch_to_device(batch, pl_module.device, 0))
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _apart(loader: Any) -> Any:
    """A copy of ``loader`` with a position of its own; an iterator has but one."""
    if isinstance(loader, Iterator):
        return loader
    own = copy.copy(loader)
    if getattr(own, "persistent_workers", False):  # which would hand out training's iterator
        own.num_workers, own.timeout = 0, 0
    return own
