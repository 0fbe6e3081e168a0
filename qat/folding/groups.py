"""Groups that may be folded, as one run of a model proposes them, and the fold itself.

No class is known by name. A norm is what holds a vector ``weight`` as long as its output's last dimension; the layers
that read its output are told by the place of the tensor in memory. An adaptive norm is found by its numbers: with the
right parts of a linear layer's output as scale and shift, what a layer reads has mean 0 and variance 1 again. For the
rest, linear layers close to each other, of fitting sizes, are guessed. `qat.folding.proof` says which are true.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError
from qat.layers import float_layers, layer_class
from qat.probing import watched

__all__ = ["EXPONENTS", "Group", "candidates", "linear_layers", "power_of_two", "require_finite"]

EXPONENTS = 8
"""Largest exponent of a factor."""
_NEAREST = 4  # linear layers before a reader that are tried as its producer
_UNIT = 0.01  # how far mean and variance may be off where an adaptive norm is taken back


@dataclass(frozen=True, eq=False)
class Group:
    """A producer, and the layers that read its output."""

    producer: str
    made: tuple[Tensor, ...]
    """What is divided: parameters of the producer, or parts of them, the channel first."""
    readers: Mapping[str, nn.Module]
    offset: tuple[Tensor, ...] = ()
    """Parameters that the producer adds 1 to; they become (1 + parameter) / s - 1, which rounds."""

    @property
    def kind(self) -> str:
        """The names without what tells blocks apart: groups of one kind can all be folded or none, as a rule."""
        seen: dict[str, int] = {}
        names = " ".join((self.producer, *self.readers))
        return re.sub(r"\d+", lambda number: f"*{seen.setdefault(number[0], len(seen))}", names)

    def adding_one(self) -> Group:
        """The same for a norm that multiplies by 1 + weight."""
        weight, *others = self.made
        return replace(self, made=tuple(others), offset=(weight,))

    def weights(self) -> dict[str, Tensor]:
        """The weight of each reader, ``(out, in)``, to be changed in place."""
        return {name: _weight(reader) for name, reader in self.readers.items()}

    def limit(self, largest: Tensor) -> Tensor:
        """Exponents of the largest factors: a sum of 1 and a number near -1 would lose more than a bit."""
        most = torch.full_like(largest, EXPONENTS)
        for tensor in self.offset:
            most = torch.minimum(most, (1 + tensor.float()).abs().log2().floor() + 1)
        return most.clamp(min=-EXPONENTS)

    def fold(self, factor: Tensor, undo: ExitStack) -> bool:
        """Fold in place, and let ``undo`` take it back; False as soon as a product would lose bits.

        ``factor`` are powers of two, float32, ``(channels,)``.
        """
        for tensor in self.offset:
            undo.callback(tensor.copy_, tensor.clone())
            tensor.copy_((1 + tensor.double()) / factor.to(tensor.device) - 1)
        products = [(tensor, (1 / factor).reshape(-1, *[1] * (tensor.ndim - 1))) for tensor in self.made]
        for tensor, by in (*products, *((weight, factor) for weight in self.weights().values())):
            by = by.to(tensor)
            product = tensor * by
            if not torch.equal(product / by, tensor):
                return False
            undo.callback(tensor.mul_, 1 / by)
            tensor.copy_(product)
        return True


def power_of_two(exponents: Tensor) -> Tensor:
    """Exactly two to the power of whole numbers, float32, by its bits: functions of powers may round.

    >>> power_of_two(torch.tensor([-1, 3]))
    tensor([0.5000, 8.0000])
    """
    return ((exponents.int() + 127) << 23).view(torch.float32)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of a kind that can be quantized, whether they will be or not."""
    return {name: module for name, module, cls in float_layers(model) if cls.called and cls.linear}


def _weight(layer: nn.Module) -> Tensor:
    cls = layer_class(layer)
    assert cls is not None
    return cls.effective_weight(layer).detach()


def _vectors(module: nn.Module) -> tuple[Tensor, ...]:
    found = (module._parameters.get(key) for key in ("weight", "bias"))
    return tuple(p.detach() for p in found if p is not None and p.ndim == 1)


