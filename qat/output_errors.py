"""How far quantized activations put each layer's output off, measured while a model runs with float ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat.layers import QuantizedLayer
from qat.probing import watched
from qat.quantizers.activation import ActivationQuantizer

__all__ = ["OutputErrors", "SideError"]

_CHUNK = 1 << 22  # elements that are widened at a time


class SideError(NamedTuple):
    """Of quantizing a layer's input alone, or its output alone."""

    error: float
    """Squared error of the layer's output, relative to its squares; infinite where it has none but an error."""
    saturated: float
    """Share of the elements that lie beyond the largest code."""


class OutputErrors:
    """Within the block, every call of a layer is made again with its input quantized, and the outputs are compared.

    The layers leave activations float meanwhile, so that errors of one do not count in another. Sums stay on the
    device, in float64, so nothing waits and memory does not grow.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self._layers = layers
        self._sums: dict[str, Tensor] = {}  # squares, then for each side: squared error, elements beyond, elements
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        called = {name: layer for name, layer in self._layers.items() if layer.called}
        self._stack.enter_context(watched(called, self._compare))
        for name in self._layers.keys() - called.keys():
            hook = functools.partial(self._compare_around, name)
            around = self._layers[name].holder(self._layers[name])
            self._stack.callback(around.register_forward_hook(hook, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @torch.no_grad()
    def _compare(self, name: str, x: Tensor, y: Tensor) -> None:
        if not y.numel():
            return
        layer = self._layers[name]
        assert layer.input_quantizer is not None
        given, output = layer.input_quantizer, layer.output_quantizer
        with ExitStack() as kept:
            for thing, key in ((layer, "mode"), (layer, "reached"), (layer, "output_quantizer"), (given, "enabled")):
                kept.callback(setattr, thing, key, getattr(thing, key))
            layer.mode = layer.mode._replace(activations=True, observe=False)
            layer.output_quantizer, given.enabled = None, True
            found = [_distance(y, torch.zeros_like(y)), _distance(layer.forward(x), y), *_beyond(x, given)]
        if output is not None:
            quantized = output.qtype.fake_quantize_activation(y, output.serving_scale(), output.dtype)
            found += [_distance(quantized, y), *_beyond(y, output)]
        sums = torch.stack(found)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    @torch.no_grad()
    def _compare_around(self, name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        """For what a module reads that calls no layer: the error is that of the module's output."""
        layer = self._layers[name]
        given = next(layer.activation_quantizers())
        with ExitStack() as kept:
            for thing, key in ((layer, "mode"), (given, "enabled")):
                kept.callback(setattr, thing, key, getattr(thing, key))
            layer.mode, given.enabled = layer.mode._replace(activations=True, observe=False), True
            distance = _distance(module.forward(*args, **kwargs), y)
        beyond = given.observer.saturated(given.serving_scale() * given.qtype.steps).to(distance)
        sums = torch.stack([_distance(y, torch.zeros_like(y)), distance, beyond, torch.ones_like(distance)])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def found(self, name: str) -> tuple[SideError, ...]:
        """Of a layer's input and, if that is quantized, its output; over all ranks of the default process group."""
        layer = self._layers[name]
        sides = len(list(layer.activation_quantizers()))
        device = layer.like_weight(layer).device
        sums = self._sums.get(name, torch.zeros(1 + 3 * sides, dtype=torch.float64, device=device))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        squares, *rest = sums.tolist()
        result = []
        for distance, beyond, elements in zip(*[iter(rest)] * 3, strict=True):
            none = 0.0 if distance == 0 else float("inf")
            result.append(SideError(distance / squares if squares else none, beyond / max(elements, 1.0)))
        return tuple(result)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    pairs = zip(torch.split(one.reshape(-1), _CHUNK), torch.split(other.reshape(-1), _CHUNK), strict=True)
    return torch.stack([(a.float() - b.float()).square().sum(dtype=torch.float64) for a, b in pairs]).sum()


def _beyond(x: Tensor, quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    beyond = (x.abs().float() > quantizer.serving_scale() * quantizer.qtype.steps).sum().double()
    return beyond, torch.full_like(beyond, x.numel())
