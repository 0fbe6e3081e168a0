"""A prepared model as it will be served, for a while, and what only that shows.

quanto's layers hand on quantized tensors. The output of a layer stays quantized through relu, view, dropout and the
like, and the next layer then ignores its own input scale and takes the producer's. Other operations between layers do
other things to quantized tensors than to floats: in place they are lost, softmax quantizes again, and -x has no code
for the opposite of -128. Fake quantization sees floats alone, so a *frozen copy* runs.

A generate loop or a pipeline holds the model itself and cannot be handed a copy. So the copy's layers and tensors
stand in the model's own modules meanwhile (`as_served`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qat.adapters import adapters
from qat.errors import CalibrationError
from qat.freezing import frozen_copy
from qat.layers import QuantizedLayer, quantized_layers
from qat.preparation import prepared_as
from qat.tensors import map_tensors

__all__ = ["ServedRun", "as_served", "mark_arriving", "snapshot"]

logger = logging.getLogger("qat")

_CONTAINERS = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, dict | set))


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Note class and attributes of every module in ``model``; the function that is returned restores them.

    Numbers inside tensors are not noted.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> restore = snapshot(model)
    >>> model[0] = nn.ReLU()
    >>> restore()
    >>> model[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    kept = [
        (
            module,
            type(module),
            dict(vars(module)),
            {key: vars(module)[key].copy() for key in _CONTAINERS if key in vars(module)},
        )
        for module in model.modules()
    ]

    def restore() -> None:
        for module, cls, attributes, contents in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for key, content in contents.items():  # handles of hooks refer to these very objects
                attributes[key].clear()
                attributes[key].update(content)

    return restore


@contextmanager
def as_served(model: nn.Module) -> Iterator[None]:
    """Let ``model`` be its frozen copy within the block, for all who hold it; inputs are cast to the serving dtype."""
    dtype, duplicate, restore = prepared_as(model).spec.torch_dtype, frozen_copy(model), snapshot(model)
    replaced = [module for _, module in (*quantized_layers(model), *adapters(model))]
    layers, inside = {id(module) for module in replaced}, {id(part) for module in replaced for part in module.modules()}

    def cast(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))

    try:
        for name, module in list(model.named_modules()):
            if id(module) in inside:
                continue
            attributes = vars(duplicate.get_submodule(name))
            children = {
                key: attributes["_modules"][key] if id(child) in layers else child
                for key, child in module._modules.items()
            }
            vars(module).clear()
            vars(module).update(attributes | {"_modules": children})
        model.register_forward_pre_hook(cast, with_kwargs=True)
        yield
    finally:
        restore()


class ServedRun(TorchDispatchMode):
    """What the calls of a model within the block show that stands for its frozen copy (`as_served`).

    Every operation on a quantized tensor, outside layers, is carried out on floats too. Where the results differ,
    training would compute something else than is served.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scales: dict[str, list[Tensor | None]] = {name: [] for name in names}
        """For each call of a layer, the scale that its input arrives with, or None."""
        self.lost: dict[str, str] = {}
        """The layers whose outputs reach an operation that is carried out otherwise on them, and its name."""
        self._model, self._inside, self._stack = model, 0, ExitStack()

    def __enter__(self) -> Self:
        for name in self.scales:
            layer = self._model.get_submodule(name)
            before, after = functools.partial(self._before, name), functools.partial(self._after, name)
            self._stack.callback(layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            self._stack.callback(layer.register_forward_hook(after, always_call=True).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._stack.close()

    def lost_anywhere(self) -> dict[str, str]:
        """`lost` of all ranks of the default process group, so that all take the same layers out."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.lost
        found: list[dict[str, str]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self.lost)
        return {name: operation for part in found for name, operation in part.items()}

    def _before(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        x = args[0] if args else kwargs["input"]
        if x.numel():
            self.scales[name].append(getattr(x, "_scale", None))

    def _after(self, name: str, _: nn.Module, args: Any, y: Any) -> None:
        self._inside -= 1
        if _is_quantized(y):
            y._producers = frozenset([name])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and see whether it is that of floats."""
        kwargs = kwargs or {}
        quantized = [leaf for leaf in tree_leaves((args, kwargs)) if _is_quantized(leaf)]
        if self._inside or not quantized or torch.Tag.nondeterministic_seeded in func.tags:
            return func(*args, **kwargs)
        floats = tree_map(_as_float, (args, kwargs))
        wanted = func(*floats[0], **floats[1])
        result = func(*args, **kwargs)
        producers = frozenset().union(*(getattr(leaf, "_producers", ()) for leaf in quantized))
        for leaf in tree_leaves(result):
            if _is_quantized(leaf):
                leaf._producers = producers
        pairs = [*zip(tree_leaves(wanted), tree_leaves(result), strict=True)]
        if func._schema.is_mutable:  # on a dequantized copy of an argument, which is then lost
            pairs += zip(tree_leaves(floats), tree_leaves((args, kwargs)), strict=True)
        if _always_other(func, quantized[0]) or not all(map(_alike, *zip(*pairs, strict=True))):
            name = func.overloadpacket.__name__
            if not producers:
                raise CalibrationError(
                    f"model: the operation {name!r} between layers is carried out otherwise on quantized activations: "
                    "exclude the layer before it, or leave outputs float (target 'transformers')"
                )
            self.lost |= dict.fromkeys(producers, name)
        return result


def _is_quantized(x: Any) -> bool:
    return isinstance(x, Tensor) and type(x) is not Tensor and getattr(x, "_scale", None) is not None


def _as_float(x: Any) -> Any:
    if _is_quantized(x):
        return x.dequantize()
    return x.clone() if isinstance(x, Tensor) else x


def _always_other(func: Any, x: Any) -> bool:
    """Whether an operation on ``x`` is another one whatever the data that came so far."""
    if func.overloadpacket is torch.ops.aten.neg:  # the code -128 has no opposite, and other data may reach it
        return not x._data.dtype.is_floating_point
    return func.overloadpacket is torch.ops.aten._softmax  # whose result is quantized again


def _alike(wanted: Any, found: Any) -> bool:
    """Whether two results are equal, but for rounding."""
    if not isinstance(wanted, Tensor) or not wanted.is_floating_point() or not wanted.numel():
        return True
    other = found.dequantize() if _is_quantized(found) else found
    if wanted.shape != other.shape:
        return False
    distance = (wanted.double() - other.double()).nan_to_num().square().sum()
    return bool(distance <= (2 * torch.finfo(wanted.dtype).eps) ** 2 * wanted.double().nan_to_num().square().sum())


@torch.no_grad()
def mark_arriving(layers: Mapping[str, QuantizedLayer], seen: Mapping[str, list[Tensor | None]]) -> list[str]:
    """Mark the layers whose input always arrives quantized, give them the producer's scale, and return their names."""
    arriving = []
    for name, scales in seen.items():
        quantizer, quantized = layers[name].input_quantizer, [scale for scale in scales if scale is not None]
        if quantizer is None or not quantizer.enabled:
            continue
        if quantized and len(quantized) == len(scales):
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
