"""Training with Lightning: the callback for a module that a user already has, and a generic module for the recipes.

Lightning trains, shards and resumes; this file only decides *when* quantization happens. Layers are prepared in the
callback's ``setup`` (for modules built in ``configure_model``, right after it): before weights are restored, and before
the optimizer and the strategy see the model; also for validate, test and predict. Checkpoints always hold float master
weights with the quantizers' state beside them; freezing, if asked for, comes after the last of them.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from qat.calibration import calibrate
from qat.errors import CalibrationError, StateError, TrainingError
from qat.evidence import frozen_record
from qat.freezing import freeze
from qat.layers import quantized_layers
from qat.observers import ObserverChoice
from qat.preparation import parameter_groups, prepare, prepared_as
from qat.quantizers import Algorithm, StraightThrough
from qat.spec import QuantSpec
from qat.tasks import Batch, Task

__all__ = ["QuantizationAwareTraining", "QuantizationSchedule", "QuantizedTask"]

logger = logging.getLogger("qat")


class QuantizationSchedule(BaseModel):
    """When quantization happens during a fit; steps are optimizer steps (``trainer.global_step``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_step: int = Field(default=0, ge=0)
    """Fake quantization begins at this step; before it the model trains in float."""
    observe_from: int | None = Field(default=None, ge=0)
    """Activation observers record from this step on; none: never during training."""
    observe_until: int | None = Field(default=None, ge=0)
    """Activation observers stop at this step; none: they go on to the end."""
    calibration_batches: int = Field(default=16, ge=0)
    """Training batches for the calibration before the first step and before freezing; only with activations."""
    finish: Literal["last", "best"] | None = None
    """After training: calibrate again and freeze, from the last weights or the best checkpoint; none: leave it to the user."""

    @model_validator(mode="after")
    def _window_is_ordered(self) -> Self:
        if self.observe_until is not None and (self.observe_from is None or self.observe_until <= self.observe_from):
            raise ValueError(
                f"observe_until ({self.observe_until}) must come after observe_from ({self.observe_from}): set both, in order"
            )
        return self

    def observes(self, step: int) -> bool:
        """Whether observers record at this step."""
        return self.observe_from is not None and self.observe_from <= step < (self.observe_until or step + 1)


def default_model_inputs(batch: Any) -> Any:
    """What of a dataloader's batch the model is called with: a mapping or tensor as it is, of a tuple the first element."""
    return batch[0] if isinstance(batch, tuple | list) else batch


class QuantizationAwareTraining(Callback):
    """Quantization-aware training of a `LightningModule` that need not know of it.

    Args:
        spec: what to quantize.
        algorithm: how scales are found; default `StraightThrough`.
        schedule: when; default: from the first step, without freezing at the end.
        target: who will load the export.
        attribute: the attribute of the LightningModule that holds the model to prepare (its metrics, a teacher and the
            like stay out of it); None: the LightningModule itself.
        observer: what activation scales are taken from.
        model_inputs: turns a dataloader's batch into what the model is called with, for calibration.

    Raises (during ``trainer.fit``, before the first step):
        SpecError, TargetError: the spec does not fit the model or the target.
        CalibrationError: activations are quantized and nothing will set their scales.
        TrainingError: learned scales sit in an optimizer group with weight decay; later: the loss is not finite.

    Example::

        spec = qat.QuantSpec(weights="int4")
        trainer = lightning.Trainer(callbacks=[qat.QuantizationAwareTraining(spec)])
        trainer.fit(module, data)
        qat.freeze(module.model)
    """

    def __init__(
        self,
        spec: QuantSpec,
        algorithm: Algorithm | None = None,
        schedule: QuantizationSchedule | None = None,
        *,
        target: str = "quanto",
        attribute: str | None = "model",
        observer: ObserverChoice | None = None,
        model_inputs: Callable[[Any], Any] = default_model_inputs,
    ) -> None:
        self.spec = spec
        self.algorithm = algorithm or StraightThrough()
        self.schedule = schedule or QuantizationSchedule()
        self.target = target
        self.attribute = attribute
        self.observer = observer
        self.model_inputs = model_inputs

    def model_of(self, module: LightningModule) -> nn.Module:
        """The model that is prepared, without a ``torch.compile`` wrapper."""
        model: Any = module
        if self.attribute is not None:
            model = getattr(module, self.attribute, None)
        if not isinstance(model, nn.Module):
            raise StateError(
                f"attribute: {type(module).__name__}.{self.attribute} must be the module to prepare, got {type(model).__name__}: "
                "name the attribute that holds it, or None for the LightningModule itself"
            )
        return getattr(model, "_orig_mod", model)

    # -- preparing ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the model, or arrange for it right after ``configure_model``."""
        if not is_overridden("configure_model", pl_module):
            self._prepare(pl_module)
            return
        original = pl_module.configure_model
        if hasattr(original, "_qat_prepares"):
            return

        @functools.wraps(original)
        def configure_and_prepare() -> None:
            original()
            self._prepare(pl_module)

        configure_and_prepare._qat_prepares = True  # type: ignore[attr-defined]
        pl_module.configure_model = configure_and_prepare  # type: ignore[method-assign]

    def _prepare(self, pl_module: LightningModule) -> None:
        model = self.model_of(pl_module)
        try:
            frozen_record(model)
        except StateError:
            pass
        else:
            return  # a frozen model can still be validated, tested and predicted with
        if not any(quantized_layers(model)):
            report = prepare(model, self.spec, self.algorithm, self.target, observer=self.observer)
            logger.info("prepared %d layers", len(report.layers))
            return
        prepared = prepared_as(model)
        if (prepared.spec, prepared.algorithm) != (self.spec, self.algorithm):
            raise StateError(
                f"spec: the model is already prepared with {prepared.spec!r} and {prepared.algorithm!r}, which differs from the "
                "callback's: use the same, or a fresh float model"
            )

    # -- the schedule ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before any work is lost."""
        model = self.model_of(pl_module)
        prepared_as(model)  # a frozen model cannot be trained
        scales = {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group.get("weight_decay") and any(id(p) in scales for p in group["params"]):
                    raise TrainingError(
                        f"optimizer: learned scales sit in a group with weight_decay={group['weight_decay']}, which would shrink "
                        "every range: build the optimizer from qat.parameter_groups(module, lr, scale_lr, weight_decay)"
                    )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give uncalibrated activations their first scales; a resumed run already has them."""
        model = self.model_of(pl_module)
        self._apply_schedule(model, trainer.global_step)
        if not self._uncalibrated(model):
            return
        if self.schedule.calibration_batches > 0:
            self._calibrate(trainer, pl_module)
        elif not self.schedule.observes(trainer.global_step):
            raise CalibrationError(
                "schedule: activations are quantized but nothing sets their scales: set calibration_batches above 0, or let "
                "observers record from step 0 (observe_from=0), or call qat.calibrate before the fit"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch fake quantization and observers by step."""
        self._apply_schedule(self.model_of(pl_module), trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop before a non-finite loss can reach the weights or a checkpoint."""
        if not bool(torch.isfinite(loss.detach()).all()):
            raise TrainingError(
                f"loss: became {float(loss.detach().float().mean())} at step {trainer.global_step}; the weights and the last "
                "checkpoint are untouched: lower the learning rate, or clip gradients"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it will be used: fake quantization on, observers off."""
        for _, layer in quantized_layers(self.model_of(pl_module)):
            layer.fake_quantizing, layer.observing = True, False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate and freeze, if the schedule says so; after the last checkpoint was written."""
        if self.schedule.finish is None:
            return
        if self.schedule.finish == "best":
            self._load_best(trainer, pl_module)
        model = self.model_of(pl_module)
        if self.spec.activation_type is not None and self.schedule.calibration_batches > 0:
            self._calibrate(trainer, pl_module)
        logger.info("%s", freeze(model, self.target))

    def _apply_schedule(self, model: nn.Module, step: int) -> None:
        quantizing, observing = step >= self.schedule.start_step, self.schedule.observes(step)
        for _, layer in quantized_layers(model):
            layer.fake_quantizing, layer.observing = quantizing, observing

    @staticmethod
    def _uncalibrated(model: nn.Module) -> bool:
        quantizers = (q for _, layer in quantized_layers(model) for q in (layer.input_quantizer, layer.output_quantizer))
        return any(q is not None and not bool(q.initialized) for q in quantizers)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Its own stream of random numbers: a run with and one without this calibration shuffle their data alike.
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            logger.info("%s", calibrate(self.model_of(pl_module), self._batches(trainer, pl_module)))

    def _batches(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
        loader = trainer.train_dataloader
        if loader is None:
            raise CalibrationError("trainer: calibration needs the training dataloader, but this trainer has none")
        for batch in itertools.islice(iter(loader), self.schedule.calibration_batches):
            yield self.model_inputs(trainer.strategy.batch_to_device(batch, pl_module.device))

    @staticmethod
    def _load_best(trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
        best = next((c.best_model_path for c in checkpoints if c.monitor and c.best_model_path), "")
        if not best:
            raise StateError(
                "schedule: finish='best' needs a ModelCheckpoint that monitors a metric and has saved something: add one to "
                "the trainer, or use finish='last'"
            )
        checkpoint = torch.load(best, map_location=pl_module.device, weights_only=True)
        pl_module.load_state_dict(checkpoint["state_dict"])


class QuantizedTask(LightningModule):
    """A model and a task as a LightningModule: AdamW, linear warm-up, then constant; distillation if there is a teacher.

    Args:
        model: float or prepared; `QuantizationAwareTraining` prepares it.
        task: loss and metrics.
        learning_rate: of the weights.
        scale_learning_rate: of learned scales; default a tenth of it.
        weight_decay: of weights with two and more dimensions.
        warmup_steps: optimizer steps from 0 to the full rate.
        teacher: a float model, kept out of checkpoints and training.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        learning_rate: float,
        scale_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.learning_rate = learning_rate
        self.scale_learning_rate = scale_learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        # In a list, so that it is no submodule: neither trained nor saved nor wrapped by a strategy.
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self.evaluation_metrics = task.metrics()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The task's loss."""
        inputs = self.task.inputs(batch)
        guidance = None
        if self._teacher:
            teacher = self._teacher[0].to(self.device)
            with torch.no_grad():
                guidance = teacher(**inputs)
        loss = self.task.loss(self.model(**inputs), batch, guidance)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the task's metrics."""
        self.task.update(self.evaluation_metrics, self.model(**self.task.inputs(batch)), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics."""
        metrics: Mapping[str, Tensor] = self.evaluation_metrics.compute()
        self.log_dict({f"val_{name}": value for name, value in metrics.items()}, prog_bar=True)
        self.evaluation_metrics.reset()

    def configure_optimizers(self) -> Any:
        """AdamW over `qat.parameter_groups`, with linear warm-up."""
        groups = parameter_groups(self.model, self.learning_rate, self.scale_learning_rate, self.weight_decay)
        optimizer = torch.optim.AdamW(groups)
        if self.warmup_steps == 0:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps)
