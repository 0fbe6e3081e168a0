"""Starts of weights that need data: the model runs in float, and each layer's range begins where its output asks for.

Nothing changes before all layers have their start: the inputs of every layer are those of the float model, and a
failure leaves the model as it was. Until then starts wait on the CPU, with a compensated weight a layer in the dtype
of its master.

Each rank runs its own batches. Second moments are summed over ranks (`qat.moments`), and weights are equal, so all
ranks find equal starts and compensated weights, to which all their batches have told.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.distributed import gathered, reshard, together_between_runs
from qat.errors import CalibrationError, listed
from qat.layers import QuantizedLayer, quantized_layers
from qat.moments import Moments, rounds
from qat.probing import Readers, several_processes
from qat.runs import note_runs, runs
from qat.starts import DATA_STARTS, RANGE_STARTS, Ends, Start, output_error
from qat.tensors import is_sharded

__all__ = ["StartReport", "Started", "awaiting", "find_starts", "in_float"]

logger = logging.getLogger("qat")


@dataclass(frozen=True)
class StartReport:
    """What one layer's weight begins with."""

    start: str
    """Name of the start that was chosen; ``clip`` where no batch reached the layer."""
    before: float
    """Squared error of the layer's output by min-max weights, relative to the output's squares; NaN: unreached."""
    after: float
    """The same by this start, on the same batches."""


