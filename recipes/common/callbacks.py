"""What a recipe's fit shows, draws and keeps: a progress bar, noise, and a checkpoint of the last weights."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging

from qat.training.callback import QuantizationAwareTraining
from recipes.common.config import ConfigError
from recipes.common.progress import progress_bar
from recipes.common.settings import OptimizationSettings, TrainerSettings

__all__ = ["LastCheckpoint", "SeedNoise", "StepProgress", "averages", "checkpoints_in", "mixed_seed", "step_of"]


class StepProgress(lightning.Callback):
    """A progress bar that counts optimizer steps and shows the loss."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar = progress_bar()
        self.bar.disable = not trainer.is_global_zero
        self.bar.start()
        self.task = self.bar.add_task(self.description, total=trainer.max_steps, note="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        note = f"loss {float(trainer.callback_metrics['train_loss']):.3f}"
        self.bar.update(self.task, completed=trainer.global_step, note=note)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def mixed_seed(*numbers: int) -> int:
    """Return a seed of 32 bits, another one for each combination of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


class SeedNoise(lightning.Callback):
    """Seeds what batches draw noise from by a seed, by the process and by the step that the fit begins at.

    So fits with the same seed draw the same noise, several processes do not, and a resumed run draws fresh noise.
    """

    def __init__(self, generator: torch.Generator, seed: int) -> None:
        self.generator, self.seed = generator, seed

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.generator.manual_seed(mixed_seed(self.seed, trainer.global_rank, trainer.global_step))


class LastCheckpoint(Checkpoint):
    """Keeps the newest weights as ``last.ckpt``: every so many optimizer steps and at the end, one file in all.

    It is written beside the one before and then renamed, so a process that dies while it writes leaves that one.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path = folder / "last.ckpt"
        self.every = every
        self._step = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Under gradient accumulation several batches end at one step.
        if trainer.global_step % self.every == 0 and trainer.global_step != self._step:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)  # by every process: sharded strategies need them all
        if trainer.is_global_zero:
            if self.path.is_dir():  # as strategies write it that shard the model; no rename replaces a directory
                shutil.rmtree(self.path)
            partial.replace(self.path)
        trainer.strategy.barrier()
        self._step = trainer.global_step


def checkpoints_in(folder: Path, settings: TrainerSettings) -> list[lightning.Callback]:
    """Make the callback that keeps the newest checkpoint of the configured interval, and the last of all."""
    return [LastCheckpoint(folder, settings.checkpoint_every)]


def averages(settings: OptimizationSettings, callbacks: Iterable[lightning.Callback]) -> list[lightning.Callback]:
    """Make the callback that averages weights, from where quantization among ``callbacks`` leaves them of one kind."""
    if settings.average is None:
        return []
    schedules = [callback.schedule for callback in callbacks if isinstance(callback, QuantizationAwareTraining)]
    begin = max((schedule.settled_from for schedule in schedules), default=0)
    # Buffers are starts of ranges and statistics, which are copied instead.
    return [EMAWeightAveraging(decay=settings.average, use_buffers=False, update_starting_at_step=begin)]


def step_of(checkpoint: Path | None) -> int:
    """Return the step that a run goes on from, 0 without a checkpoint.

    Raises:
        ConfigError: the file is no checkpoint; called first, this comes before any work.
    """
    if checkpoint is None:
        return 0
    try:
        return int(torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")["global_step"])
    except Exception as error:  # what can be wrong with a file has no common base
        raise ConfigError(
            f"resume: {str(checkpoint)!r} is no checkpoint of a recipe ({type(error).__name__}): give the last.ckpt "
            "that one wrote"
        ) from error