def require_finite(name: str, x: Tensor, batch: int) -> None:
    """Raise `CalibrationError` where a layer reads inf or NaN."""
    if not bool(x.isfinite().all()):
        raise CalibrationError(
            f"batches: batch {batch} gives inf or NaN in the input of layer {name!r}: check the batch and the model; "
            "nothing was changed"
        )


def candidates(
    model: nn.Module, run: Callable[[], object], chosen: Mapping[str, object]
) -> tuple[list[Group], list[Group], list[Group]]:
    """Groups around the layers ``chosen``, from one ``run`` of the model.

    Returns:
        Norms, adaptive norms and linear layers, each with the layers that read their output.
    """
    layers = linear_layers(model)
    norms = {name: module for name, module in model.named_modules() if _is_norm(module)}
    kept: list[Tensor] = []  # so that no other tensor gets their place
    normed: dict[tuple[int, int], str] = {}
    modulations: dict[str, Tensor] = {}
    readers: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    adaptive: dict[tuple[str, int, int], dict[str, nn.Module]] = defaultdict(dict)
    before: dict[str, None] = {}
    pairs: dict[str, list[str]] = {}

    def place(x: Tensor) -> tuple[int, int]:
        return x.untyped_storage().data_ptr(), x.shape[-1]  # the same for its views

    def note(name: str, x: Any, y: Any) -> None:
        if name in norms:
            if isinstance(y, Tensor) and y.shape[-1:] == norms[name].weight.shape:
                kept.append(y)
                normed[place(y)] = name
            return
        require_finite(name, x, 0)
        if place(x) in normed:
            readers[normed[place(x)]][name] = layers[name]
        elif modulated := list(_modulated(x, dict(list(modulations.items())[-_NEAREST:]))):
            adaptive[modulated[-1]][name] = layers[name]
        else:
            around = ".".join(name.split(".")[:-2])  # the block of the block that it stands in
            near = [n for n in before if n.startswith(around) and _weight(layers[n]).shape[0] == x.shape[-1]]
            pairs.setdefault(name, near[: -_NEAREST - 1 : -1])
        before.setdefault(name)
        if y.ndim == 2 and getattr(layers[name], "bias", None) is not None:
            modulations[name] = y

    with watched(norms | layers, note):
        run()
    return (
        [Group(norm, _vectors(norms[norm]), found) for norm, found in readers.items() if chosen.keys() & found],
        [_adaptive(layers, *key, found) for key, found in adaptive.items() if chosen.keys() & found],
        [
            Group(producer, (_weight(layers[producer]), *_vectors(layers[producer])), {name: layers[name]})
            for name in pairs
            if name in chosen
            for producer in pairs[name]
        ],
    )


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not module._modules


def _modulated(x: Tensor, modulations: Mapping[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """Where ``x`` is a norm times 1 + scale plus shift: the layer that gives both, and the part that each is of it."""
    for name, y in modulations.items():
        parts, rest = divmod(y.shape[-1], x.shape[-1])
        if x.ndim < 3 or rest or parts < 2 or len(y) != len(x):
            continue
        values = y.float().reshape(len(x), parts, *[1] * (x.ndim - 2), x.shape[-1])
        for scale, shift in ((i, j) for i in range(parts) for j in (i - 1, i + 1) if 0 <= j < parts):
            norm = (x.float() - values[:, shift]) / (1 + values[:, scale])
            mean, variance = norm.mean(-1), norm.square().mean(-1)
            if bool((mean.abs() < _UNIT).all() & ((variance - 1).abs() < _UNIT).all()):
                yield name, scale, shift


def _adaptive(
    layers: Mapping[str, nn.Module], name: str, scale: int, shift: int, readers: Mapping[str, nn.Module]
) -> Group:
    width = _weight(next(iter(readers.values()))).shape[1]
    weight, (bias,) = _weight(layers[name]), _vectors(layers[name])
    scales, shifts = (slice(part * width, (part + 1) * width) for part in (scale, shift))
    return Group(name, (weight[scales], weight[shifts], bias[shifts]), readers, offset=(bias[scales],))
