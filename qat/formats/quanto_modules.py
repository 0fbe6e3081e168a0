"""The modules that run frozen layers of quanto's format: quanto's own, and those that quanto has no class for."""

from __future__ import annotations

import functools
from typing import Any

import torch
from optimum.quanto import quantize_activation
from optimum.quanto.nn import QConv2d, QLinear, QModuleMixin
from torch import Tensor, nn

from qat.formats.quanto_tinygemm import plain, rows_of_tinygemm
from qat.layers import ExpertMatrix, QuantizedLayer, layer_class

__all__ = ["FrozenEmbedding", "FrozenExpertMatrix", "empty_module", "module_class"]

_OF_CONVOLUTIONS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_OF_SCALED = ("scalar_embed_scale", "embed_scale")


def module_class(like: nn.Module) -> Any:
    """The class of the frozen module that takes the place of ``like``, a float or prepared layer.

    >>> module_class(nn.Linear(3, 2)).__name__, module_class(nn.Embedding(2, 3)).__name__
    ('QLinear', 'FrozenEmbedding')
    """
    if isinstance(like, nn.Embedding):
        kind: Any = like.replaces if isinstance(like, QuantizedLayer) else type(like)
        return FrozenEmbedding if kind is nn.Embedding else _scaled(kind)
    if isinstance(like, ExpertMatrix):
        return FrozenExpertMatrix
    return QConv2d if isinstance(like, nn.Conv2d) else QLinear


def empty_module(like: nn.Module, shape: tuple[int, int], bias: bool, **types: Any) -> Any:
    """An object of that class on the meta device, with the options of ``like``; its matrix has this ``shape``."""
    cls, kind = module_class(like), type(like) if isinstance(like, QuantizedLayer) else layer_class(like)
    if isinstance(like, nn.Embedding):
        options = {"num_embeddings": shape[0], "embedding_dim": shape[1], "padding_idx": like.padding_idx}
    elif isinstance(like, nn.Conv2d):
        options = {key: getattr(like, key) for key in _OF_CONVOLUTIONS} | {"bias": bias}
    else:
        options = {"in_features": shape[1], "out_features": shape[0], "bias": bias, "quantize_input": True}
    layer = cls(**options, **types, device=torch.device("meta"))
    if isinstance(layer, FrozenEmbedding):
        layer.take_scale(like)
    layer.targets = () if kind is None else kind.targets  # so that no export is for a loader that replaces none
    return layer


class FrozenExpertMatrix(QLinear):  # type: ignore[misc]
    """An expert's packed matrix, which the module of all experts reads."""

    held_plain = True  # in no kernel's own order, since no kernel of quanto multiplies it

    def value(self) -> Tensor:
        """What the codes stand for, ``(out, in)``, in the serving dtype."""
        return plain(self.weight).dequantize()  # type: ignore[no-any-return]

    @property
    def quantizes_input(self) -> bool:
        """Whether `given` does anything."""
        return self.activation_qtype is not None

    def given(self, x: Tensor) -> Tensor:
        """What the experts read of ``x``, any shape, by the one scale that they share."""
        return quantize_activation(x, qtype=self.activation_qtype, scale=self.input_scale).dequantize()  # type: ignore[no-any-return]


class FrozenEmbedding(QModuleMixin, nn.Embedding):  # type: ignore[misc]
    """An embedding whose table has quanto's tensors; only the rows that are read are dequantized.

    It is not registered with quanto, whose own ``quantize`` goes on to leave embeddings alone.
    """

    bias = None
    _kept: tuple[Any, Any] = (None, None)  # the codes in a kernel's order, and the plain weight

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, ``(..., dim)``, bit for bit those of the whole table dequantized."""
        return self._rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)

    def take_scale(self, like: nn.Module) -> None:
        """Take the number that a scaled embedding multiplies rows with."""
        for name in _OF_SCALED:
            value = getattr(like, name, None)
            if isinstance(value, Tensor):
                self.register_buffer(name, value.clone(), persistent=False)
            elif value is not None:
                setattr(self, name, value)

    def _rows(self, ids: Tensor) -> Tensor:
        weight: Any = self.weight
        if (found := rows_of_tinygemm(weight, ids)) is not None:
            return found
        if type(weight).__name__ not in ("WeightQBytesTensor", "WeightQBitsTensor"):  # a kernel's, shared with a head
            if self._kept[0] is not weight._data:
                self._kept = weight._data, plain(weight)  # which takes long
            weight = self._kept[1]
        if not hasattr(weight, "_shift"):
            scale = weight._scale if weight._scale.ndim == 0 else weight._scale[ids]
            # An index would take negative ids, which no float table does, and float8 has none on a CPU.
            codes = weight._data.view(torch.uint8).index_select(0, ids).view(weight._data.dtype)
            return scale * codes.to(scale.dtype)  # type: ignore[no-any-return]
        packed, bits = weight._data._data, weight._data._bits
        groups = weight._scale.shape[0] // weight.shape[0]
        at = (ids[:, None] * groups + torch.arange(groups, device=ids.device)).view(-1)
        # A byte holds codes of rows that are as far apart as there are packed rows.
        first, shifts = at % packed.shape[0], at // packed.shape[0] * bits
        codes = packed[first].bitwise_right_shift(shifts[:, None].to(torch.uint8)).bitwise_and_(2**bits - 1)
        values: Tensor = weight._scale.index_select(0, at) * codes  # an index would take negative ids
        return values.sub_(weight._shift[at]).view(len(ids), weight.shape[1])


@functools.cache
def _scaled(kind: type[Any]) -> type[Any]:
    """A class of transformers, whose forward multiplies what it finds below it by a number."""
    members = {"__init__": FrozenEmbedding.__init__, "__module__": FrozenEmbedding.__module__}
    return type(f"Frozen{kind.__name__}", (kind, FrozenEmbedding), members)
