"""When quantization happens during a fit."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from qat.spec import NamedArguments

__all__ = ["QuantizationSchedule"]


class QuantizationSchedule(NamedArguments):
    """When quantization happens during a fit; steps are optimizer steps (``trainer.global_step``).

    Validation is never observed and always fake-quantized: it judges what would be served, also during a float start.

    Raises:
        SpecError: a number is below 0, or ``observe_until`` does not come after ``observe_from``.

    >>> schedule = QuantizationSchedule(start_step=10, observe_from=5, observe_until=20)
    >>> [schedule.observes(step) for step in (4, 5, 19, 20)]
    [False, True, True, False]
    """

    start_step: int = Field(default=0, ge=0)
    """Fake quantization begins at this step; before it the model trains in float."""
    observe_from: int | None = Field(default=None, ge=0)
    """Activation observers record from this step on; none: never during training."""
    observe_until: int | None = Field(default=None, ge=0)
    """Activation observers stop at this step; none: they go on to the end."""
    hold_scales_from: int | None = Field(default=None, ge=0)
    """From this step on, learned scales and ranges stay as they are, and the weights settle to them; none: never."""
    calibration_batches: int = Field(default=16, ge=0)
    """Batches for the calibration before the first step; recipes use as many before freezing. Only with activations,
    or with weights whose start needs data."""

    @model_validator(mode="after")
    def _window_is_ordered(self) -> Self:
        if self.observe_until is not None and (self.observe_from is None or self.observe_until <= self.observe_from):
            raise ValueError(f"observe_until ({self.observe_until}) must come after observe_from ({self.observe_from})")
        return self

    def observes(self, step: int) -> bool:
        """Whether observers record at this step."""
        return self.observe_from is not None and self.observe_from <= step < (self.observe_until or step + 1)

    def holds(self, step: int) -> bool:
        """Whether learned scales and ranges stay as they are at this step."""
        return self.hold_scales_from is not None and step >= self.hold_scales_from

    def sets_scales(self, step: int) -> bool:
        """Whether a run that begins at this step without activation scales will have them once it quantizes."""
        if self.calibration_batches > 0 or self.observe_from is None:
            return self.calibration_batches > 0
        in_time = self.observe_from <= max(step, self.start_step)
        return in_time and (self.observe_until is None or step < self.observe_until)
