"""`calibrate`: scales for activations, and starts of weights that need it, from data.

Starts come first (`qat.starting`), since scales of activations follow the weights. Scales take two or three passes.
The first runs the batches with activations left float, while observers record. Then the rule takes a scale from each
observer. The second measures how far off each layer's output will be (`qat.output_errors`): a layer that cannot bear it
keeps float activations. Where layers quantize their outputs, a third pass runs the batches through the model *as it
will be served* (`qat.serving`). It finds layers whose quantized outputs meet an operation that would do something else
to them: they keep float activations too. And it notes which inputs arrive already quantized. Those layers are marked,
so that training skips their input quantization too. All passes need all batches, which wait on the CPU.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qat.checks import loses_scales
from qat.errors import CalibrationError, StateError, listed
from qat.hosts import get_target
from qat.layers import QuantizedLayer, quantized_layers
from qat.moments import BUDGET
from qat.output_errors import OutputErrors, SideError
from qat.preparation import prepare, prepared_as
from qat.probing import Readers, kept_modes, run, running
from qat.progress import counted
from qat.quantizers import Algorithm
from qat.quantizers.activation import ActivationQuantizer
from qat.runs import note_runs, runs, stop_watch
from qat.serving import ServedRun, as_served, mark_arriving, snapshot
from qat.spec import QuantSpec
from qat.starting import StartReport, awaiting, find_starts, in_float
from qat.tensors import map_tensors, model_device

__all__ = ["ActivationReport", "CalibrationReport", "calibrate", "calibrate_parts"]

logger = logging.getLogger("qat")


@dataclass(frozen=True)
class ActivationReport:
    """What calibration found of one input or output."""

    scale: float
    error: float
    """Squared error of the layer's output by quantizing this one alone, relative to the output's squares, measured."""
    saturated: float
    """Share of its elements that lie beyond the largest code."""
    utilization: float
    """Share of the codes' range that the largest magnitude reaches."""
    calls: int
    """How often it was computed."""


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found; prints as a summary, `table` as a line for each layer."""

    batches: int
    layers: dict[str, tuple[ActivationReport, ...]]
    """Layer name to its input and, if that is quantized, its output."""
    arriving: tuple[str, ...]
    """Layers whose input comes quantized from its producer: it has that scale, and no further error."""
    kept_float: dict[str, str] = field(default_factory=dict)
    """Layers whose inputs and outputs stay float, and why."""
    starts: dict[str, StartReport] = field(default_factory=dict)
    """Layer name to what its weight begins with, where data decided that."""

    def __str__(self) -> str:
        if not self.layers and not self.starts:
            return "nothing to calibrate: no layer has quantized activations, and no weight waits for its start"
        starts = Counter(found.start for found in self.starts.values())
        of_weights = "starts of weights: " + ", ".join(f"{n} {name}" for name, n in sorted(starts.items()))
        return "; ".join([of_weights] * bool(starts) + [self._of_activations()] * bool(self.layers))

    def _of_activations(self) -> str:
        kept = f"; {len(self.kept_float)} layers keep float activations" if self.kept_float else ""
        arriving = f"{len(self.arriving)} inputs arrive quantized"
        return f"calibrated {len(self.layers)} layers on {self.batches} batches; {arriving}{kept}"

    @property
    def scales(self) -> dict[str, tuple[float, float | None]]:
        """Layer name to its input and output scale."""
        return {name: (x.scale, y[0].scale if y else None) for name, (x, *y) in self.layers.items()}

    def table(self) -> str:
        """A line for each layer: scale, error, saturation and utilization of its input and its output.

        Before them, where data decided it, what each weight begins with: the relative squared error of the output by
        min-max weights and by the start that was chosen.
        """
        width = max(map(len, (*self.layers, *self.starts)), default=0)
        lines = [f"{'weight':{width}}  {'start':6}  {'min-max':>8}  {'error':>8}"] * bool(self.starts)
        lines += [f"{n:{width}}  {s.start:6}  {s.before:8.1e}  {s.after:8.1e}" for n, s in self.starts.items()]
        if not self.layers:
            return "\n".join(lines)
        lines += [f"{'layer':{width}}  {'':6}  {'scale':>9}  {'error':>8}  {'beyond':>8}  {'used':>5}    calls"]
        for name, sides in self.layers.items():
            for side, found in zip(("input", "output"), sides, strict=False):
                note = "  float" if name in self.kept_float else ""
                note = "  arrives quantized" if side == "input" and name in self.arriving else note
                lines.append(
                    f"{name:{width}}  {side:6}  {found.scale:9.3g}  {found.error:8.1e}  {found.saturated:8.1e}  "
                    f"{found.utilization:5.0%}  {found.calls:7}{note}"
                )
        return "\n".join(lines)


@torch.inference_mode(False)  # in which scales and parameters would be tensors that no training can use
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    spec: QuantSpec | None = None,
    target: str | None = None,
    algorithm: Algorithm | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = False,
) -> CalibrationReport:
    """Set the scale of every quantized activation from ``batches``. In place; without gradients; in evaluation mode.

    Weights whose start needs data (`qat.LearnedAffine.start`) get it first, unless they have it or training has begun.

    With a ``spec`` the model is a float one and is prepared first. Then `qat.freeze` and `qat.export` give a quantized
    model without training. The first calibration of a model also decides which layers keep float activations: those
    whose output would be further off than the rule's ``largest_error`` (`qat.Best`), and those whose quantized output
    would meet an operation that does something else to it. Later ones leave that as it was trained.

    Args:
        model: a prepared model; with ``spec`` a float one.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments for
            ``model(...)``, on any device; with ``forward`` anything. Under ``torch.distributed`` each rank brings its
            own share, and the ranges are reduced; where the batches of one fail, all raise and name its rank.
        spec: what to quantize, as in `qat.prepare`.
        target: who will load the export, as in `qat.prepare`; only with ``spec``.
        algorithm: how scales of weights are found, as in `qat.prepare`; only with ``spec``.
        forward: runs the model once for a batch, ``forward(model, batch)``: a generate loop, a pipeline that holds the
            model, or what makes its inputs. It is called twice for each batch, a third time where outputs are
            quantized, and once more for each round of layers whose weights get a start, or for each time that layers
            turn out to need float outputs. What it returns is not used.
        progress: show a bar on the standard error stream.

    Raises:
        StateError: the model was not prepared, or was prepared and a ``spec`` is given.
        SpecError, TargetError: see `qat.prepare`.
        CalibrationError: there are no batches, the model cannot run one, one gives inf or NaN, or a layer was never
            reached by any of them; or an operation between layers would do something else to quantized tensors, and the
            layer before it was trained with them. The scales are as before then, and a float model is a float model
            again.

    >>> from qat import QuantSpec, freeze
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> print(calibrate(model, [torch.ones(2, 16)], spec=QuantSpec(activations="int8")))
    calibrated 2 layers on 1 batches; 1 inputs arrive quantized
    >>> print(freeze(model))
    froze 2 layers (int8) for target 'quanto', served in bfloat16
    """
    if isinstance(batches, Mapping | torch.Tensor | str) or not isinstance(batches, Iterable):
        raise CalibrationError(f"batches: must be several batches, got one {type(batches).__name__}: pass [batch]")
    if spec is None:
        for name, value in (("target", target), ("algorithm", algorithm)):
            if value is not None:
                raise StateError(f"{name}: belongs to a spec, got {value!r} without one: pass spec=, or leave it out")
        prepared_as(model)
        return calibrate_parts(model, batches, forward, progress)
    restore = snapshot(model)
    try:
        prepare(model, spec, algorithm=algorithm, target=target or "quanto")
        return calibrate_parts(model, batches, forward, progress)
    except BaseException:
        restore()
        raise


def calibrate_parts(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = False,
    *,
    starts: bool = True,
    activations: bool = True,
) -> CalibrationReport:
    """`calibrate` for a prepared model, or only a part of it; without both parts it shows that batches can be run."""
    waiting = awaiting(model) if starts else {}
    if not waiting and activations:
        return _calibrate_activations(model, batches, forward, progress)
    kept = [batch if forward else map_tensors(torch.Tensor.cpu, batch) for batch in batches]

    def go(count: int | None) -> int:
        chosen = kept[:count]
        for number, batch in enumerate(counted(chosen, "inputs of layers", progress and count is None)):
            _run(model, batch, number, forward)
        return len(chosen)

    try:
        with kept_modes(model), torch.no_grad(), in_float(model.eval()):
            if not waiting:
                return CalibrationReport(go(None), {}, ())
            started = find_starts(waiting, go, BUDGET)
    finally:
        stop_watch()  # which a failure or an interrupt may have left
    try:
        started.apply()
        report = CalibrationReport(0, {}, ())
        if activations:
            report = _calibrate_activations(model, kept, forward, progress)
    except BaseException:
        started.undo()
        raise
    return replace(report, batches=len(kept), starts=started.reports)


def _calibrate_activations(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None, progress: bool
) -> CalibrationReport:
    layers = {name: layer for name, layer in quantized_layers(model) if layer.input_quantizer is not None}
    if not layers:
        return CalibrationReport(0, {}, ())
    before = [(q, copy.deepcopy(q.state_dict())) for layer in layers.values() for q in layer.activation_quantizers()]
    with kept_modes(model), torch.no_grad():
        model.eval()
        outputs = any(layer.output_quantizer is not None for layer in layers.values())
        try:
            seen = counted(batches, "calibrating", progress)
            count, kept, groups, hazards = _observe(model, layers, seen, forward)
            fresh = [n for n, v in layers.items() if not all(q.initialized for q in v.activation_quantizers())]
            for layer in layers.values():
                for quantizer in layer.activation_quantizers():
                    quantizer.refresh()
            with _float_activations(model, layers), OutputErrors(layers) as errors:
                for number, batch in enumerate(counted(kept, "errors of layers", progress)):
                    _run(model, batch, number, forward)
            found = {n: tuple(map(_report, v.activation_quantizers(), errors.found(n))) for n, v in layers.items()}
            kept_float = {name: "left so before" for name, layer in layers.items() if layer.activation_qtype is None}
            for name in fresh:
                if reason := _unbearable(layers[name], found[name]):
                    kept_float[name] = reason
                    layers[name].keep_float_activations()
            for name, hazard in hazards.items():
                kept_float[name] = hazard
                layers[name].keep_float_activations()
            arriving: list[str] = []
            if outputs:  # else nothing leaves a layer quantized
                arriving, lost = _run_as_served(model, layers, kept, forward, fresh, progress)
                kept_float |= lost
            for name in arriving:  # which have their producer's scale now, and are not quantized again
                mine = SideError(0.0, 0.0)
                found[name] = (_report(next(layers[name].activation_quantizers()), mine), *found[name][1:])
            _share(groups)
        except BaseException:
            stop_watch()  # which an interrupt may have left
            for quantizer, state in before:  # a part of the batches makes no scale
                quantizer.load_state_dict(state)
            raise
    for reason in dict.fromkeys(kept_float.values()):
        names = [name for name, other in kept_float.items() if other == reason]
        logger.warning("%d layers keep float activations (%s): %s", len(names), reason, listed(names, 8))
    return CalibrationReport(count, found, tuple(arriving), kept_float)


@contextmanager
def _float_activations(model: nn.Module, layers: Mapping[str, QuantizedLayer], observe: bool = False) -> Iterator[None]:
    """Run layers with quantized weights and float activations; what runs so is no run as it will be served."""
    with ExitStack() as stack:
        stack.callback(note_runs, model, runs(model))
        for layer in layers.values():
            stack.callback(setattr, layer, "mode", layer.mode)
            stack.callback(setattr, layer, "reached", layer.reached)
            layer.mode = layer.mode._replace(activations=False, observe=observe)
        yield


def _observe(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
) -> tuple[int, list[Any], list[list[ActivationQuantizer]], dict[str, str]]:
    quantizers = {name: tuple(layer.activation_quantizers()) for name, layer in layers.items()}
    for quantizer in sum(quantizers.values(), ()):
        quantizer.observer.reset()
        quantizer.arrives_quantized = False
    count, kept, readers = 0, [], Readers(layers, get_target(prepared_as(model).target).format.call_hazard)
    with ExitStack() as stack, _together(), _float_activations(model, layers, observe=True):
        stack.callback(readers.groups)
        for batch in batches:
            _run(model, batch, count, forward)
            _require_finite(quantizers, count)
            count += 1
            kept.append(batch if forward else map_tensors(torch.Tensor.cpu, batch))
        if count == 0:
            raise CalibrationError(
                "batches: calibration needs at least one batch, got none: pass some training batches"
            )
    groups = _join(layers, readers.groups())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for quantizer in sum(quantizers.values(), ()):
            quantizer.observer.reduce()
    missed = [name for name, (first, *_) in quantizers.items() if not bool(first.observer.initialized)]
    if missed:
        raise CalibrationError(
            f"batches: {len(missed)} layers were never reached in {count} batches (first: {missed[:3]}): pass batches "
            "that use them, or exclude those layers in the spec"
        )
    return count, kept, groups, readers.hazards


@contextmanager
def _together() -> Iterator[None]:
    """Where one of several processes fails within, all raise and name it: else the others would wait for it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, None if failed is None else str(failed) or type(failed).__name__)
    for rank, fault in enumerate(told):
        if fault is not None:
            raise CalibrationError(f"rank {rank}: {fault}") from failed


