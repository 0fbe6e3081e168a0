"""Quantization-aware training with the Trainer of transformers, and with those of TRL that derive from it.

`QuantizationCallback` prepares the model when the Trainer is made (``on_init_end``), so before the optimizer. That
is the one event before it at which a callback has the model. The Trainer builds its optimizer within ``train``, and
tells callbacks of it afterwards. What it builds would decay learned scales. So `grouped_optimizer` is handed over with
the callback, as ``optimizer_cls_and_kwargs``: the Trainer calls it with the prepared model. No subclass is needed, so
every Trainer that takes these two arguments will do.

A Trainer has no event before an evaluation. So layers train quantized by schedule only from the begin of a step to its
end. At all other times they are as they would be served.

Checkpoints are the Trainer's own. Masters and quantizers are in the model's file, and the schedule needs but the count
of steps, which is in the Trainer's state.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat.adapters import adapters, without_peft
from qat.calibration import CalibrationReport
from qat.errors import StateError, TrainingError, listed
from qat.exporting import export
from qat.files.evidence import is_frozen
from qat.freezing import freeze
from qat.layers import quantized_layers
from qat.observers import Best, ObserverChoice
from qat.preparation import parameter_groups
from qat.probing import compiled_parts
from qat.quantizers import Algorithm, Automatic
from qat.runs import read_without_call
from qat.spec import QuantSpec
from qat.tensors import map_tensors, model_device
from qat.training.guards import Guard, NumericalGuards
from qat.training.observing import activation_quantizers
from qat.training.schedule import QuantizationSchedule
from qat.training.steps import QuantizationSteps
from qat.training.trainers import calibrate_on, own_statistics, prepare_once, require_finite_weights
from qat.verification import verify

__all__ = ["QuantizationCallback", "grouped_optimizer"]

logger = logging.getLogger("qat")

_GUARDS = "quantization_guards"
"""Where the Trainer's checkpoints hold what the guards know."""


