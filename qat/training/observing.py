"""Activation quantizers of a model in training: whether they have scales, and new ones from their observers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qat.layers import quantized_layers
from qat.quantizers.activation import ActivationQuantizer

__all__ = ["activation_quantizers", "take_scales", "uncalibrated"]


def activation_quantizers(module: nn.Module) -> Iterator[ActivationQuantizer]:
    """Of all prepared layers."""
    return (quantizer for _, layer in quantized_layers(module) for quantizer in layer.activation_quantizers())


def uncalibrated(module: nn.Module) -> bool:
    """Whether an activation has no scale yet."""
    return any(not quantizer.initialized for quantizer in activation_quantizers(module))


def take_scales(module: nn.Module, processes: int) -> None:
    """Take scales from all that was observed; every one of several processes gets the largest of any."""
    quantizers = list(activation_quantizers(module))
    for quantizer in quantizers:
        quantizer.refresh()
    if processes == 1:
        return
    largest = torch.stack([quantizer.scale for quantizer in quantizers])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    for quantizer, value in zip(quantizers, largest, strict=True):
        quantizer.scale.copy_(value)
