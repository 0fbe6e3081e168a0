"""A fit with the configured trainer, and what it needs before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

import qat
from qat.config import ConfigError, OptimizationSettings, TrainerSettings
from qat.tasks import Task
from recipes.common.callbacks import StepProgress

__all__ = ["device_of", "fit", "training_batches"]


def training_batches(
    examples: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    """Shuffle examples into whole batches, by torch's global random numbers.

    Args:
        examples: what to train on.
        batch_size: examples a batch.
        collate: puts a batch together; none: torch's own way.

    Raises:
        DataError: there are fewer examples than one batch holds, so there would be no step at all.
    """
    batches = DataLoader(examples, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    if len(batches) == 0:
        raise qat.DataError(
            f"optimization.batch_size: {batch_size} is more than the {len(examples)} examples to train on, so "  # type: ignore[arg-type]
            "there is no whole batch: give more data, or a smaller batch_size (or data.block_size)"
        )
    return batches


def fit(
    name: str,
    model: nn.Module,
    task: Task,
    batches: Iterable[Any],
    learning_rate: float,
    settings: OptimizationSettings,
    trainer_settings: TrainerSettings,
    seed: int,
    callbacks: Sequence[lightning.Callback] = (),
    teacher: nn.Module | None = None,
    resume: Path | None = None,
) -> lightning.Trainer:
    """Train a model in place.

    Args:
        name: what the progress bar says.
        model: float; a `qat.QuantizationAwareTraining` among the callbacks prepares it.
        task: loss and metrics.
        batches: what `training_batches` made.
        learning_rate: the peak rate of the weights.
        settings: steps, scales, decay, warm-up, clipping.
        trainer_settings: what Lightning is told.
        seed: two calls with the same seed see the same batches in the same order.
        callbacks: Lightning's; checkpoints are written only when one of them does.
        teacher: a float model to distil from, used where the task has a distillation term.
        resume: a checkpoint to go on from; only tensors and plain data are read from it.

    Returns:
        The trainer, which knows whether this process is the one that goes on alone.

    Raises:
        TrainingError: the loss became non-finite, or the data ended before all steps were done.
    """
    lightning.seed_everything(seed, verbose=False)
    model.train()
    if trainer_settings.gradient_checkpointing:
        _checkpoint_activations(model)
    trained: Any = torch.compile(model) if trainer_settings.compile else model
    module = qat.QuantizedTask(
        trained,
        task,
        learning_rate=learning_rate,
        scale_learning_rate=settings.scale_learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        teacher=teacher if settings.distillation_weight > 0 else None,
    )
    trainer = _trainer(
        trainer_settings,
        max_steps=settings.steps,
        max_epochs=-1,
        limit_train_batches=settings.steps
        * trainer_settings.accumulate_grad_batches,  # what the progress bar counts to
        gradient_clip_val=settings.gradient_clip,
        callbacks=[StepProgress(name), *callbacks],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    trainer.fit(module, batches, ckpt_path=None if resume is None else str(resume), weights_only=True)
    if trainer.global_step < settings.steps:
        raise qat.TrainingError(
            f"optimization.steps: {name} ended after {trainer.global_step} of {settings.steps} steps: give every "
            "process at least one whole batch (more data, or a smaller batch_size)"
        )
    return trainer


def _checkpoint_activations(model: nn.Module) -> None:
    enable: Any = getattr(model, "enable_gradient_checkpointing", None)
    if enable is not None:  # of diffusers; never reentrant
        enable()
        return
    # Renamed within transformers 5; the old name warns in the releases that have the new one.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def _trainer(settings: TrainerSettings, **options: Any) -> lightning.Trainer:
    """Make a trainer that says nothing, or say in one line why the settings do not allow one."""
    lightnings = settings.model_dump(exclude={"gradient_checkpointing", "compile", "checkpoint_every"})
    try:
        return lightning.Trainer(
            logger=False, enable_progress_bar=False, enable_model_summary=False, **options, **lightnings
        )
    except Exception as error:  # what Lightning, its plug-ins and absent packages raise has no common base
        given = ", ".join(f"{name}={value!r}" for name, value in lightnings.items())
        raise ConfigError(
            f"trainer: Lightning cannot train with {given}: {' '.join(str(error).split())}; change these settings"
        ) from error


def device_of(settings: TrainerSettings) -> torch.device:
    """Where this process trains, and therefore calibrates and judges (Lightning hands models back on the CPU).

    Raises:
        ConfigError: nothing here can train with these settings; called first, this comes before any work.
    """
    device: torch.device = _trainer(settings, enable_checkpointing=False).strategy.root_device
    return device if device.type == "cuda" else torch.device("cpu")
