"""Scales of activations, in two or three passes over the batches.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from qat.calibration.report import ActivationReport, CalibrationReport
from qat.checks import loses_scales
from qat.distributed import refuse_sharded, reshard, sharded, together_between_runs
from qat.errors import CalibrationError, listed
from qat.hosts import get_target
from qat.layers import QuantizedLayer, quantized_layers
from qat.output_errors import OutputErrors, SideError
from qat.preparation import prepared_as
from qat.probing import Readers, kept_modes, run_batch, together
from qat.progress import counted
from qat.quantizers.activation import ActivationQuantizer
from qat.runs import note_runs, runs, stop_watch
from qat.serving import ServedRun, as_served, mark_arriving
from qat.tensors import map_tensors

__all__ = ["calibrate_activations"]

logger = logging.getLogger("qat")


def calibrate_activations(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None, progress: bool
) -> CalibrationReport:
    """Set the scales of a prepared model's activations, and say which layers keep float ones; see `qat.calibrate`."""
    layers = {name: layer for name, layer in quantized_layers(model) if any(layer.activation_quantizers())}
    if not layers:
        return CalibrationReport(0, {}, ())
    before = [(q, copy.deepcopy(q.state_dict())) for layer in layers.values() for q in layer.activation_quantizers()]
    with kept_modes(model), torch.no_grad():
        model.eval()
        if outputs := any(layer.output_quantizer is not None for layer in layers.values()):
            refuse_sharded(model, "qat.calibrate of a model that quantizes outputs (target 'transformers' does not)")
        try:
            seen = counted(batches, "calibrating", progress)
            count, kept, groups, hazards = _observe(model, layers, seen, forward)
            fresh = [n for n, v in layers.items() if not all(q.initialized for q in v.activation_quantizers())]
            for layer in layers.values():
                for quantizer in layer.activation_quantizers():
                    quantizer.refresh()
            with _float_activations(model, layers), OutputErrors(layers) as errors:
                for number, batch in enumerate(counted(kept, "errors of layers", progress)):
                    run_batch(model, batch, number, forward)
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
        stack.callback(reshard, model)
        for _, layer in quantized_layers(model):  # those with float activations alone are not reached either
            stack.callback(setattr, layer, "reached", layer.reached)
        for layer in layers.values():
            stack.callback(setattr, layer, "mode", layer.mode)
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
    shards = sharded(model)
    count, kept, readers = 0, [], Readers(layers, get_target(prepared_as(model).target).format.call_hazard)
    with ExitStack() as stack, together_between_runs(model), _float_activations(model, layers, observe=True):
        stack.callback(readers.groups)
        for batch in batches:
            run_batch(model, batch, count, forward)
            with together() if shards else nullcontext():
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
                run_batch(model, batch, number, forward, "the model, frozen,")
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
            kept_float[name] = (
                f"optimum-quanto computes {operation!r} of quantized outputs otherwise than of floats; target "
                "'transformers' leaves outputs float"
            )


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
