"""`QuantizedTask`: a generic LightningModule, and `Task`: what it asks of the task that it trains for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qat.errors import TrainingError
from qat.preparation import parameter_groups
from qat.training.callback import QuantizationAwareTraining
from qat.training.distillation import Distillation, Distiller, Predictions
from qat.training.schedule import Decay, planned_steps, rate_factor
from qat.training.teacher import CachedLogits
from qat.training.trainers import require_finite

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

__all__ = ["QuantizedTask", "Task"]


class Task(Protocol):
    """What `QuantizedTask` needs of a task: any class with these four methods will do.

    It may have a fifth, ``predictions(outputs, batch)``, which a distillation asks for: what of a model's outputs is
    compared with the teacher's, ``(..., classes)``, and which rows count, ``(...)`` bool, or None for all. Without it
    the logits are compared, in all rows that are no padding.

    A task never calls the model. A batch is what the data loader gives; its tensors lie on the model's device.

    >>> from torchmetrics import MeanMetric, MetricCollection
    >>> class Regression:
    ...     def inputs(self, batch):
    ...         return {"input": batch["x"]}
    ...     def loss(self, outputs, batch):
    ...         return (outputs - batch["y"]).square().mean()
    ...     def metrics(self):
    ...         return MetricCollection({"loss": MeanMetric()})
    ...     def update(self, metrics, outputs, batch):
    ...         metrics["loss"].update(self.loss(outputs, batch), weight=len(batch["y"]))
    >>> module = QuantizedTask(nn.Linear(3, 1), Regression(), learning_rate=1e-3)
    """

    def inputs(self, batch: Any) -> dict[str, Any]:
        """Return the keyword arguments that the model's forward takes for this batch."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the training loss: a scalar tensor, float32, with a gradient.

        Args:
            outputs: what the model returned for `inputs`.
            batch: the batch that they were made from.
        """

    def metrics(self) -> MetricCollection:
        """Return fresh metrics; each is logged as ``val_`` and its name."""

    def update(self, metrics: MetricCollection, outputs: Any, batch: Any) -> None:
        """Add one batch to ``metrics``; arguments as for `loss`."""


class QuantizedTask(LightningModule):
    """A model and a task as a LightningModule: AdamW, warm-up, decay to zero; distilled if there is a teacher.

    Args:
        model: float or prepared; `QuantizationAwareTraining` prepares it.
        task: inputs, loss and metrics: a `Task`.
        learning_rate: of the weights.
        scale_learning_rate: of learned scales; default a tenth of it.
        weight_decay: of weights with two and more dimensions.
        warmup_steps: optimizer steps from 0 to the full rate; default a twentieth of all.
        decay: how the rate goes after them: see `rate_factor`.
        teacher: a float model, kept out of checkpoints and training; a fit leaves it on the CPU, as it does the model.
            Or `CachedLogits`.
        distillation: what is compared with the teacher; default: KL alone, without the task's own loss.

    Raises:
        TrainingError: there is a distillation and no teacher, or see `Distiller`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        learning_rate: float,
        scale_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int | None = None,
        decay: Decay = "cosine",
        teacher: nn.Module | CachedLogits | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.learning_rate = learning_rate
        self.scale_learning_rate = scale_learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self._steps: float | None = None  # of the whole fit, once it is known
        if teacher is None and distillation is not None:
            raise TrainingError(f"distillation: needs a teacher, got none for {distillation!r}: give teacher=")
        # No module, so that the teacher is no submodule: neither trained nor saved nor wrapped by a strategy.
        self._distiller = None if teacher is None else Distiller(model, teacher, distillation)
        self.evaluation_metrics = task.metrics()

    def model_inputs(self, batch: Any) -> dict[str, Any]:
        """What of a batch the model is called with; the callback calibrates with it too."""
        return self.task.inputs(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The task's loss, the distance from the teacher, or both."""
        inputs, distiller = self.model_inputs(batch), self._distiller
        if distiller is not None:
            distiller.student = self.model  # which may have been wrapped since
        if distiller is None or (weight := distiller.distillation.weight) == 0.0:
            loss = self.task.loss(self.model(**inputs), batch)
        else:
            own: Callable[[Any, Any], Any] | None = getattr(self.task, "predictions", None)
            compared: Predictions | None = None if own is None else lambda outputs: own(outputs, batch)
            outputs, loss = distiller(inputs, compared)
            if weight < 1.0:
                loss = (1.0 - weight) * self.task.loss(outputs, batch) + weight * loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop before a non-finite loss can reach the weights; of a quantized run the callback's guards decide."""
        if not any(isinstance(callback, QuantizationAwareTraining) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            require_finite(loss, self.global_step)

    def on_fit_end(self) -> None:
        """Move the teacher back to the CPU, where Lightning hands the model back too."""
        if self._distiller is not None and isinstance(self._distiller.teacher, nn.Module):
            self._distiller.teacher.cpu()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the batch to the task's metrics."""
        self.task.update(self.evaluation_metrics, self.model(**self.model_inputs(batch)), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics."""
        metrics = {f"val_{name}": value for name, value in self.evaluation_metrics.compute().items()}
        # Already reduced over ranks, which sync_dist=True repeats without effect; without it Lightning warns.
        self.log_dict(metrics, prog_bar=True, sync_dist=True)
        self.evaluation_metrics.reset()

    def configure_optimizers(self) -> Any:
        """AdamW over `qat.parameter_groups`; each group's rate follows `rate_factor` by optimizer steps."""
        groups = parameter_groups(self.model, self.learning_rate, self.scale_learning_rate, self.weight_decay)
        optimizer = torch.optim.AdamW(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate_factor(self, step: int) -> float:
        return 1.0 if self._steps is None else rate_factor(step, self._steps, self.warmup_steps, self.decay)

    def on_train_start(self) -> None:
        """Count the steps and set the rates of this one; `TrainingError` where the decay needs a number of steps.

        To ask Lightning earlier would set up the data before a checkpoint's place in it is restored.
        """
        counted = self.decay != "constant" or self.warmup_steps is None
        self._steps = (planned_steps(self.trainer) if counted else None) or math.inf
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):  # and not that of a tuner
                for group, peak in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                    group["lr"] = peak * self._rate_factor(scheduler.last_epoch)
