"""`calibrate`: scales for activations, from data.

Two passes. The first runs the batches with activations left float and lets the observers record. The second runs them
through a *frozen copy*, as the stock loader would run it, and notes which inputs arrive already quantized: the
output of a layer stays quantized through relu, view, dropout and the like, and the next layer then ignores its own
input scale and takes the producer's. Those layers are marked, so that training skips their input quantization too.
The second pass needs every batch again, since a batch may not reach every layer; so batches are kept until then.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qat.errors import CalibrationError
from qat.freezing import frozen_copy
from qat.layers import QuantizedLayer, quantized_layers
from qat.preparation import prepared_as
from qat.probing import kept_modes, run
from qat.runs import note_runs, runs
from qat.tensors import map_tensors

__all__ = ["CalibrationReport", "calibrate"]

logger = logging.getLogger("qat")


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found."""

    batches: int
    scales: dict[str, tuple[float, float | None]]
    """Layer name to its input and output scale."""
    arriving: tuple[str, ...]
    """Layers whose input comes quantized from its producer, so that their own input scale is not used."""

    def __str__(self) -> str:
        if not self.scales:
            return "nothing to calibrate: no layer has quantized activations"
        arriving = f"{len(self.arriving)} inputs arrive quantized"
        return f"calibrated {len(self.scales)} layers on {self.batches} batches; {arriving}"


def calibrate(model: nn.Module, batches: Iterable[Any]) -> CalibrationReport:
    """Set the scale of every quantized activation from ``batches``. In place; without gradients; in evaluation mode.

    Args:
        model: a prepared model.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments for
            ``model(...)``. Under ``torch.distributed`` each rank brings its own share, and the ranges are reduced.

    Raises:
        StateError: the model was not prepared.
        CalibrationError: there are no batches, or a layer was never reached by any of them.

    >>> from qat import QuantSpec, prepare
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> report = prepare(model, QuantSpec(activations="int8"))
    >>> print(calibrate(model, [torch.ones(2, 16)]))
    calibrated 2 layers on 1 batches; 1 inputs arrive quantized
    """
    prepared_as(model)
    layers = {name: layer for name, layer in quantized_layers(model) if layer.input_quantizer is not None}
    if not layers:
        return CalibrationReport(0, {}, ())
    before = [(q, copy.deepcopy(q.state_dict())) for layer in layers.values() for q in layer.activation_quantizers()]
    with kept_modes(model):
        model.eval()
        outputs = any(layer.output_quantizer is not None for layer in layers.values())
        try:
            count, kept = _observe(model, layers, batches, keep=outputs)
            arriving = _mark_arriving(model, layers, kept) if outputs else []  # else nothing leaves a layer quantized
        except BaseException:
            for quantizer, state in before:  # a part of the batches makes no scale
                quantizer.load_state_dict(state)
            raise
    scales = {name: _scales(layer) for name, layer in layers.items()}
    return CalibrationReport(count, scales, tuple(arriving))


@torch.no_grad()
def _observe(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], batches: Iterable[Any], *, keep: bool
) -> tuple[int, list[Any]]:
    quantizers = [quantizer for layer in layers.values() for quantizer in layer.activation_quantizers()]
    for quantizer in quantizers:
        quantizer.observer.reset()
        quantizer.arrives_quantized = False
    count, kept = 0, []
    with ExitStack() as stack:
        stack.callback(note_runs, model, runs(model))  # observing is no run as it will be served
        for layer in layers.values():
            stack.callback(setattr, layer, "mode", layer.mode)
            layer.mode = layer.mode._replace(activations=False, observe=True)
        for batch in batches:
            run(model, batch)
            count += 1
            if keep:
                kept.append(batch)
    if count == 0:
        raise CalibrationError("batches: calibration needs at least one batch, got none: pass some training batches")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for quantizer in quantizers:
            quantizer.observer.reduce()
    missed = [name for name, layer in layers.items() if not bool(layer.input_quantizer.observer.initialized)]  # type: ignore[union-attr]
    if missed:
        raise CalibrationError(
            f"batches: {len(missed)} layers were never reached in {count} batches (first: {missed[:3]}): pass batches "
            "that use them, or exclude those layers in the spec"
        )
    for quantizer in quantizers:
        quantizer.refresh()
    return count, kept


@torch.no_grad()
def _mark_arriving(model: nn.Module, layers: Mapping[str, QuantizedLayer], batches: list[Any]) -> list[str]:
    duplicate, dtype = frozen_copy(model), prepared_as(model).spec.torch_dtype
    seen: dict[str, list[torch.Tensor | None]] = {name: [] for name in layers}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            seen[name].append(getattr(x, "_scale", None))

    for name in layers:
        hook = functools.partial(note, name)
        duplicate.get_submodule(name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    for batch in batches:
        # As whoever serves the frozen model brings it: in the serving dtype.
        run(duplicate, map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, batch))
    arriving = []
    for name, scales in seen.items():
        quantizer, quantized = layers[name].input_quantizer, [scale for scale in scales if scale is not None]
        if quantizer is not None and quantized and len(quantized) == len(scales):
            quantizer.arrives_quantized = True
            quantizer.scale.copy_(torch.stack([scale.float() for scale in quantized]).max())
            arriving.append(name)
        elif quantized:
            logger.warning(
                "%s: its input arrives quantized in %d of %d calls; training quantizes it in all of them, with its own "
                "scale: set quantize_outputs=False (target transformers), or exclude the layer",
                name,
                len(quantized),
                len(scales),
            )
    return arriving


def _scales(layer: QuantizedLayer) -> tuple[float, float | None]:
    scale, *output = [float(quantizer.scale) for quantizer in layer.activation_quantizers()]
    return scale, output[0] if output else None
