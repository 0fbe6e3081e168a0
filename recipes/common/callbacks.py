"""What a recipe's fit shows and keeps: a progress bar, its newest checkpoints, and an average of its weights."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qat.files.whole import explained
from qat.training.callback import QuantizationAwareTraining
from recipes.common import checkpoints
from recipes.common.progress import progress_bar
from recipes.common.settings import OptimizationSettings

__all__ = ["LastCheckpoints", "StepProgress", "averages"]


class StepProgress(lightning.Callback):
    """A progress bar that counts optimizer steps, with the loss, the learning rate, the speed and the memory."""

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar = progress_bar()
        self.bar.disable = not trainer.is_global_zero
        self.bar.start()
        self.task = self.bar.add_task(self.description, total=trainer.max_steps, note="")
        self.done, self.begun = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        count, unit = _size(batch)
        self.done += count * trainer.world_size
        rate = max((group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups), default=0.0)
        notes = [f"loss {float(trainer.callback_metrics['train_loss']):.3f}", f"rate {rate:.2g}"]
        if count:
            notes.append(f"{self.done / max(time.monotonic() - self.begun, 1e-9):,.0f} {unit}/s")
        notes.append(f"{_peak(pl_module.device) / 2**30:.1f} GiB")
        self.bar.update(self.task, completed=trainer.global_step, note=", ".join(notes))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def _size(batch: Any) -> tuple[int, str]:
    """How much a batch holds: tokens of texts, images, or else examples."""
    tensors = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(ids := tensors.get("input_ids"), Tensor):
        return ids.numel(), "tokens"
    unit = "images" if "pixel_values" in tensors or "fraction" in tensors else "examples"
    return next((len(value) for value in tensors.values() if isinstance(value, Tensor) and value.ndim), 0), unit


def _peak(device: torch.device) -> int:
    """Bytes of the most memory that was taken so far: of a GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LastCheckpoints(Checkpoint):
    """Keeps the newest states of a fit as ``step-N.ckpt``: every so many optimizer steps, and at the end.

    A process that dies while it writes leaves those before. Of several processes, each takes part in the writing.

    Args:
        folder: where they are kept.
        every: steps between them.
        keep: how many are left; older ones are removed once a newer one is whole.
        settings: of the run, kept with each (`recipes.common.checkpoints.settings_of`).
    """

    def __init__(self, folder: Path, every: int, keep: int, settings: dict[str, Any]) -> None:
        self.folder, self.every, self.keep, self.settings = folder, every, keep, settings
        self._step = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        with suppress(NotImplementedError):  # strategies that shard write in ways of their own
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = _DirectFiles()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Under gradient accumulation several batches end at one step. The last step's comes when the scales are taken.
        if trainer.global_step % self.every == 0 and trainer.global_step not in (self._step, trainer.max_steps):
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        path = self.folder / f"step-{trainer.global_step}.ckpt"
        partial = path.with_suffix(".partial")
        try:
            with explained(path, parts=partial, wanted=_bytes(trainer)):
                trainer.save_checkpoint(partial)  # by every process: sharded strategies need them all
                if trainer.is_global_zero:
                    checkpoints.publish(partial, path, step=trainer.global_step, settings=self.settings)
                    self._forget()
        except Exception:  # such as a full disk, which the half of a file would fill
            checkpoints.remove(partial)
            raise
        trainer.strategy.barrier()
        self._step = trainer.global_step

    def _forget(self) -> None:
        """Remove all but the newest, and what a process left that was ended while it wrote."""
        for path in [*checkpoints.of(self.folder)[: -self.keep], *self.folder.glob("*.partial")]:
            checkpoints.remove(path)


class _DirectFiles(TorchCheckpointIO):
    """Writes a file where it belongs. Lightning's own copies it in memory, and in the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)


def _bytes(trainer: lightning.Trainer) -> int:
    """What a checkpoint takes at least: model and optimizers."""
    held = [list(trainer.lightning_module.parameters()), *(list(one.state.values()) for one in trainer.optimizers)]
    return sum(leaf.nbytes for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor))


def averages(settings: OptimizationSettings, callbacks: Iterable[lightning.Callback]) -> list[lightning.Callback]:
    """Make the callback that averages weights, from where quantization among ``callbacks`` leaves them of one kind."""
    if settings.average is None:
        return []
    schedules = [callback.schedule for callback in callbacks if isinstance(callback, QuantizationAwareTraining)]
    begin = max((schedule.settled_from for schedule in schedules), default=0)
    # Buffers are starts of ranges and statistics, which are copied instead.
    return [EMAWeightAveraging(decay=settings.average, use_buffers=False, update_starting_at_step=begin)]
