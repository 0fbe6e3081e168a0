"""The Lightning callback: a float LightningModule trains quantization-aware without knowing of it.

Layers are prepared in ``setup`` (for modules built in ``configure_model``, right after it): before weights are
restored, and before the optimizer and the strategy see the model; also for validate, test and predict. Checkpoints
always hold float master weights with the quantizers' state beside them; freezing comes after the fit, by `qat.freeze`.
Whatever cannot work is refused before the first step.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from qat.errors import CalibrationError, StateError, TrainingError, listed
from qat.files.evidence import is_frozen
from qat.hosts import get_target
from qat.layers import Mode, QuantizedLayer, layer_class, quantized_layers
from qat.observers import Best, ObserverChoice
from qat.optimizers import REMEDY, begin_training, learned_ranges, refuse_decay, watch
from qat.preparation import prepare, prepared_as
from qat.quantizers import Algorithm, Automatic
from qat.spec import QuantSpec
from qat.starting import awaiting
from qat.training.annealing import begin_with, end_first_type
from qat.training.averaging import part_scales, require_order, require_same_kind
from qat.training.batches import calibrate_on_training_data
from qat.training.cage import pull_after_steps
from qat.training.checkpoints import refuse_float_optimizer, refuse_masters
from qat.training.observing import activation_quantizers, end_observing, take_scales, uncalibrated
from qat.training.schedule import QuantizationSchedule, planned_steps
from qat.training.task import require_finite

__all__ = ["QuantizationAwareTraining"]

logger = logging.getLogger("qat")


class QuantizationAwareTraining(Callback):
    """Quantization-aware training of a `LightningModule` that need not know of it.

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

    Raises (during ``trainer.fit``, before the first step):
        SpecError, TargetError: the spec does not fit the model or the target.
        StateError: the model is frozen, or prepared in another way.
        CalibrationError: activations are quantized and nothing will set their scales.
        TrainingError: no optimizer holds the learned scales, or one would decay them, or comes from a float checkpoint;
            a callback that averages weights copied the module too early, or averages what it must not; the schedule
            fits neither the layers nor the steps; the quantizers would be lost in worker processes; later: the loss
            is not finite.

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
    ) -> None:
        self.spec = spec
        self.algorithm = algorithm or Automatic()
        self.schedule = schedule or QuantizationSchedule()
        self.target = target
        self.attribute = attribute
        self.observer = observer or Best()
        self.model_inputs = model_inputs
        self.example_inputs = example_inputs
        self._phase: tuple[bool, bool] | None = None  # what the layers were last switched to
        self._held: dict[nn.Parameter, Tensor] = {}  # learned scales that stay, and where
        self._pulls: list[RemovableHandle] = []  # of hooks that follow the optimizers' steps
        self._changes: list[int] = []  # steps to come at which layers begin to quantize to another type
        self._process = os.getpid()
        self._step = 0  # after the last batch
        # Whether nobody asked for a start that needs data.
        self._unasked = isinstance(self.algorithm, Automatic) and "start" not in self.algorithm.model_fields_set

    def model_of(self, module: LightningModule) -> nn.Module:
        """The model that is prepared, without a ``torch.compile`` wrapper."""
        model = module if self.attribute is None else getattr(module, self.attribute, None)
        if not isinstance(model, nn.Module):
            raise StateError(
                f"attribute: {type(module).__name__}.{self.attribute} must be the module to prepare, got "
                f"{type(model).__name__}: name the attribute that holds it, or None for the LightningModule itself"
            )
        while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        return model

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the model, or what ``configure_model`` builds right after it is built."""
        require_order(trainer, self)
        configures = is_overridden("configure_model", pl_module)
        if not configures or self._is_built(pl_module):  # what only wraps a float model would wrap the wrong layers
            self._prepare(trainer, pl_module)
        if not configures:
            return
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
        layers = [m for m in model.modules() if layer_class(m)] if isinstance(model, nn.Module) else []
        return bool(layers) and not any(parameter.is_meta for layer in layers for parameter in layer.parameters())

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self.model_of(pl_module)
        if is_frozen(model):
            if trainer.state.fn == TrainerFn.FITTING:
                raise StateError("model: is frozen and cannot be trained further: build the float model again")
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False  # in which quanto's packed weights raise
            model.register_load_state_dict_pre_hook(refuse_masters)  # type: ignore[no-untyped-call]
            return
        wanted: dict[str, Any] = {"algorithm": self.algorithm, "target": self.target, "observer": self.observer}
        if not any(quantized_layers(model)):
            prepare(model, self.spec, **wanted, example_inputs=self.example_inputs)
            logger.info("prepared %d layers", len(prepared_as(model).layers))
            for note in prepared_as(model).notes:
                logger.warning("%s", note)
            self._refuse_worker_processes(trainer, model)
        part_scales(trainer, model)  # before an average copies them
        watch(model)
        wanted = {"spec": get_target(self.target).resolved(self.spec), **wanted}
        found = {name: getattr(prepared_as(model), name) for name in wanted}
        if found != wanted:
            raise StateError(f"spec: model is already prepared with {found}, but the callback has {wanted}: use one")
        # DistributedDataParallel would overwrite every rank's statistics with rank 0's before each forward, and has no
        # public way to leave buffers out.
        own = {id(b) for q in activation_quantizers(model) for b in q.buffers()}
        ignored = {*getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())}
        ignored |= {name for name, buffer in pl_module.named_buffers() if id(buffer) in own}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            pl_module, sorted(ignored)
        )
        self._refuse_sharded(trainer, model)
        self._switch(trainer, pl_module)

    def _refuse_sharded(self, trainer: Trainer, model: nn.Module) -> None:
        """Raise where a schedule needs whole weights during the fit and a strategy shards them, or their copies."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.strategy.restore_checkpoint_after_setup:
            return
        name = type(trainer.strategy).__name__
        if self.schedule.first_weights is not None:
            raise TrainingError(f"schedule: first_weights needs whole weights, which {name} shards: use ddp")
        waiting = {} if self._unasked else awaiting(model)
        if self.schedule.calibration_batches and waiting:
            raise TrainingError(
                f"algorithm: the start of {len(waiting)} layers needs whole weights, which {name} shards: call "
                "qat.prepare and qat.calibrate before the fit, or use start='clip'"
            )

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
        model = self.model_of(pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        refuse_decay(model, groups)
        learned = learned_ranges(model)
        if self.schedule.hold_scales_from is not None and not learned:
            raise TrainingError(
                f"schedule: hold_scales_from={self.schedule.hold_scales_from} holds learned scales, but nothing is "
                "learned: use LearnedAffine, or learn_activations=True, or leave it out"
            )
        missing = learned.keys() - {id(p) for group in groups for p in group["params"]}
        if groups and missing and not trainer.strategy.restore_checkpoint_after_setup:  # those shard parameters
            raise TrainingError(f"optimizer: does not hold {len(missing)} of {len(learned)} learned scales: {REMEDY}")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with an optimizer that never held the learned ranges."""
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_float_optimizer(pl_module, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give activations their scales and quantized weights their start, where a resumed run has them not."""
        model, schedule = self.model_of(pl_module), self.schedule
        self._refuse_schedule(trainer, model)
        unset = uncalibrated(model)
        if unset and not schedule.sets_scales(trainer.global_step):
            raise CalibrationError(
                "schedule: activations are quantized but nothing sets their scales: set calibration_batches above 0 or "
                "observe_from=0, or call qat.calibrate before the fit"
            )
        steps = (schedule.start_step, schedule.first_weights_until or 0)
        self._changes = [step for step in steps if step > trainer.global_step]
        self._change_types(trainer, model)
        if not schedule.calibration_batches and (waiting := awaiting(model)):
            logger.warning(
                "%d layers begin with the start 'clip', for theirs needs data: set calibration_batches above 0, or "
                "call qat.calibrate before the fit: %s",
                len(waiting),
                listed(list(waiting), 4),
            )
        self._step = trainer.global_step
        self._switch(trainer, pl_module)  # of a resumed run, the step is known only now
        self._calibrate(trainer, pl_module, activations=unset)
        part_scales(trainer, model)
        self._pulls = pull_after_steps(trainer, model, self.schedule)
        self._switch(trainer, pl_module)

    def _refuse_schedule(self, trainer: Trainer, model: nn.Module) -> None:
        require_same_kind(trainer, model, self.schedule)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.schedule.require_within(planned_steps(trainer))
        if (start := self.schedule.start_step) <= trainer.global_step:
            return
        if not all(layer.masters(layer) for _, layer in quantized_layers(model)):
            raise TrainingError(
                f"schedule: start_step={start} begins in float, but the model has codes only: leave it out"
            )
        wrapped = trainer.strategy.model
        waits = isinstance(wrapped, DistributedDataParallel) and (
            wrapped.static_graph or not wrapped.find_unused_parameters
        )
        if waits and learned_ranges(model):
            raise TrainingError(
                f"schedule: start_step={start} gives learned ranges no gradient before it, for which "
                "DistributedDataParallel would wait: use strategy='ddp_find_unused_parameters_true' (without "
                "static_graph), or start_step=0"
            )

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule, *, activations: bool) -> None:
        """Scales of activations, and starts of weights that train from this step on as what they quantize to now."""
        model, count = self.model_of(pl_module), self.schedule.calibration_batches
        begins, waiting = trainer.global_step >= self.schedule.start_step, awaiting(model)
        if self._unasked and waiting and trainer.strategy.restore_checkpoint_after_setup:  # those shard parameters
            waiting = _without_data(waiting, "weights are sharded")
        if count and (activations or waiting):
            count = count if activations or begins else 1  # it shows now that the model takes batches
            options: dict[str, Any] = {"starts": begins, "activations": activations}
            try:
                found = calibrate_on_training_data(trainer, pl_module, model, count, self.model_inputs, **options)
                logger.info("%s", found)
            except CalibrationError as error:
                # Of several processes one alone must not go on. An error without a cause is in the data.
                if not self._unasked or activations or trainer.world_size > 1 or error.__cause__ is None:
                    raise
                _without_data(waiting, str(error))
        if begins:
            begin_training(model)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch fake quantization and observers by step; note the scales that this step is to hold."""
        if self._phase != self._phase_of(trainer):
            self._switch(trainer, pl_module)
        if not self.schedule.holds(trainer.global_step):
            self._held.clear()
        elif not self._held:
            own = learned_ranges(self.model_of(pl_module))
            self._held = {p: p.detach().clone() for p in pl_module.parameters() if id(p) in own}

    def _change_types(self, trainer: Trainer, model: nn.Module) -> None:
        """Have layers quantize to the type of this step; a resumed run begins where its checkpoint was."""
        if self.schedule.first_weights is not None and self.schedule.begins_with_first_weights(trainer.global_step):
            begin_with(model, self.schedule.first_weights)
        else:
            end_first_type(model, trainer.optimizers)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Put held scales back, and take new ones from what was observed.

        Where weights quantize to another type in the next step, find their starts: a checkpoint of now holds them.
        """
        # Without a gradient an optimizer's momentum would still move them, and DDP would wait for the gradient.
        for parameter, value in self._held.items():
            parameter.detach().copy_(value)
        before, self._step = self._step, trainer.global_step
        if self._phase is not None and self._phase[1] and self.schedule.takes_scales(before, self._step):
            take_scales(self.model_of(pl_module), trainer.world_size)
        if self._changes and trainer.global_step >= self._changes[0]:
            self._changes = [step for step in self._changes if step > trainer.global_step]
            phase = self._phase
            self._switch(trainer, pl_module)
            self._change_types(trainer, self.model_of(pl_module))
            self._calibrate(trainer, pl_module, activations=False)
            self._switch(trainer, pl_module, phase)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fake-quantize, whatever the step, and observe nothing."""
        if trainer.state.fn != TrainerFn.FITTING and uncalibrated(self.model_of(pl_module)):
            raise CalibrationError("activations: no scales were ever set: pass ckpt_path, or call qat.calibrate first")
        self._switch(trainer, pl_module, (True, False))

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop before a non-finite loss can reach the weights or a checkpoint."""
        require_finite(loss, trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never let weights that a non-finite gradient has spoilt replace a good checkpoint."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
                raise TrainingError(
                    f"gradient: made {name} non-finite by step {trainer.global_step}; the last checkpoint is "
                    "untouched: lower the learning rate, or clip gradients"
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Any = None) -> None:
        """Leave the model as it will be used: fake quantization on, observers off. Tuners call only this hook."""
        if self._phase is not None:
            for _, layer in quantized_layers(self.model_of(pl_module)):
                layer.mode = Mode()
            self._phase = None
        self._held.clear()
        while self._pulls:
            self._pulls.pop().remove()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last scales, and leave the model as it will be used."""
        if self._phase is not None and self._phase[1]:
            end_observing(self.model_of(pl_module), trainer.world_size)
        self.teardown(trainer, pl_module)

    on_exception = teardown  # type: ignore[assignment]

    def _phase_of(self, trainer: Trainer) -> tuple[bool, bool]:
        """Whether layers fake-quantize and whether observers record, at this step of a fit."""
        if trainer.state.fn != TrainerFn.FITTING:
            return True, False
        return trainer.global_step >= self.schedule.start_step, self.schedule.observes(trainer.global_step)

    def _switch(self, trainer: Trainer, pl_module: LightningModule, phase: tuple[bool, bool] | None = None) -> None:
        """Switch all layers, by default to what training does at this step.

        Activations without a scale stay float, so that sanity checks and tuners can run. An observer that records gives
        its first scale in that same forward.
        """
        before, self._phase = self._phase, phase or self._phase_of(trainer)
        quantizing, observing = self._phase
        if phase is None and before is not None and before[1] and not observing:  # for good, not for a validation
            end_observing(self.model_of(pl_module), trainer.world_size)
        for _, layer in quantized_layers(self.model_of(pl_module)):
            layer.mode = Mode(quantizing, observing or not uncalibrated(layer), observing)

    on_validation_end = _switch


def _without_data(waiting: dict[str, QuantizedLayer], reason: str) -> dict[str, QuantizedLayer]:
    """Let layers begin with what they have; none waits then."""
    for layer in waiting.values():
        layer.weight_quantizer.stop_awaiting()
    logger.warning("%d layers begin with the start 'clip', for theirs needs data: %s", len(waiting), reason)
    return {}
