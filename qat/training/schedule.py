"""When quantization happens during a fit, and how the learning rate goes there."""

from __future__ import annotations

import logging
from math import cos, isfinite, pi
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, get_args

from pydantic import Field, model_validator

from qat.errors import TrainingError, meant, shown
from qat.spec import NamedArguments, WeightType

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["FAULTS_BEYOND", "Decay", "QuantizationSchedule", "planned_steps", "rate_factor"]

logger = logging.getLogger("qat")

Decay: TypeAlias = Literal["cosine", "linear", "constant"]
"""How a learning rate goes from its peak to the last step."""


FAULTS_BEYOND = {
    "first_weights_until": "nothing could be frozen",
    "start_step": "nothing trains quantized",
    "hold_scales_from": "no scale is held",
    "observe_from": "nothing is observed",
}
"""What becomes of a fit that ends before a step of a schedule."""


def rate_factor(step: int, steps: float, warmup: int | None = None, decay: Decay = "cosine") -> float:
    """The learning rate of an optimizer step, as a share of its peak: linear warm-up, then decay to zero.

    ``(step + 1) / warmup`` in the warm-up. After it, with p the share of the other steps that are done: cosine is
    ``(1 + cos(pi p)) / 2`` (Loshchilov and Hutter 2017, eq. 5, https://arxiv.org/abs/1608.03983), linear ``1 - p``.
    p would reach 1 after the last step, so that each step moves something. A plain loop gives it to
    ``torch.optim.lr_scheduler.LambdaLR``.

    Args:
        step: optimizer steps done before, from 0.
        steps: of the whole training; infinity only if ``warmup`` is given and ``decay`` is constant.
        warmup: steps of the warm-up; None: a twentieth of all.
        decay: after the warm-up.

    Raises:
        TrainingError: ``decay`` is no such word, or ``steps`` is not known or below 1.

    >>> [round(rate_factor(step, 10, warmup=2), 2) for step in range(11)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04, 0.0]
    """
    if decay not in get_args(Decay):
        words = get_args(Decay)
        raise TrainingError(
            f"decay: must be one of {', '.join(words)}, got {shown(decay)}: choose one{meant(decay, words)}"
        )
    if (decay != "constant" or warmup is None) and not (isfinite(steps) and steps >= 1):
        raise TrainingError(
            f"decay: {decay!r} with warmup={warmup} needs the number of steps, got {steps}: set max_steps or "
            "max_epochs of the Trainer, or use decay='constant' with a number of steps for the warm-up"
        )
    warmup = int(steps) // 20 if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    if decay == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    return 1.0 - done if decay == "linear" else (1.0 + cos(pi * done)) / 2


def planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of a whole fit; None where nothing limits them."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if isfinite(steps) and steps >= 0 else None