class QuantizationCallback(TrainerCallback):
    """Quantization-aware training with transformers' Trainer or TRL's SFTTrainer, by a schedule.

    Args:
        spec: what to quantize.
        algorithm: how scales are found; default `Automatic`, the best for the type of each layer.
        schedule: when; default: from the first step.
        target: who will load the export.
        observer: what activation scales are taken from; default `Best`.
        model_inputs: turns a batch of the training dataloader into what the model is called with, for calibration;
            default: the batch.
        example_inputs: one batch for the model, to find layers whose input stock kernels cannot read.
        export: a directory. After the last step the model is frozen and written there. None: that is left to you, by
            `qat.freeze` and `qat.export`.
        verify: load what was written, as users will, and compare it with the trained model.
        guards: what happens when numbers go wrong in training; default: stop before a gradient that is inf or NaN
            reaches the weights, and warn of layers whose scales, codes or activations degenerate.

    Raises:
        SpecError, TargetError: the spec does not fit the model or the target.
        StateError: the model is frozen, or prepared in another way.
        CalibrationError: activations are quantized and nothing will set their scales.
        TrainingError: the optimizer decays learned scales or lacks them; the schedule fits neither the layers nor the
            steps; evaluation would round masters; later: the guards stop the run.

    Example::

        arguments = transformers.TrainingArguments("run", max_steps=1000, weight_decay=0.01)
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            callbacks=[QuantizationCallback(qat.QuantSpec(weights="int4"), export="my-llama-int4")],
            optimizer_cls_and_kwargs=grouped_optimizer(arguments),
        )
        trainer.train()
    """

    def __init__(
        self,
        spec: QuantSpec,
        algorithm: Algorithm | None = None,
        schedule: QuantizationSchedule | None = None,
        *,
        target: str = "transformers",
        observer: ObserverChoice | None = None,
        model_inputs: Callable[[Any], Any] | None = None,
        example_inputs: Any = None,
        export: str | Path | None = None,
        verify: bool = False,
        guards: NumericalGuards | None = None,
    ) -> None:
        self.spec = spec
        self.algorithm = algorithm or Automatic()
        self.schedule = schedule or QuantizationSchedule()
        self.target = target
        self.observer = observer or Best()
        self.model_inputs = model_inputs or (lambda batch: batch)
        self.example_inputs = example_inputs
        self.export = export
        self.verify = verify
        if verify and export is None:
            raise TrainingError("verify: True needs what was exported, got export=None: name a directory")
        self.guards = guards or NumericalGuards()
        self.guards.require_fits(self.schedule)
        self._steps: QuantizationSteps | None = None
        self._guard: Guard | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Prepare the model, before the Trainer builds its optimizer."""
        model: nn.Module = given["model"]
        if is_frozen(model):
            raise StateError("model: is frozen and cannot be trained further: build the float model again")
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(args, name):
                raise TrainingError(f"{name}: True would round the float masters to 16 bits: leave it out")
        if given["optimizer"] is not None and not any(quantized_layers(model)):
            raise TrainingError(
                "optimizers: this optimizer was built before the model is prepared, so it holds no learned scales: "
                "pass optimizer_cls_and_kwargs=grouped_optimizer(arguments) in its place, or call qat.prepare first"
            )
        prepare_once(model, self.spec, self.algorithm, self.target, self.observer, self.example_inputs)
        _make_saveable(model)
        own_statistics(model, model)
        self._begun(args, state, model).require_whole_weights()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Refuse what cannot work, and calibrate, where a resumed run needs it."""
        model: nn.Module = given["model"]
        if not any(quantized_layers(model)):
            raise TrainingError(
                "model: was never prepared: give the callback to the Trainer's constructor, and where the Trainer has "
                "a model_init, call qat.prepare in it"
            )
        if args.load_best_model_at_end and (apart := _ranges_apart(model)):
            raise TrainingError(
                f"load_best_model_at_end: checkpoints of a PeftModel lack the learned ranges of {len(apart)} layers "
                f"without an adapter ({listed(apart, 4)}), so the best would not come back as it was judged: use "
                "target_modules='all-linear', or leave it out"
            )
        if self._steps is not None:  # of a run that failed
            self._steps.close()
        steps = self._steps = self._begun(args, state, model, given["train_dataloader"])
        steps.begin([given["optimizer"]], steps=state.max_steps)
        _make_saveable(model)
        shown = not (args.torch_compile or compiled_parts(model))
        self._guard = Guard(self.guards, model, lambda: state.global_step, activations=shown)
        self._guard.begin(state.stateful_callbacks.get(_GUARDS))  # type: ignore[union-attr]
        steps.judge()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Switch fake quantization and observers by step; note the scales that this step is to hold."""
        self._of().before_step()
        if self._guard is not None:
            self._guard.before_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Deal with a gradient that is not finite before it reaches the weights; the Trainer hides such losses."""
        if self._guard is not None and not args.fp16:  # whose scaler meets such gradients, and skips the step
            self._guard.before_optimizer(given["model"].parameters())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Do what the schedule asks after a step; then the model is as it would be served, to be judged or saved."""
        model: nn.Module = given["model"]
        self._of().after_step()
        if self._guard is not None:
            if found := self._guard.after_step():  # reporters come before this callback, so they cannot be given it
                state.log_history.append({**found, "step": state.global_step})
            if control.should_save:
                state.stateful_callbacks[_GUARDS] = self._guard.state_dict()  # type: ignore[index,call-overload]
        self._of().judge()
        # SFTTrainer multiplies by the weight of the head without calling it, so that a quantized head trains in float.
        if (fault := read_without_call(model)) is not None:
            raise StateError(fault)
        if control.should_save:
            require_finite_weights(model, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Take the last scales, then freeze, export and verify if asked."""
        model: nn.Module = given["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._of().close()  # the best one is kept as it was judged
        else:
            self._of().end()
        self._steps = None
        if self.export is None:
            return
        freeze(model)
        if state.is_world_process_zero:
            logger.info("%s", export(model, self.export, overwrite=True))
            if self.verify:
                logger.info("%s", verify(self.export, reference=model))

    def _of(self) -> QuantizationSteps:
        if self._steps is None:
            raise TrainingError("callbacks: QuantizationCallback came to a run that had begun: add it before train()")
        return self._steps

    def _begun(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, loader: Any = None
    ) -> QuantizationSteps:
        shards = [name for name in ("fsdp", "deepspeed") if getattr(args, name)]

        def calibrate(count: int, *, starts: bool, activations: bool) -> CalibrationReport:
            with _own_random_numbers():
                batches = islice(_apart(loader), count)
                moved = (map_tensors(lambda t: t.to(model_device(model)), batch) for batch in batches)
                return calibrate_on(model, moved, self.model_inputs, starts=starts, activations=activations)

        return QuantizationSteps(
            model,
            self.schedule,
            step=lambda: state.global_step,
            calibrate=calibrate,
            sharded=shards[0] if shards else None,
        )


def grouped_optimizer(arguments: TrainingArguments, scale_lr: float | None = None) -> tuple[Any, dict[str, Any]]:
    """The optimizer that ``arguments`` name, in which learned scales have a rate of their own and no weight decay.

    For ``optimizer_cls_and_kwargs`` of a Trainer. It is built within ``train``, by `qat.parameter_groups`.

    Args:
        arguments: those of the Trainer.
        scale_lr: learning rate of learned scales; default a tenth of ``arguments.learning_rate``.

    Raises:
        TrainingError: ``arguments.optim`` is an optimizer that makes groups of its own.
    """
    return _builder, {"arguments": arguments, "scale_lr": scale_lr}


def _builder() -> Callable[..., torch.optim.Optimizer]:
    """What the Trainer makes of a class that is no optimizer: it calls it, and the result with the model."""
    return _build


def _build(model: nn.Module, arguments: TrainingArguments, scale_lr: float | None) -> torch.optim.Optimizer:
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or {"params", "model"} & options.keys():
        raise TrainingError(
            f"optim: {arguments.optim!s} makes groups of its own, which know no learned scales: choose one such as "
            "'adamw_torch'"
        )
    groups = parameter_groups(model, options["lr"], scale_lr, arguments.weight_decay)
    return cls(groups, **{key: value for key, value in options.items() if key != "optimizer_dict"})


def _ranges_apart(model: nn.Module) -> list[str]:
    """Layers of a ``PeftModel`` that learn ranges, but have no adapter, whose file would hold them."""
    inner = without_peft(model)
    under = {name for name, _ in adapters(inner)}
    layers = () if inner is model else quantized_layers(inner)
    return [name for name, layer in layers if name not in under and list(layer.quantizer_parameters())]


def _make_saveable(model: nn.Module) -> None:
    """Let the Trainer's checkpoints hold the whole state, under the names by which it loads them.

    safetensors writes no tensor that several layers share, so each activation gets a scale of its own. transformers
    writes experts, and others, under the names of the original files, and the Trainer does not convert them back.
    """
    for quantizer in activation_quantizers(model):
        quantizer.part()
    setattr(model, "_weight_conversions", [])  # noqa: B010 (mypy takes the plain form for a parameter)


def _apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same batches with a position of its own, without accelerate's count of them."""
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    sampler = copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})
    return DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """A run with and one without this calibration shuffle their data alike, and draw the same noise."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
