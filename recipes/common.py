"""What recipes share: a fit with the configured trainer, and loading a float model with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import lightning
import torch
from torch import nn

import qat
from qat.config import OptimizationSettings, TrainerSettings
from qat.report import progress_bar
from qat.tasks import Task

__all__ = ["StepProgress", "device_of", "fit", "load_language_model"]


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
) -> lightning.Trainer:
    """Train a model in place.

    Args:
        name: what the progress bar says.
        model: float; a `qat.QuantizationAwareTraining` among the callbacks prepares it.
        task: loss and metrics.
        batches: a data loader that shuffles by torch's global random numbers.
        learning_rate: the peak rate of the weights.
        settings: steps, scales, decay, warm-up, clipping.
        trainer_settings: what Lightning is told.
        seed: two calls with the same seed see the same batches in the same order.
        callbacks: Lightning's; checkpoints are written only when one of them does.
        teacher: a float model to distil from, used where the task has a distillation term.

    Returns:
        The trainer, which knows whether this process is the one that goes on alone.

    Raises:
        TrainingError: the loss became non-finite (by the callback).
    """
    lightning.seed_everything(seed, verbose=False)
    model.train()
    if trainer_settings.gradient_checkpointing:
        # Renamed within transformers 5; the old name warns in the releases that have the new one.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable: Any = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
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
    own = {"gradient_checkpointing", "compile", "checkpoint_every"}
    trainer = lightning.Trainer(
        max_steps=settings.steps,
        max_epochs=-1,
        limit_train_batches=settings.steps
        * trainer_settings.accumulate_grad_batches,  # what the progress bar counts to
        gradient_clip_val=settings.gradient_clip,
        callbacks=[StepProgress(name), *callbacks],
        enable_progress_bar=False,
        enable_checkpointing=any(
            isinstance(callback, lightning.pytorch.callbacks.Checkpoint) for callback in callbacks
        ),
        enable_model_summary=False,
        logger=False,
        **trainer_settings.model_dump(exclude=own),
    )
    trainer.fit(module, batches)
    return trainer


def device_of(settings: TrainerSettings) -> torch.device:
    """The device on which to judge a model that this trainer trains (Lightning hands models back on the CPU)."""
    wanted = settings.accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")


def load_language_model(source: str) -> tuple[Any, Any]:
    """Load a causal language model with float32 master weights, and its tokenizer.

    Args:
        source: a local directory or a hub name.

    Raises:
        LoadError: either cannot be loaded, or weights are missing or have other shapes than the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = load(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        raise qat.LoadError(f"model: {source!r} cannot be loaded: {' '.join(str(error).split())}") from error
    unfilled = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if unfilled:
        raise qat.LoadError(f"model: the weights in {source!r} do not fill {unfilled[:5]}: give a complete checkpoint")
    return model, tokenizer
