"""What an arm of `benchmark_quality` does at some steps of a run, as the callback of Lightning does it in a fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import qat
from qat.layers import Mode, quantized_layers
from qat.optimizers import learned_ranges
from qat.training.annealing import begin_with, end_first_type

__all__ = ["Timetable"]


class Timetable:
    """A schedule of one run; each share is of all its steps.

    Args:
        model: prepared, its starts not yet found.
        inputs: batches to find starts from.
        steps: of the run.
        delay: share that trains in float first.
        first: share that quantizes to int4 first.
        hold: share at the end in which learned ranges stay.
        average: share at the end whose weights and ranges are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: list[Any],
        steps: int,
        *,
        delay: float = 0.0,
        first: float = 0.0,
        hold: float = 0.0,
        average: float = 0.0,
    ) -> None:
        self._model, self._inputs = model, inputs
        self._begin, self._change = round(delay * steps), round(first * steps)
        self._hold = steps - round(hold * steps)
        self._average = steps - round(average * steps)
        self._held: dict[nn.Parameter, Tensor] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._steps = steps

    def start(self, data: bool) -> None:
        """Before the first step; ``data``: the start needs batches."""
        self._data = data
        if self._change:
            begin_with(self._model, "int4")
        if self._begin:
            self._quantize(False)
        else:
            self._find()

    def before(self, step: int, optimizer: Optimizer) -> None:
        """Before an optimizer step, from 0."""
        if step == self._begin != 0:
            self._quantize(True)
            self._find()
        if step == self._change != 0:
            end_first_type(self._model, [optimizer])
            self._find()
        if step == self._hold:
            own = learned_ranges(self._model)
            self._held = {p: p.detach().clone() for p in self._model.parameters() if id(p) in own}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """After an optimizer step; after the last one the averages become the model."""
        for parameter, value in self._held.items():
            parameter.copy_(value)
        if step < self._average:
            return
        for parameter in filter(lambda p: p.requires_grad, self._model.parameters()):
            self._sums[parameter] = self._sums.get(parameter, 0) + parameter
        if step == self._steps - 1:
            for parameter, total in self._sums.items():
                parameter.copy_(total / (self._steps - self._average))

    def _quantize(self, on: bool) -> None:
        for _, layer in quantized_layers(self._model):
            layer.mode = Mode(weights=on)

    def _find(self) -> None:
        if self._data:
            qat.calibrate(self._model, self._inputs)
