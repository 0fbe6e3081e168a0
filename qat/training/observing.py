"""Activation quantizers of a model in training: whether they have scales, and new ones from their observers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn

from qat.errors import TrainingError, listed
from qat.layers import quantized_layers
from qat.quantizers.activation import ActivationQuantizer

__all__ = ["activation_quantizers", "activation_use", "end_observing", "take_scales", "uncalibrated"]

logger = logging.getLogger("qat")


def activation_quantizers(module: nn.Module) -> Iterator[ActivationQuantizer]:
    """Of all prepared layers."""
    return (quantizer for _, layer in quantized_layers(module) for quantizer in layer.activation_quantizers())


def uncalibrated(module: nn.Module) -> bool:
    """Whether an activation has no scale yet."""
    return any(not quantizer.initialized for quantizer in activation_quantizers(module))


def take_scales(module: nn.Module, processes: int) -> None:
    """Take scales from all that was observed; every one of several processes gets the largest of any.

    Raises:
        TrainingError: inf or NaN was observed; the layers are named, and no scale changes.
    """
    layers = quantized_layers(module)
    named = [(name, quantizer) for name, layer in layers for quantizer in layer.activation_quantizers()]
    if not named:
        return
    spoilt = torch.stack([quantizer.observer.nonfinite for _, quantizer in named]).to(torch.int32)
    if processes > 1:  # so that all raise together
        torch.distributed.all_reduce(spoilt, op=torch.distributed.ReduceOp.MAX)
    if names := [name for (name, _), flag in zip(named, spoilt.tolist(), strict=True) if flag]:
        raise TrainingError(
            f"activations: inf or NaN reached {listed(list(dict.fromkeys(names)), 4)}: lower the learning rate, or "
            "look for the batch that brings it"
        )
    for _, quantizer in named:
        quantizer.refresh()
    if processes == 1:
        return
    largest = torch.stack([quantizer.scale for _, quantizer in named])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    for (_, quantizer), value, positive in zip(named, largest, (largest > 0).tolist(), strict=True):
        quantizer.part()
        quantizer.scale.copy_(value)
        quantizer.initialized = quantizer.initialized or positive  # of a layer that another process alone reached


def end_observing(module: nn.Module, processes: int) -> None:
    """Take the last scales, and say what was observed."""
    take_scales(module, processes)
    found = activation_use(module)
    if found:
        most = max(found, key=lambda name: found[name][0])
        least = min(found, key=lambda name: found[name][1])
        logger.info(
            "activations of %d layers were observed: at most %.2f%% saturate (%s), and at least %.0f%% of a range is "
            "used (%s)",
            *(len(found), 100 * found[most][0], most, 100 * found[least][1], least),
        )
    missed = [name for name, layer in quantized_layers(module) if uncalibrated(layer)]
    if missed:
        logger.warning(
            "%d layers saw no activations while observers recorded, and go on with float ones: %s; call qat.calibrate "
            "before freezing",
            len(missed),
            listed(missed, 4),
        )


def activation_use(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Of each observed layer, by its inputs: the share of values that saturate, and the share of the range in use.

    Both come from the observers, as bins tell them: no batch runs. Channels count as the rule of the scale counts them.

    >>> import qat
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> spec = qat.QuantSpec(weights="int8", activations="int8")
    >>> _ = qat.prepare(model, spec, observer=qat.Absmax())
    >>> _ = qat.calibrate(model, [torch.randn(4, 16)])
    >>> activation_use(model)
    {'0': (0.0, 1.0)}
    """
    found = {}
    for name, layer in quantized_layers(module):
        quantizer = next(layer.activation_quantizers(), None)
        if quantizer is None or not quantizer.initialized or not bool(quantizer.observer.initialized):
            continue
        limit = quantizer.serving_scale() * quantizer.qtype.steps
        used = min(1.0, float(quantizer.observer.largest / limit))
        found[name] = (float(quantizer.observer.saturated(limit)), round(used, 2))
    return found