class QuantizationSchedule(NamedArguments):
    """When quantization happens during a fit; steps are optimizer steps (``trainer.global_step``).

    Validation is never observed and always fake-quantized: it judges what would be served, also during a float start.
    While ``first_weights`` lasts, it judges those codes.

    Raises:
        SpecError: a number is out of its range, or two settings exclude each other.

    >>> schedule = QuantizationSchedule(start_step=10, observe_from=5, observe_until=20)
    >>> [schedule.observes(step) for step in (4, 5, 19, 20)]
    [False, True, True, False]
    """

    start_step: int = Field(default=0, ge=0, lt=2**31)
    """Fake quantization begins at this step, and starts that need data are found; before it the model is float."""
    observe_from: int | None = Field(default=None, ge=0, lt=2**31)
    """Activation observers record from this step on; none: never during training."""
    observe_until: int | None = Field(default=None, ge=0, lt=2**31)
    """Activation observers stop at this step; none: they go on to the end."""
    hold_scales_from: int | None = Field(default=None, ge=0, lt=2**31)
    """From this step on, learned scales and ranges stay as they are, and the weights settle to them; none: never."""
    first_weights: WeightType | None = None
    """Layers of fewer bits begin with this type, such as int2 ones with int4, and change to theirs later; none: not."""
    first_weights_until: int | None = Field(default=None, ge=1, lt=2**31)
    """At this step they change: ranges start again from the weights as they are then."""
    cage: float = Field(default=0.0, ge=0)
    """Strength of the pull of weights to their quantized values (CAGE), in learning rates; 0: none. See numerics.md."""
    cage_from: float = Field(default=0.8, ge=0, lt=1)
    """Share of the steps after which the pull rises from 0; it has its full strength in the last step."""
    calibration_batches: int = Field(default=16, ge=0, lt=2**31)
    """Batches for the calibration before the first step; recipes use as many before freezing. Only with activations,
    or with weights whose start needs data: for these, as many where quantization to a type begins."""

    @model_validator(mode="after")
    def _window_is_ordered(self) -> Self:
        if self.observe_until is not None and (self.observe_from is None or self.observe_until <= self.observe_from):
            raise ValueError(f"observe_until ({self.observe_until}) must come after observe_from ({self.observe_from})")
        return self

    @model_validator(mode="after")
    def _first_weights_have_their_steps(self) -> Self:
        until = self.first_weights_until
        if (self.first_weights is None) != (until is None):
            raise ValueError("first_weights and first_weights_until need each other: give both, or leave both out")
        if until is not None and until <= self.start_step:
            raise ValueError(f"first_weights_until ({until}) must come after start_step ({self.start_step})")
        if until is not None and self.hold_scales_from is not None and self.hold_scales_from <= until:
            raise ValueError(
                f"hold_scales_from ({self.hold_scales_from}) must come after first_weights_until ({until}), where "
                "ranges start again"
            )
        return self

    def observes(self, step: int) -> bool:
        """Whether observers record at this step."""
        return self.observe_from is not None and self.observe_from <= step < (self.observe_until or step + 1)

    def takes_scales(self, before: int, step: int) -> bool:
        """Whether scales are taken anew from observers between two steps: ever more rarely, since ever less changes.

        Several optimizers raise Lightning's count by several at a time.

        >>> schedule = QuantizationSchedule(observe_from=100)
        >>> [step - 100 for step in range(101, 180) if schedule.takes_scales(step - 1, step)][12:]
        [13, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64, 72]
        """
        seen, earlier = (max(0, n - (self.observe_from or 0)) for n in (step, before))
        every = 1 << max(0, seen.bit_length() - 4)
        return seen // every != earlier // every

    def holds(self, step: int) -> bool:
        """Whether learned scales and ranges stay as they are at this step."""
        return self.hold_scales_from is not None and step >= self.hold_scales_from

    def begins_with_first_weights(self, step: int) -> bool:
        """Whether layers have the type ``first_weights`` at this step."""
        return self.first_weights_until is not None and step < self.first_weights_until

    def require_within(self, steps: int | None) -> None:
        """Say what would begin after the last of ``steps`` (None: unknown), as in the first part of a run.

        Raises:
            TrainingError: ``first_weights_until`` would: nothing could be frozen.
        """
        for name, fault in FAULTS_BEYOND.items():
            value = getattr(self, name)
            if steps is None or not value or value < steps:
                continue
            if name == "first_weights_until":
                raise TrainingError(
                    f"schedule: {name}={value} must come before the fit ends, at step {steps}: {fault}; lower it, "
                    "or train for more steps"
                )
            logger.warning("schedule: %s=%s comes after the fit's end, at step %s: %s in it", name, value, steps, fault)

    @property
    def settled_from(self) -> int:
        """The first step from which masters and ranges are of one kind to the end, so that they can be averaged."""
        return max(self.start_step, self.first_weights_until or 0)

    def cage_at(self, step: int, steps: int) -> float:
        """Strength of the pull after the optimizer step number ``step``, from 0, of ``steps`` in all.

        >>> schedule = QuantizationSchedule(cage=10, cage_from=0.5)
        >>> [schedule.cage_at(step, 8) for step in (3, 4, 5, 7)]
        [0.0, 2.5, 5.0, 10.0]
        """
        begin = self.cage_from * steps
        return self.cage * max(0.0, (step + 1 - begin) / (steps - begin))

    def sets_scales(self, step: int) -> bool:
        """Whether a run that begins at this step without activation scales will have them once it quantizes."""
        if self.calibration_batches > 0 or self.observe_from is None:
            return self.calibration_batches > 0
        in_time = self.observe_from <= max(step, self.start_step)
        return in_time and (self.observe_until is None or step < self.observe_until)
