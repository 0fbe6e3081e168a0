"""Calibration with batches from the training dataloaders of a trainer, whose own order stays as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qat.calibration import CalibrationReport
from qat.training.trainers import calibrate_on

__all__ = ["calibrate_on_training_data"]

logger = logging.getLogger("qat")


def calibrate_on_training_data(
    trainer: Trainer,
    pl_module: LightningModule,
    model: nn.Module,
    model_inputs: Callable[[Any], Any] | None,
    count: int,
    *,
    starts: bool = True,
    activations: bool = True,
) -> CalibrationReport:
    """Calibrate ``model`` with the first ``count`` batches of an epoch, as ``model_inputs`` makes them for the model.

    The last two arguments are those of `qat.calibration.calibrate_parts`.

    Raises:
        CalibrationError: the model cannot be called with them, or see `qat.calibrate`.
    """
    own: Callable[[Any], Any] = getattr(pl_module, "model_inputs", lambda b: b[0] if isinstance(b, tuple | list) else b)
    # Random numbers of its own: a run with and one without this calibration shuffle their data alike.
    with isolate_rng(), trainer.precision_plugin.forward_context():
        batches = _batches(trainer, pl_module, count)
        return calibrate_on(model, batches, model_inputs or own, starts=starts, activations=activations)


def _batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Any]:
    """Batches on the device. The iterators and generators of the training loaders stay where they are."""
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    loaders.flattened = [_apart(loader) for loader in loaders.flattened]
    names = ("sampler", "collate_fn")  # the second may draw noise
    sources = [s for one in loaders.flattened for s in (one, *(getattr(one, name, None) for name in names))]
    generators = [g for source in sources if (g := getattr(source, "generator", None)) is not None]
    states = [generator.get_state() for generator in generators]
    data = trainer.datamodule  # type: ignore[attr-defined]
    hooks = data if data is not None and is_overridden("on_before_batch_transfer", data) else pl_module
    for batch, _, _ in islice(iter(loaders), count):
        batch = hooks.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
        yield trainer.strategy.batch_to_device(batch, pl_module.device, 0)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _apart(loader: Any) -> Any:
    """A copy of ``loader`` with a position of its own; an iterator has but one."""
    if isinstance(loader, Iterator):
        logger.warning(
            "calibration takes its batches from the training loader, a %s: training goes on after them; pass an "
            "iterable that begins anew, such as a DataLoader, to train on them too",
            type(loader).__name__,
        )
        return loader
    own = copy.copy(loader)
    if getattr(own, "persistent_workers", False):  # which would hand out training's iterator
        own.num_workers, own.timeout = 0, 0
    return own
