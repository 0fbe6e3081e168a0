"""What a recipe's fit shows and keeps: a progress bar, and checkpoints with the last weights among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from qat.config import TrainerSettings
from qat.report import progress_bar

__all__ = ["LastCheckpoint", "StepProgress", "checkpoints_in"]


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


class LastCheckpoint(lightning.Callback):
    """Saves the last weights, which an interval of steps need not meet, as ``last.ckpt``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")


def checkpoints_in(folder: Path, settings: TrainerSettings) -> list[lightning.Callback]:
    """Make the callbacks that keep the newest checkpoint of the configured interval, and the last of all."""
    return [ModelCheckpoint(folder, every_n_train_steps=settings.checkpoint_every), LastCheckpoint(folder)]
