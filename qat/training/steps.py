"""What a `QuantizationSchedule` asks of a training loop, step by step, whoever runs the loop.

The callbacks for Lightning and for transformers' Trainer call `QuantizationSteps`; so may a loop of your own, or
one of accelerate. It knows no trainer: it is told when a step begins and ends, and what number that step has.

A run goes on exactly from the count of steps and the model's own state: masters, ranges, scales, statistics, and the
type that each weight quantizes to. So a checkpoint of a model and a step is a whole one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from qat.calibration import CalibrationReport, calibrate_parts
from qat.distributed import reshard, sharded
from qat.errors import CalibrationError, TrainingError, listed, shown
from qat.layers import Mode, QuantizedLayer, quantized_layers
from qat.optimizers import REMEDY, begin_training, learned_ranges, refuse_decay
from qat.preparation import prepared_as
from qat.quantizers import Automatic
from qat.runs import run_state, set_run_state
from qat.starting import awaiting
from qat.training.annealing import begin_with, end_first_type
from qat.training.cage import pull_after_steps
from qat.training.observing import end_observing, take_scales, uncalibrated
from qat.training.schedule import QuantizationSchedule

__all__ = ["QuantizationSteps", "unwrapped"]

logger = logging.getLogger("qat")


class Calibrate(Protocol):
    """Calibrates the model with ``count`` batches; the other two are those of `qat.calibration.calibrate_parts`."""

    def __call__(self, count: int, *, starts: bool, activations: bool) -> CalibrationReport: ...


class QuantizationSteps:
    """Does what a `QuantizationSchedule` says, in a training loop of your own.

    Call `begin` once the optimizers exist, `before_step` and `after_step` around each optimizer step (the batches that
    it accumulates included), and `end` after the last one. Evaluate within `evaluating`. Where nothing of it is asked
    (the default schedule, a calibrated model), a loop without it trains the same weights.

    Args:
        model: as `qat.prepare` left it; it may be wrapped, as by ``torch.compile`` or DistributedDataParallel.
        schedule: when; default: from the first step.
        batches: for calibration, as `qat.calibrate` takes them: the first ``schedule.calibration_batches`` of an
            iterable that begins anew each time. None: nothing is calibrated.
        step: for the integration of a trainer that counts the optimizer steps itself: it returns those done.
        calibrate: for such an integration too, in place of ``batches``.
        sharded: the name of what shards weights in its own way, such as DeepSpeed; what needs whole ones is refused
            then. Of `qat.shard` and torch's ``fully_shard`` the model tells itself.

    `state_dict` and `load_state_dict`, for ``register_for_checkpointing`` of accelerate, hold the step and all runs.

    >>> import qat
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> _ = qat.prepare(model, qat.QuantSpec(weights="int2"), algorithm=qat.LearnedAffine())
    >>> optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    >>> schedule = qat.QuantizationSchedule(first_weights="int4", first_weights_until=2)
    >>> batches = [torch.randn(4, 64) for _ in range(4)]
    >>> training = QuantizationSteps(model, schedule, batches)
    >>> training.begin([optimizer], steps=4)
    >>> for batch in batches:
    ...     training.before_step()
    ...     model(batch).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     training.after_step()
    >>> training.end()
    >>> qat.freeze(model).layers["0"].weights
    'int2'
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: QuantizationSchedule | None = None,
        batches: Iterable[Any] | None = None,
        *,
        step: Callable[[], int] | None = None,
        calibrate: Calibrate | None = None,
        sharded: str | None = None,
    ) -> None:
        self._wrapped, self.model = model, unwrapped(model)
        self.schedule = schedule or QuantizationSchedule()
        if batches is None and calibrate is None:
            self.schedule = self.schedule.model_copy(update={"calibration_batches": 0})
        self._batches, self._calibrate_with = batches, calibrate or self._on_batches
        self._sharded = sharded
        self._count = 0  # optimizer steps done, where no trainer counts them
        self._step, self._counted = step or (lambda: self._count), step is not None
        self._last = 0  # what `after_step` has seen
        self._phase: tuple[bool, bool] | None = None  # what the layers were last switched to
        self._observing = False  # whether training does, also while it is interrupted by an evaluation
        self._held: dict[nn.Parameter, Tensor] = {}  # learned scales that stay, and where
        self._pulls: list[RemovableHandle] = []  # of hooks that follow the optimizers' steps
        self._changes: list[int] = []  # steps to come at which layers begin to quantize to another type
        self._optimizers: Sequence[Optimizer] = ()
        self._runs: Mapping[str, Any] | None = None  # of a checkpoint, until `begin`
        self._calls = ""  # what came last of `begin`, `before_step` and `after_step`; empty: begin must come

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step()

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, and what is known of runs; all else is in the model's state."""
        return {"step": self.step, "runs": run_state(self.model)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; call it before `begin`, as the loads of model and optimizer."""
        self._count, self._runs = int(state["step"]), state.get("runs")
        self._calls = self._calls if self._counted else ""  # a trainer may load within a fit, after a tuner's

    def take_over_runs(self) -> None:
        """After the model's load, which forgets them: know again which layers ran before the checkpoint; once."""
        if self._runs is not None:
            set_run_state(self.model, self._runs)
        self._runs = None

    def require_whole_weights(self) -> None:
        """Raise `TrainingError` where the schedule needs whole weights, but they, or copies of them, are sharded."""
        by = self._sharded or ("fully_shard" if sharded(self.model) else None)
        if by is not None and self.schedule.first_weights is not None:
            raise TrainingError(f"schedule: first_weights needs whole weights, which {by} shards: use ddp")
        if self._sharded is None:
            return
        waiting = {} if self._unasked else awaiting(self.model)
        if self.schedule.calibration_batches and waiting:
            raise TrainingError(
                f"algorithm: the start of {len(waiting)} layers needs whole weights, which {self._sharded} shards: "
                "call qat.prepare and qat.calibrate before the fit, or use start='clip'"
            )

    def require_groups(self, optimizers: Iterable[Optimizer]) -> None:
        """Raise `TrainingError` where optimizers decay learned scales, lack some, or have none that could be held."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        refuse_decay(self.model, groups)
        learned, held = learned_ranges(self.model), self.schedule.hold_scales_from
        if held is not None and not learned:
            raise TrainingError(
                f"schedule: hold_scales_from={held} holds learned scales, but nothing is learned: use LearnedAffine, "
                "or learn_activations=True, or leave it out"
            )
        missing = learned.keys() - {id(p) for group in groups for p in group["params"]}
        if groups and missing and self._sharded is None:
            raise TrainingError(f"optimizer: does not hold {len(missing)} of {len(learned)} learned scales: {REMEDY}")

    def begin(
        self,
        optimizers: Optimizer | Iterable[Optimizer],
        *,
        steps: int | None = None,
        wrapped: nn.Module | None = None,
        trial: bool = False,
    ) -> None:
        """Before the first step of a run, or of the part after a checkpoint: refuse what cannot work, then calibrate.

        Activations get their scales and weights their start, where a resumed run has them not.

        Args:
            optimizers: all that step on the model, or the only one.
            steps: of the whole training; None: not known.
            wrapped: what the loop calls in place of the model, where that is a wrapper around more.
            trial: a few steps that show that all runs; what would begin after them is no fault.

        Raises:
            StateError: the model is not prepared, or is frozen.
            CalibrationError: activations are quantized and nothing will set their scales, or see `qat.calibrate`.
            TrainingError: see `require_groups` and `require_whole_weights`; the schedule fits neither the layers nor
                the steps; ``optimizers`` holds something else.
        """
        prepared_as(self.model)
        self.take_over_runs()
        self.close()
        given: list[Any] = [optimizers] if hasattr(optimizers, "param_groups") else list(optimizers)
        if strange := [one for one in given if not hasattr(one, "param_groups")]:
            raise TrainingError(f"optimizers: must be optimizers of torch, got {shown(strange[0])}: pass [optimizer]")
        self._optimizers = [getattr(one, "optimizer", one) for one in given]  # without accelerate's wrapper
        self.require_whole_weights()
        self.require_groups(self._optimizers)
        schedule, model = self.schedule, self.model
        if not trial:
            schedule.require_within(steps)
        self._require_gradients(wrapped or self._wrapped)
        unset = uncalibrated(model)
        if unset and not schedule.sets_scales(self.step):
            raise CalibrationError(
                "schedule: activations are quantized but nothing sets their scales: set calibration_batches above 0 or "
                "observe_from=0, or call qat.calibrate before the fit"
            )
        changes = (schedule.start_step, schedule.first_weights_until or 0)
        self._changes = [step for step in changes if step > self.step]
        self._change_types()
        if not schedule.calibration_batches and (waiting := awaiting(model)):
            logger.warning(
                "%d layers begin with the start 'clip', for theirs needs data: set calibration_batches above 0, or "
                "call qat.calibrate before the fit: %s",
                len(waiting),
                listed(list(waiting), 4),
            )
        self._last = self.step
        self.train()  # of a resumed run, the step is known only now
        self._calibrate(activations=unset)
        by = self._sharded or ("fully_shard" if sharded(model) else None)
        self._pulls = pull_after_steps(model, schedule, self._optimizers, self._step, steps, by)
        self.train()
        self._calls = "begin"

    def before_step(self) -> None:
        """Switch fake quantization and observers by step; note the scales that this step is to hold."""
        self._require_begun()
        self._calls = "before_step"
        if self._phase != self._phase_now():
            self.train()
        if not self.schedule.holds(self.step):
            self._held.clear()
        elif not self._held:
            reshard(self.model)
            own = learned_ranges(self.model)
            self._held = {p: p.detach().clone() for p in self.model.parameters() if id(p) in own}

    def after_step(self) -> None:
        """Put held scales back, and take new ones from what was observed.

        Where weights quantize to another type in the next step, find their starts: a checkpoint of now holds them.
        A trainer that counts the steps itself may call it after each batch.
        """
        self._require_begun()
        if self._calls != "before_step":
            raise TrainingError(
                "steps: after_step came without before_step: call before_step before each step's batches"
            )
        self._calls = "after_step"
        self._count += 1
        # Without a gradient an optimizer's momentum would still move them, and DDP would wait for the gradient.
        for parameter, value in self._held.items():
            parameter.detach().copy_(value)
        before, self._last = self._last, self.step
        if self._observing and self.schedule.takes_scales(before, self._last):
            take_scales(self.model, _processes())
        if self._changes and self._last >= self._changes[0]:
            self._changes = [step for step in self._changes if step > self._last]
            phase = self._phase
            self.train()
            self._change_types()
            self._calibrate(activations=False)
            self._switch(phase)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Judge the model in this block as it would be served, whatever the step."""
        self.judge()
        try:
            yield
        finally:
            self.train()

    def judge(self) -> None:
        """Fake-quantize, whatever the step, and observe nothing, until the next step begins or `train` is called."""
        self._switch((True, False))

    def train(self) -> None:
        """Switch all layers to what training does at this step."""
        phase = self._phase_now()
        if self._observing and not phase[1]:
            end_observing(self.model, _processes())
        self._observing = phase[1]
        self._switch(phase)

    def end(self) -> None:
        """After the last step: take the last scales, and leave the model as it will be used."""
        if self._observing:
            end_observing(self.model, _processes())
        self.close()

    def close(self) -> None:
        """Leave the model as it will be used, also after an error: fake quantization on, observers off."""
        self._calls = ""
        if self._phase is not None:
            for _, layer in quantized_layers(self.model):
                layer.mode = Mode()
        self._phase, self._observing = None, False
        self._held.clear()
        while self._pulls:
            self._pulls.pop().remove()

    @property
    def _unasked(self) -> bool:
        """Whether nobody asked for a start that needs data."""
        algorithm = prepared_as(self.model).algorithm
        return isinstance(algorithm, Automatic) and "start" not in algorithm.model_fields_set

    def _require_begun(self) -> None:
        if not self._calls:
            raise TrainingError(
                "steps: the schedule has not begun: call begin([optimizer], steps=...) before the first step, and "
                "again after load_state_dict or end"
            )

    def _require_gradients(self, wrapped: nn.Module) -> None:
        """Raise `TrainingError` where steps in float would not train what must be trained."""
        if (start := self.schedule.start_step) <= self.step:
            return
        if not all(layer.masters(layer) for _, layer in quantized_layers(self.model)):
            raise TrainingError(
                f"schedule: start_step={start} begins in float, but the model has codes only: leave it out"
            )
        waits = isinstance(wrapped, DistributedDataParallel) and (
            wrapped.static_graph or not wrapped.find_unused_parameters
        )
        if waits and learned_ranges(self.model):
            raise TrainingError(
                f"schedule: start_step={start} gives learned ranges no gradient before it, for which "
                "DistributedDataParallel would wait: use strategy='ddp_find_unused_parameters_true' (without "
                "static_graph; find_unused_parameters=True in other loops), or start_step=0"
            )

    def _change_types(self) -> None:
        """Have layers quantize to the type of this step; a resumed run begins where its checkpoint was."""
        if self.schedule.first_weights is not None and self.schedule.begins_with_first_weights(self.step):
            begin_with(self.model, self.schedule.first_weights)
        else:
            end_first_type(self.model, self._optimizers)

    def _calibrate(self, *, activations: bool) -> None:
        """Scales of activations, and starts of weights that train from this step on as what they quantize to now."""
        count, waiting = self.schedule.calibration_batches, awaiting(self.model)
        begins = self.step >= self.schedule.start_step
        if self._unasked and waiting and self._sharded is not None:
            waiting = _without_data(waiting, "weights are sharded")
        if count and (activations or waiting):
            count = count if activations or begins else 1  # it shows now that the model takes batches
            try:
                logger.info("%s", self._calibrate_with(count, starts=begins, activations=activations))
            except CalibrationError as error:
                # Of several processes one alone must not go on. An error without a cause is in the data.
                if not self._unasked or activations or _processes() > 1 or error.__cause__ is None:
                    raise
                _without_data(waiting, str(error))
        if begins:
            begin_training(self.model)

    def _on_batches(self, count: int, *, starts: bool, activations: bool) -> CalibrationReport:
        assert self._batches is not None
        batches = islice(self._batches, count)
        return calibrate_parts(self.model, batches, starts=starts, activations=activations)

    def _phase_now(self) -> tuple[bool, bool]:
        """Whether layers fake-quantize and whether observers record, at this step of training."""
        return self.step >= self.schedule.start_step, self.schedule.observes(self.step)

    def _switch(self, phase: tuple[bool, bool] | None) -> None:
        """Switch all layers.

        Activations without a scale stay float, so that sanity checks and tuners can run. An observer that records gives
        its first scale in that same forward.
        """
        self._phase = phase or self._phase_now()
        quantizing, observing = self._phase
        for _, layer in quantized_layers(self.model):
            layer.mode = Mode(quantizing, observing or not uncalibrated(layer), observing)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within wrappers of ``torch.compile`` and DistributedDataParallel."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _processes() -> int:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if known else 1


def _without_data(waiting: dict[str, QuantizedLayer], reason: str) -> dict[str, QuantizedLayer]:
    """Let layers begin with what they have; none waits then."""
    for layer in waiting.values():
        layer.weight_quantizer.stop_awaiting()
    logger.warning("%d layers begin with the start 'clip', for theirs needs data: %s", len(waiting), reason)
    return {}