def _join(layers: Mapping[str, QuantizedLayer], groups: list[list[str]]) -> list[list[ActivationQuantizer]]:
    """Let layers that read one tensor see the same, so that they get one scale; their input quantizers."""
    joined = []
    for names in groups:
        quantizers = [q for name in names if (q := layers[name].input_quantizer) is not None]
        if len({(q.qtype, q.dtype, q.rule) for q in quantizers}) == 1:
            first, *others = (quantizer.observer for quantizer in quantizers)
            for other in others:
                first.merge(other)
            first.calls //= len(names)
            for other in others:
                other.load_state_dict(first.state_dict())
            joined.append(quantizers)
    return joined


def _share(groups: list[list[ActivationQuantizer]]) -> None:
    """Let those with one scale, which nothing learns, share it and with it the codes."""
    for quantizers in groups:
        static = [q for q in quantizers if q.used and q.learned_scale() is None]
        if len(static) > 1 and all(torch.equal(static[0].scale, other.scale) for other in static[1:]):
            static[0].share(static[1:])


def _run(
    model: nn.Module, batch: Any, number: int, forward: Callable[[nn.Module, Any], Any] | None, served: str = ""
) -> None:
    with running(number, "" if forward is None else "mend the function forward", f"the model{served}"):
        if forward is not None:
            forward(model, copy.copy(batch))  # which may take things out of it
        else:
            device = model_device(model)
            run(model, map_tensors(lambda x: x.to(device), batch))