def awaiting(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers whose weight waits for data to start with; none once training has come to it.

    `qat.optimizers` sees the steps of torch's optimizers. Of others, moved ranges tell.
    """
    layers = quantized_layers(model)
    waiting = {name: layer for name, layer in layers if layer.awaited_start() is not None}
    moves = (p.detach() for layer in waiting.values() for p in layer.weight_quantizer.parameters() if not p.is_meta)
    return {} if any(bool(p.any()) for p in moves) else waiting


class Started:
    """Starts that were found: `apply` gives them to their layers, `undo` takes them back."""

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self._layers = layers
        self._found: dict[str, tuple[Ends, Tensor | None]] = {}
        self._before: dict[str, dict[str, Tensor]] = {}
        self.reports: dict[str, StartReport] = {}
        self.unreached: list[str] = []

    @torch.no_grad()
    def find(self, name: str, moments: Tensor | None) -> None:
        """Find the start of one layer."""
        with gathered(self._layers[name]):
            self._find(name, moments)

    def _find(self, name: str, moments: Tensor | None) -> None:
        layer = self._layers[name]
        quantizer, weight = layer.weight_quantizer, layer.effective_weight(layer).detach()
        if moments is None:
            self.reports[name] = StartReport("clip", math.nan, math.nan)
            self.unreached.append(name)
            return
        wanted, arguments = quantizer.awaited_start(), (quantizer.qtype, quantizer.dtype)
        assert wanted is not None
        wanted = wanted if layer.compensable(layer) is not None else "output"
        with torch.autocast(weight.device.type, enabled=False):
            start = DATA_STARTS[wanted](weight, *arguments, moments)
            minmax = Start("minmax", RANGE_STARTS["minmax"](weight, *arguments), weight)
            before, after = (output_error(one, weight, *arguments, moments) for one in (minmax, start))
            rows = weight.float()
            squares = float(((rows @ moments) * rows).sum(dtype=torch.float64))
        self.reports[name] = StartReport(
            start.name, before / squares if squares else 0.0, after / squares if squares else 0.0
        )
        self._found[name] = start.ends, None if start.weight is weight else start.weight.cpu()

    @torch.no_grad()
    def apply(self) -> None:
        """Give all layers their starts; what they had before waits on the CPU."""
        for name, (ends, new) in self._found.items():
            quantizer = self._layers[name].weight_quantizer
            with gathered(self._layers[name]):
                before = {key: value.clone().cpu() for key, value in quantizer.state_dict().items()}
                quantizer.restart(*ends)
                quantizer.compensated |= new is not None  # or by an earlier start, of another type
                self._swap(name, new)
            self._before[name] = before
        fixed = [name for name, (_, new) in self._found.items() if new is not None and not self._trains(name)]
        if fixed:
            logger.warning(
                "the start has changed %d weights that do not train: save them with the model, since an adapter alone "
                "belongs to no other base (start='output' changes none): %s",
                len(fixed),
                listed(fixed, 4),
            )
        if self.unreached:
            logger.warning(
                "no batch reached %d layers, which keep the start 'clip': %s",
                len(self.unreached),
                listed(self.unreached, 8),
            )

    @torch.no_grad()
    def undo(self) -> None:
        """Give all layers back what they had before."""
        for name, state in self._before.items():
            with gathered(self._layers[name]):
                self._layers[name].weight_quantizer.load_state_dict(state)
                self._swap(name, self._found[name][1])
        self._before.clear()

    def _trains(self, name: str) -> bool:
        layer = self._layers[name]
        written: Any = layer.compensable(layer)
        storage = written.untyped_storage()._cdata
        return any(p.requires_grad and p.untyped_storage()._cdata == storage for p in layer.masters(layer).values())

    def _swap(self, name: str, new: Tensor | None) -> None:
        if new is not None:
            weight = self._layers[name].compensable(self._layers[name])
            assert weight is not None
            old = weight.cpu() if weight.device.type != "cpu" else weight.clone()
            weight.copy_(new)
            new.copy_(old)


def find_starts(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    run: Callable[[int | None], int],
    budget: int,
) -> Started:
    """The starts of ``layers`` of ``model``.

    ``run(n)`` runs the first n batches, or all, `in_float`; it says how many it ran. ``budget`` is the bytes of second
    moments that may be held at a time; one matrix always may.

    Raises:
        CalibrationError: there are no batches, one gives inf or NaN, or weights are sharded or tied; nothing was
            changed.
    """
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        weight = layer.effective_weight(layer)
        first = next(
            (one for p in layer.masters(layer).values() if (one := owners.setdefault(id(p), name)) != name), None
        )
        if first is not None:
            raise CalibrationError(
                f"model: layers {first!r} and {name!r} have one weight, tied after qat.prepare: a start for one would "
                "change the other; give each its own, or keep one float (exclude it)"
            )
        if weight.ndim != 2 or weight.is_meta or not (is_sharded(weight) or type(weight.detach()) is Tensor):
            raise CalibrationError(
                f"model: the weight of layer {name!r} is not whole on one device, so no start can be found for it: "
                "call qat.calibrate before the model is converted, or use a start that needs no data, such as 'clip'"
            )
    started = Started(layers)
    readers = Readers(layers)
    try:
        with together_between_runs(model):
            if not run(1):
                raise CalibrationError(
                    "batches: calibration needs at least one batch, got none: pass some training batches"
                )
    finally:
        groups = readers.groups()
    if several_processes():
        groups = []  # ranks whose batches tell different things would wait for each other
    sizes = {name: layer.like_weight(layer).shape[1] for name, layer in layers.items()}
    pending = list(rounds(sizes, groups, budget))
    while pending:
        units = pending.pop(0)
        with Moments(layers, units) as moments, together_between_runs(model):
            run(None)
        reshard(model)
        for unit in units:
            found = moments.take(unit)
            for name in unit:
                if name not in moments.apart:
                    started.find(name, found)
            del found
        pending += [*rounds({name: sizes[name] for name in moments.apart}, [], budget)]
    return started


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Nothing is quantized, observed or noted in this block."""
    with ExitStack() as stack:
        stack.callback(note_runs, model, runs(model))  # these are no runs as it will be served
        stack.callback(reshard, model)
        for _, layer in quantized_layers(model):
            stack.callback(setattr, layer, "mode", layer.mode)
            layer.mode = layer.mode._replace(weights=False, activations=False, observe=False)
        yield
