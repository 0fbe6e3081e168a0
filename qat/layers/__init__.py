"""Layers with fake quantization: one file each, and one entry each in `LAYERS`, from float class to what it becomes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from torch import nn

from qat.layers.base import Mode, QuantizedLayer, inside_layer
from qat.layers.conv2d import QConv2d
from qat.layers.embedding import QEmbedding
from qat.layers.expert_forms import ExpertMatrix, experts_in
from qat.layers.experts import QExpert
from qat.layers.linear import QLinear

__all__ = [
    "LAYERS",
    "ExpertMatrix",
    "Mode",
    "QConv2d",
    "QEmbedding",
    "QExpert",
    "QLinear",
    "QuantizedLayer",
    "experts_in",
    "float_layers",
    "inside_layer",
    "layer_class",
    "quantized_layers",
]

LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QLinear,
    nn.Embedding: QEmbedding,
    nn.Conv2d: QConv2d,
    ExpertMatrix: QExpert,
}
_OF_LIBRARIES = {
    "transformers.pytorch_utils.Conv1D": ("qat.layers.conv1d", "QConv1D"),
    "peft.tuners.lora.layer.Linear": ("qat.layers.lora", "QLoraLinear"),
}
"""Float classes of libraries that may not be installed: entered in `LAYERS` when the first of them is met."""


def layer_class(module: nn.Module) -> type[QuantizedLayer] | None:
    """The class that ``module``, or the class that it is derived from, becomes when it is prepared.

    A subclass is found too, so that it can be reported; `QuantizedLayer.adoption_fault` refuses it.

    >>> layer_class(nn.Linear(2, 2)).__name__, layer_class(nn.LayerNorm(2))
    ('QLinear', None)
    """
    for base in type(module).__mro__:
        if base not in LAYERS and (path := _OF_LIBRARIES.get(f"{base.__module__}.{base.__qualname__}")) is not None:
            LAYERS[base] = getattr(importlib.import_module(path[0]), path[1])
        if base in LAYERS:
            return LAYERS[base]
    return None


def float_layers(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module, type[QuantizedLayer]]]:
    """Every module of ``model`` that can become a prepared layer, once: full name, module, and the class it becomes.

    Parts of such a module, as those of an adapter over a linear layer, are no layers of their own. Without
    ``remove_duplicate``, a module comes under each of its names. Prepared layers come too.

    >>> [(name, cls.__name__) for name, _, cls in float_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
    [('0', 'QLinear')]
    """
    inside = "\0"  # begins no name
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        cls = layer_class(module)
        if cls is not None and not name.startswith(inside):
            yield name, module, cls
            if type(module) in (cls, cls.replaces):
                inside = f"{name}."
        for key, expert in experts_in(module):
            yield f"{name}.{key}" if name else key, expert, QExpert


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every prepared layer below ``module`` with its full name, each object once."""
    for name, child in module.named_modules():
        if isinstance(child, QuantizedLayer):
            yield name, child
