"""When quantization happens during a fit."""

from __future__ import annotations

from qat.config import ScheduleSettings

__all__ = ["QuantizationSchedule"]


class QuantizationSchedule(ScheduleSettings):
    """When quantization happens during a fit; steps are optimizer steps (``trainer.global_step``).

    Validation is never observed and always fake-quantized: it judges what would be served, also during a float start.
    """

    def observes(self, step: int) -> bool:
        """Whether observers record at this step."""
        return self.observe_from is not None and self.observe_from <= step < (self.observe_until or step + 1)

    def sets_scales(self, step: int) -> bool:
        """Whether a run that begins at this step without activation scales will have them once it quantizes."""
        if self.calibration_batches > 0 or self.observe_from is None:
            return self.calibration_batches > 0
        in_time = self.observe_from <= max(step, self.start_step)
        return in_time and (self.observe_until is None or step < self.observe_until)
