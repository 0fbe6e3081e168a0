"""When an arm of `benchmark_quality` does what, in shares of its steps; `qat.QuantizationSteps` does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qat

__all__ = ["Average", "schedule_of"]


def schedule_of(steps: int, cage: float, *, delay: float = 0.0, first: float = 0.0, hold: float = 0.0) -> Any:
    """A schedule of ``steps``.

    Args:
        steps: of the run.
        cage: strength of the pull to quantized values.
        delay: share that trains in float first.
        first: share that quantizes to int4 first.
        hold: share at the end in which learned ranges stay.
    """
    fields: dict[str, Any] = {"start_step": round(delay * steps), "cage": cage}
    if first:
        fields |= {"first_weights": "int4", "first_weights_until": round(first * steps)}
    if hold:
        fields["hold_scales_from"] = steps - round(hold * steps)
    return qat.QuantizationSchedule(**fields)


class Average:
    """The mean of weights and ranges over the last ``share`` of ``steps``, which becomes the model after the last."""

    def __init__(self, model: nn.Module, steps: int, share: float) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._steps, self._begin = steps, steps - round(share * steps)
        self._sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """After an optimizer step, from 0."""
        if step < self._begin:
            return
        for parameter in self._parameters:
            self._sums[parameter] = self._sums.get(parameter, 0) + parameter
        if step == self._steps - 1:
            for parameter, total in self._sums.items():
                parameter.copy_(total / (self._steps - self._begin))
