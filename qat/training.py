"""Training with Lightning: the callback for a module that a user already has, and a generic module for the recipes.

Lightning trains, shards and resumes; this file only decides *when* quantization happens. Layers are prepared in the
callback's ``setup`` (for modules built in ``configure_model``, right after it): before weights are restored, and before
the optimizer and the strategy see the model; also for validate, test and predict. Checkpoints always hold float master
weights with the quantizers' state beside them; freezing, if asked for, comes after the last of them. Whatever cannot
work is refused before the first step.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from qat.calibration import calibrate
from qat.errors import CalibrationError, StateError, TrainingError
from qat.evidence import frozen_record
from qat.freezing import freeze
from qat.layers import quantized_layers
from qat.observers import ObserverChoice
from qat.preparation import parameter_groups, prepare, prepared_as
from qat.quantizers import Algorithm, StraightThrough
from qat.quantizers.activation import ActivationQuantizer
from qat.spec import QuantSpec
from qat.tasks import Batch, Task

__all__ = ["QuantizationAwareTraining", "QuantizationSchedule", "QuantizedTask"]

logger = logging.getLogger("qat")


class QuantizationSchedule(BaseModel):
    """When quantization happens during a fit; steps are optimizer steps (``trainer.global_step``).

    Validation is never observed and always fake-quantized: it judges what would be served, also during a float start.
    """

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

    def sets_scales(self, step: int) -> bool:
        """Whether a run that begins at this step without activation scales will have them once it quantizes."""
        if self.calibration_batches > 0 or self.observe_from is None:
            return self.calibration_batches > 0
        return self.observe_from <= max(step, self.start_step) and (self.observe_until is None or step < self.observe_until)


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
        model_inputs: turns a dataloader's batch into what the model is called with, for calibration; default the
            LightningModule's own ``model_inputs`` if it has one, else `default_model_inputs`.

    Raises (during ``trainer.fit``, before the first step):
        SpecError, TargetError: the spec does not fit the model or the target.
        StateError: the model is frozen, or prepared in another way.
        CalibrationError: activations are quantized and nothing will set their scales.
        TrainingError: no optimizer holds the learned scales, or one would decay them; the trainer cannot do what the
            schedule asks for at the end; later: the loss is not finite.

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
        model_inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        self.spec = spec
        self.algorithm = algorithm or StraightThrough()
        self.schedule = schedule or QuantizationSchedule()
        self.target = target
        self.attribute = attribute
        self.observer = observer
        self.model_inputs = model_inputs
        self._phase: tuple[bool, bool] | None = None  # what the layers were last switched to

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
        while hasattr(model, "_orig_mod"):
            model = model._orig_mod
        return model

    # -- preparing ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the model, or what ``configure_model`` builds right after it is built."""
        self._phase = None
        if not is_overridden("configure_model", pl_module):
            self._prepare(trainer, pl_module)
            return
        if self._is_built(pl_module):  # configure_model only wraps it: in float it would wrap the wrong layers
            self._prepare(trainer, pl_module)
        original = pl_module.configure_model

        @functools.wraps(original)
        def configure_and_prepare() -> None:
            # Gone before its first call ends, so that copies and pickles of the module never hold it.
            vars(pl_module).pop("configure_model", None)
            original()
            self._prepare(trainer, pl_module)

        pl_module.configure_model = configure_and_prepare  # type: ignore[method-assign]

    def _is_built(self, pl_module: LightningModule) -> bool:
        model = None if self.attribute is None else getattr(pl_module, self.attribute, None)
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)] if isinstance(model, nn.Module) else []
        return bool(linears) and not any(linear.weight.is_meta for linear in linears)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self.model_of(pl_module)
        if _is_frozen(model):  # it can still be validated, tested and predicted with
            if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is not None:
                raise StateError(
                    "model: is frozen, so it can neither be trained further nor take the master weights of a checkpoint: "
                    "build the float model again and pass ckpt_path"
                )
            return
        if not any(quantized_layers(model)):
            report = prepare(model, self.spec, self.algorithm, self.target, observer=self.observer)
            logger.info("prepared %d layers", len(report.layers))
            self._refuse_worker_processes(trainer, model)
        prepared = prepared_as(model)
        if (prepared.spec, prepared.algorithm, prepared.target) != (self.spec, self.algorithm, self.target):
            raise StateError(
                f"spec: the model is already prepared with {prepared}, but the callback has {self.spec!r}, {self.algorithm!r} "
                f"and target {self.target!r}: use the same, or a fresh float model"
            )
        # DistributedDataParallel would overwrite every rank's statistics with rank 0's before each forward.
        own = {id(b) for q in _activations(model) for b in q.buffers()}
        ignored = {*getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())}
        ignored |= {name for name, buffer in pl_module.named_buffers() if id(buffer) in own}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, sorted(ignored))

    @staticmethod
    def _refuse_worker_processes(trainer: Trainer, model: nn.Module) -> None:
        stateful = any(layer.has_quantizer_state for _, layer in quantized_layers(model))
        if stateful and trainer.state.fn == TrainerFn.FITTING and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise TrainingError(
                "strategy: the quantizers would be lost in the worker processes that this strategy starts: call "
                "qat.prepare(module.model, spec, ...) before the fit, or use strategy='ddp'"
            )

    # -- the schedule ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before any work is lost."""
        self._check_optimizers(trainer, self.model_of(pl_module))
        if self.schedule.finish is None:
            return
        if trainer.strategy.restore_checkpoint_after_setup or isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise TrainingError(
                f"schedule: finish={self.schedule.finish!r} needs the whole model in the process that called fit, which "
                f"{type(trainer.strategy).__name__} does not leave there: use finish=None, then load the checkpoint and freeze"
            )
        if self.schedule.finish == "best" and not any(c.monitor for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)):
            raise TrainingError(
                "schedule: finish='best' needs a ModelCheckpoint that monitors a metric: add one to the trainer, or use "
                "finish='last'"
            )

    @staticmethod
    def _check_optimizers(trainer: Trainer, model: nn.Module) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        scales = {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters() if p.requires_grad}
        remedy = "build the optimizer in configure_optimizers, from qat.parameter_groups(module, lr, scale_lr, weight_decay)"
        for group in groups:
            if group.get("weight_decay") and any(id(p) in scales for p in group["params"]):
                raise TrainingError(
                    f"optimizer: learned scales sit in a group with weight_decay={group['weight_decay']}, which would shrink "
                    f"every range: {remedy}"
                )
        missing = scales - {id(p) for group in groups for p in group["params"]}
        if groups and missing and not trainer.strategy.restore_checkpoint_after_setup:  # which shard parameters
            raise TrainingError(f"optimizer: {len(missing)} of {len(scales)} learned scales are in no optimizer: {remedy}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give uncalibrated activations their first scales; a resumed run already has them."""
        if not _uncalibrated(self.model_of(pl_module)):
            return
        if not self.schedule.sets_scales(trainer.global_step):
            raise CalibrationError(
                "schedule: activations are quantized but nothing sets their scales: set calibration_batches above 0, or let "
                "observers record before fake quantization begins (observe_from=0), or call qat.calibrate before the fit"
            )
        if self.schedule.calibration_batches > 0:
            self._calibrate(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch fake quantization and observers by step."""
        step = trainer.global_step
        self._switch(pl_module, step >= self.schedule.start_step, self.schedule.observes(step))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Let all ranks have the largest scale that any of them observed."""
        if self._phase is None or not self._phase[1] or trainer.world_size == 1:
            return
        scales = [q.scale for q in _activations(self.model_of(pl_module))]
        largest = torch.stack(scales)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        for scale, value in zip(scales, largest, strict=True):
            scale.copy_(value)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fake-quantize, whatever the step, and observe nothing."""
        if trainer.state.fn != TrainerFn.FITTING and _uncalibrated(self.model_of(pl_module)):
            raise CalibrationError(
                "activations: no scales were ever set, so there is nothing to judge: pass the ckpt_path of a training run, or "
                "call qat.calibrate(model, batches) first"
            )
        self._switch(pl_module, True, False)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop before a non-finite loss can reach the weights or a checkpoint."""
        if not bool(torch.isfinite(loss.detach()).all()):
            raise TrainingError(
                f"loss: became {float(loss.detach().float().mean())} at step {trainer.global_step}; the weights and the last "
                "checkpoint are untouched: lower the learning rate, or clip gradients"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never let weights that a non-finite gradient has spoilt replace a good checkpoint."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
                raise TrainingError(
                    f"gradient: made {name} non-finite by step {trainer.global_step}; the last checkpoint is untouched: lower "
                    "the learning rate, or clip gradients"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it will be used: fake quantization on, observers off."""
        self._switch(pl_module, True, False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate and freeze, if the schedule says so; after the last checkpoint was written."""
        if self.schedule.finish is None:
            return
        if self.schedule.finish == "best" and not trainer.fast_dev_run:  # which writes no checkpoints
            self._load_best(trainer, pl_module)
        if self.spec.activation_type is not None and self.schedule.calibration_batches > 0:
            pl_module.to(trainer.strategy.root_device)  # the strategy has already moved it to the CPU
            self._calibrate(trainer, pl_module)
            pl_module.cpu()
        logger.info("%s", freeze(self.model_of(pl_module), self.target))

    def _switch(self, pl_module: LightningModule, quantizing: bool, observing: bool) -> None:
        if self._phase == (quantizing, observing):
            return
        for _, layer in quantized_layers(self.model_of(pl_module)):
            layer.fake_quantizing, layer.observing = quantizing, observing
            # An observer that records gives its scale in that same forward; before that there is none to quantize with.
            layer.quantizing_activations = observing or not _uncalibrated(layer)
        self._phase = (quantizing, observing)

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Random numbers of its own: a run with and one without this calibration shuffle their data alike.
        with isolate_rng(), trainer.precision_plugin.forward_context():
            logger.info("%s", calibrate(self.model_of(pl_module), self._batches(trainer, pl_module)))
        self._phase = None

    def _batches(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
        """Training batches; the iterators and generators of the training loaders stay where they are."""
        loaders = CombinedLoader(apply_to_collection(trainer.train_dataloader, DataLoader, _apart), "max_size_cycle")
        sources = [source for loader in loaders.flattened for source in (loader, getattr(loader, "sampler", None))]
        generators = [g for source in sources if (g := getattr(source, "generator", None)) is not None]
        states = [generator.get_state() for generator in generators]
        convert = self.model_inputs or getattr(pl_module, "model_inputs", default_model_inputs)
        for batch, _, _ in itertools.islice(iter(loaders), self.schedule.calibration_batches):
            batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            yield convert(trainer.strategy.batch_to_device(batch, pl_module.device, 0))
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    @staticmethod
    def _load_best(trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        best = next((c.best_model_path for c in checkpoints if c.best_model_path), "")
        if not best:
            raise TrainingError("schedule: finish='best', but no checkpoint was saved: let ModelCheckpoint save (save_top_k)")
        checkpoint = torch.load(best, map_location=pl_module.device, weights_only=True)
        pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)


def _activations(module: nn.Module) -> Iterator[ActivationQuantizer]:
    return (m for m in module.modules() if isinstance(m, ActivationQuantizer))


def _uncalibrated(module: nn.Module) -> bool:
    return any(not bool(quantizer.initialized) for quantizer in _activations(module))


def _is_frozen(model: nn.Module) -> bool:
    try:
        frozen_record(model)
    except StateError:
        return False
    return True


def _apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of ``loader`` with an iterator of its own: persistent workers would hand out training's."""
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


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

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the model is called with; the callback calibrates with it too."""
        return self.task.inputs(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The task's loss."""
        inputs = self.model_inputs(batch)
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
        self.task.update(self.evaluation_metrics, self.model(**self.model_inputs(batch)), batch)

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