def _run_as_served(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: list[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    fresh: list[str],
    progress: bool,
) -> tuple[list[str], dict[str, str]]:
    """Mark the layers whose input arrives quantized, and name them; those that must keep float activations, and why."""
    kept_float: dict[str, str] = {}
    while True:
        with as_served(model), ServedRun(model, layers) as served:
            for number, batch in enumerate(counted(batches, "as it is served", progress)):
                _run(model, batch, number, forward, ", frozen,")
                if served.lost:
                    break
        lost = served.lost_anywhere()
        if not lost:
            return mark_arriving(layers, served.scales), kept_float
        for name, operation in lost.items():
            if name not in fresh:
                raise CalibrationError(
                    f"model: the output of layer {name!r} meets the operation {operation!r}, which quanto carries out "
                    "otherwise on quantized activations than training does: prepare and calibrate the float model, so "
                    "that the layer keeps float activations, or exclude it"
                )
            layers[name].keep_float_activations()
            kept_float[name] = f"quanto carries out {operation!r} otherwise on their quantized outputs"


def _require_finite(quantizers: Mapping[str, tuple[ActivationQuantizer, ...]], batch: int) -> None:
    """Raise `CalibrationError` where a batch gave inf or NaN; one wait for the device a batch."""
    flags = [(name, quantizer.observer.nonfinite) for name, pair in quantizers.items() for quantizer in pair]
    found = torch.stack([flag.cpu() if len({f.device for _, f in flags}) > 1 else flag for _, flag in flags]).tolist()
    if any(found):
        name = next(name for (name, _), bad in zip(flags, found, strict=True) if bad)
        raise CalibrationError(
            f"batches: batch {batch} gives inf or NaN, or numbers beyond 2^24, in the activations of layer {name!r}: "
            "check the batch and the model; no scale was changed"
        )


@torch.no_grad()
def _report(quantizer: ActivationQuantizer, found: SideError) -> ActivationReport:
    observer, scale = quantizer.observer, quantizer.serving_scale()
    used = min(1.0, float(observer.largest / (scale * quantizer.qtype.steps)))
    return ActivationReport(float(scale), found.error, found.saturated, used, int(observer.calls))


def _unbearable(layer: QuantizedLayer, found: tuple[ActivationReport, ...]) -> str:
    """Why the activations of a layer must stay float; empty where they need not."""
    assert layer.input_quantizer is not None
    if not bool(layer.input_quantizer.observer.largest):
        return "their inputs were zero in all batches, which says nothing of a scale"
    if loses_scales(layer, 2**-8):  # as bfloat16 rounds
        return "float16 cannot hold the product of their scales; serving in bfloat16 can"
    if sum(side.error for side in found) <= layer.input_quantizer.rule.largest_error:
        return ""
    return "their outputs would be too far off; qat.fold_outliers before may help"
