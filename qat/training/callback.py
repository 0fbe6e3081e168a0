"""The Lightning callback: a float LightningModule trains quantization-aware without knowing of it.

Layers are prepared in ``setup`` (for modules built in ``configure_model``, right after it): before weights are
restored, and before the optimizer and the strategy see the model; also for validate, test and predict. Checkpoints
always hold float master weights with the quantizers' state beside them; freezing comes after the fit, by `qat.freeze`.
Whatever cannot work is refused before the first step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from qat.distributed import prepared_first
from qat.errors import CalibrationError, StateError, TrainingError
from qat.files.evidence import is_frozen
from qat.layers import layer_class
from qat.observers import Best, ObserverChoice
from qat.probing import compiled_parts
from qat.quantizers import Algorithm, Automatic
from qat.runs import read_without_call
from qat.spec import QuantSpec
from qat.training.averaging import come_first, part_scales, require_same_kind
from qat.training.batches import calibrate_on_training_data
from qat.training.checkpoints import (
    KEY,
    preparation,
    refuse_float_optimizer,
    refuse_masters,
    refuse_other_preparation,
)
from qat.training.guards import Guard, NumericalGuards
from qat.training.observing import uncalibrated
from qat.training.schedule import QuantizationSchedule, planned_steps
from qat.training.steps import QuantizationSteps, unwrapped
from qat.training.trainers import own_statistics, prepare_once, require_finite_weights

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(Callback):
    """Quantization-aware training of a `LightningModule` that need not know of it; faults are told before a step.

    Args:
        spec: what to quantize.
        algorithm: how scales are found; default `Automatic`, the best for the type of each layer.
        schedule: when; default: from the first step.
        target: who will load the export.
        attribute: the attribute of the LightningModule that holds the model to prepare (its metrics, a teacher and the
            like stay out of it); None: the LightningModule itself.
        observer: what activation scales are taken from; default `Best`.
        model_inputs: turns a dataloader's batch into what the model is called with, for calibration; default the
            LightningModule's own ``model_inputs`` if it has one, else the first element of a tuple or list, else all.
        example_inputs: one batch for the model, to find layers whose input stock kernels cannot read.
        guards: what happens when numbers go wrong in training; default: stop before a loss or gradient that is inf or
            NaN reaches the weights, and warn of layers whose scales, codes or activations degenerate.

    Raises:
        SpecError, TargetError: the spec does not fit the model or the target.
        StateError: the model is frozen, or prepared in another way.
        CalibrationError: activations are quantized and nothing will set their scales.
        TrainingError: no optimizer holds the learned scales, or one would decay them, or comes from a float checkpoint;
            a callback that averages weights averages what it must not; the schedule fits neither the layers nor the
            steps; the quantizers would be lost in worker processes; later: the guards stop the run.

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
        example_inputs: Any = None,
        guards: NumericalGuards | None = None,
    ) -> None:
        self.spec = spec
        self.algorithm = algorithm or Automatic()
        self.schedule = schedule or QuantizationSchedule()
        self.target = target
        self.attribute = attribute
        self.observer = observer or Best()
        self.model_inputs = model_inputs
        self.example_inputs = example_inputs
        self.guards = guards or NumericalGuards()
        self.guards.require_fits(self.schedule)
        self._steps: QuantizationSteps | None = None
        self._guard: Guard | None = None
        self._guarded: Mapping[str, Any] | None = None  # the guard's state in a checkpoint, until the fit begins
        self._process = os.getpid()

    def model_of(self, module: LightningModule) -> nn.Module:
        """The model that is prepared, without a ``torch.compile`` wrapper."""
        model = module if self.attribute is None else getattr(module, self.attribute, None)
        if not isinstance(model, nn.Module):
            raise StateError(
                f"attribute: {type(module).__name__}.{self.attribute} must be the module to prepare, got "
                f"{type(model).__name__}: name the attribute that holds it, or None for the LightningModule itself"
            )
        return unwrapped(model)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the model, or what ``configure_model`` builds right after it is built."""
        averages = come_first(trainer, self)
        configures = is_overridden("configure_model", pl_module)
        if not configures or self._is_built(pl_module):  # what only wraps a float model would wrap the wrong layers
            self._prepare(trainer, pl_module)
        if configures:
            self._prepare_after_configuring(trainer, pl_module)
        for average in averages:
            average.setup(trainer, pl_module, stage)  # of the prepared module

    def _prepare_after_configuring(self, trainer: Trainer, pl_module: LightningModule) -> None:
        original = pl_module.configure_model

        @functools.wraps(original)
        def configure_and_prepare() -> None:
            # Gone before its first call ends, so that copies and pickles of the module never hold it.
            vars(pl_module).pop("configure_model", None)
            with prepared_first(lambda model: self._prepare_first(pl_module, model)):
                original()
            self._prepare(trainer, pl_module)

        pl_module.configure_model = configure_and_prepare  # type: ignore[method-assign]

    def _prepare_first(self, pl_module: LightningModule, model: nn.Module) -> None:
        """Prepare the model that `qat.shard` is about to shard, or the part of it that the attribute names."""
        named = pl_module if self.attribute is None else getattr(pl_module, self.attribute, None)
        model = next((unwrapped(part) for part in model.modules() if part is named), model)
        if not is_frozen(model):
            prepare_once(model, self.spec, self.algorithm, self.target, self.observer, self.example_inputs)

    def _is_built(self, pl_module: LightningModule) -> bool:
        model = None if self.attribute is None else getattr(pl_module, self.attribute, None)
        layers = [m for m in model.modules() if layer_class(m)] if isinstance(model, nn.Module) else []
        return bool(layers) and not any(parameter.is_meta for layer in layers for parameter in layer.parameters())

    def _of(self, trainer: Trainer, pl_module: LightningModule) -> QuantizationSteps:
        """What the schedule asks of this module's model."""
        model, strategy = self.model_of(pl_module), trainer.strategy
        if self._steps is None or self._steps.model is not model:
            shards = strategy.restore_checkpoint_after_setup and not isinstance(strategy, ModelParallelStrategy)
            self._steps = QuantizationSteps(
                model,
                self.schedule,
                step=lambda: trainer.global_step,
                calibrate=partial(calibrate_on_training_data, trainer, pl_module, model, self.model_inputs),
                sharded=type(strategy).__name__ if shards else None,
            )
        return self._steps

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, fitting = self.model_of(pl_module), trainer.state.fn == TrainerFn.FITTING
        if is_frozen(model):
            if fitting:
                raise StateError("model: is frozen and cannot be trained further: build the float model again")
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False  # in which quanto's packed weights raise
            model.register_load_state_dict_pre_hook(refuse_masters)  # type: ignore[no-untyped-call]
            return
        if prepare_once(model, self.spec, self.algorithm, self.target, self.observer, self.example_inputs):
            self._refuse_worker_processes(trainer, model)
        part_scales(trainer, model)  # before an average copies them
        own_statistics(pl_module, model)
        if fitting:
            self._of(trainer, pl_module).require_whole_weights()
        self.on_validation_end(trainer, pl_module)

    def _refuse_worker_processes(self, trainer: Trainer, model: nn.Module) -> None:
        """Of a copy of the module that a worker process trains, only the state returns to the process of the user."""
        elsewhere = trainer.strategy.launcher is not None and os.getpid() != self._process
        stateful = any("_quantizer." in key for key in model.state_dict())
        if elsewhere and stateful and trainer.state.fn == TrainerFn.FITTING:
            raise TrainingError(
                "strategy: its worker processes lose quantizers: call qat.prepare before the fit, or use strategy='ddp'"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before any work is lost."""
        steps = self._of(trainer, pl_module)
        steps.require_groups(trainer.optimizers)
        steps.take_over_runs()  # also where a checkpoint left no step to do

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse another preparation, and to go on with an optimizer that never held the learned ranges."""
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_float_optimizer(pl_module, checkpoint)
            if (noted := checkpoint.get(KEY)) is not None:
                refuse_other_preparation(self.model_of(pl_module), noted["prepared"])
                self._of(trainer, pl_module).load_state_dict(noted)
                self._guarded = noted.get("guards")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give activations their scales and quantized weights their start, where a resumed run has them not."""
        model = self.model_of(pl_module)
        require_same_kind(trainer, model, self.schedule)
        self._of(trainer, pl_module).begin(
            trainer.optimizers,
            steps=planned_steps(trainer),
            wrapped=trainer.strategy.model,
            trial=bool(trainer.fast_dev_run),  # type: ignore[attr-defined]
        )
        part_scales(trainer, model)
        shown = not compiled_parts(pl_module)
        self._guard = Guard(self.guards, model, lambda: trainer.global_step, activations=shown)
        self._log(trainer, self._guard.begin(self._guarded))
        self._guarded = None

    @staticmethod
    def _log(trainer: Trainer, found: Mapping[str, float]) -> None:
        for one in trainer.loggers if found else ():
            one.log_metrics(dict(found), step=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch fake quantization and observers by step; note the scales that this step is to hold."""
        self._of(trainer, pl_module).before_step()
        if self._guard is not None:
            self._guard.before_step(batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Put held scales back, take new ones from what was observed, and change types where their step has come."""
        self._of(trainer, pl_module).after_step()
        if self._guard is not None:
            self._log(trainer, self._guard.after_step())
        if (fault := read_without_call(self.model_of(pl_module))) is not None:
            raise StateError(fault)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fake-quantize, whatever the step, and observe nothing."""
        if trainer.state.fn != TrainerFn.FITTING and uncalibrated(self.model_of(pl_module)):
            raise CalibrationError("activations: no scales were ever set: pass ckpt_path, or call qat.calibrate first")
        self._of(trainer, pl_module).judge()

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what training does at this step."""
        steps = self._of(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            steps.train()
        else:
            steps.judge()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the guards see the loss."""
        if self._guard is not None:
            self._guard.note_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Deal with a loss or gradient that is not finite before it reaches the weights or a checkpoint."""
        if self._guard is not None:
            own = (p for group in optimizer.param_groups for p in group["params"])
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._guard.before_optimizer(own, pl_module, scaled=scaler is not None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never let weights that a non-finite gradient has spoilt replace a good checkpoint; tell their preparation."""
        require_finite_weights(pl_module, trainer.global_step)
        if not is_frozen(model := self.model_of(pl_module)):
            checkpoint[KEY] = {"prepared": preparation(model), **self._of(trainer, pl_module).state_dict()}
            guarded = self._guarded if self._guard is None else self._guard.state_dict()
            checkpoint[KEY] |= {} if guarded is None else {"guards": guarded}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Any = None) -> None:
        """Leave the model as it will be used: fake quantization on, observers off. Tuners call only this hook."""
        if self._steps is not None:
            self._steps.close()
        self._steps = self._guard = None  # they know the trainer

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last scales, and leave the model as it will be used."""
        self._of(trainer, pl_module).end()
        if self._guard is not None:
            self._log(trainer, self._guard.end())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`; what the guards know is still there for a checkpoint that is written now."""
        guard = self._guard
        self.teardown(trainer, pl_module)
        self._guard = guard
