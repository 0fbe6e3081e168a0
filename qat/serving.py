"""A prepared model as it will be served, for a while, and what only that shows.

quanto's layers hand on quantized tensors. The output of a layer stays quantized through relu, view, dropout and the
like, and the next layer then ignores its own input scale and takes the producer's. Other operations between layers do
other things to quantized tensors than to floats. Fake quantization sees floats alone, so a *frozen copy* runs.

A generate loop or a pipeline holds the model itself and cannot be handed a copy. So the copy's layers and tensors
stand in the model's own modules meanwhile (`as_served`).
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError
from qat.files.examples import flatten_outputs
from qat.freezing import frozen_copy
from qat.layers import Mode, QuantizedLayer, quantized_layers
from qat.preparation import prepared_as
from qat.runs import note_runs, runs
from qat.tensors import map_tensors

__all__ = ["Call", "as_served", "first_call", "input_scales", "mark_arriving", "require_served", "snapshot"]

logger = logging.getLogger("qat")

_CONTAINERS = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, dict | set))


class Call(NamedTuple):
    """The arguments of one call of a model, as they were before it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        """Make the call again; the outputs by name. A call may change its arguments, as caches are."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        return flatten_outputs(model(*args, **kwargs))


@contextmanager
def first_call(model: nn.Module) -> Iterator[list[Call]]:
    """A list that the first call of ``model`` within the block is put into."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append(Call(*copy.deepcopy(map_tensors(torch.Tensor.detach, (args, kwargs)))))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


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
    layers = {id(layer) for _, layer in quantized_layers(model)}
    inside = {id(part) for _, layer in quantized_layers(model) for part in layer.modules()}

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


def input_scales(model: nn.Module, names: list[str], go: Callable[[], None]) -> dict[str, list[Tensor | None]]:
    """For each call of a layer of a frozen model while ``go`` runs it: the scale its input arrives with, or None."""
    seen: dict[str, list[Tensor | None]] = {name: [] for name in names}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            seen[name].append(getattr(x, "_scale", None))

    with ExitStack() as stack:
        for name in names:
            hook = functools.partial(note, name)
            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        go()
    return seen


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


@torch.no_grad()
def require_served(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], call: Call, served: Mapping[str, Tensor]
) -> None:
    """Raise `CalibrationError` where ``served``, the frozen model's outputs of ``call``, are not those of training.

    Then in-place operations on quantized tensors are lost, or softmax and where quantize again by a scale that does not
    fit. What quantizing the activations changes at all is the measure.
    """
    outputs = {}
    with ExitStack() as stack:
        stack.callback(note_runs, model, runs(model))
        for layer in layers.values():
            stack.callback(setattr, layer, "mode", layer.mode)
        for name, active in (("trained", True), ("float", False)):
            for layer in layers.values():
                layer.mode = Mode(activations=active)
            outputs[name] = call(model)
    gap = noise = size = 0.0
    for key, trained in outputs["trained"].items():
        if trained.is_floating_point() and key in served:
            gap += float((served[key].double() - trained.double()).square().sum())
            noise += float((outputs["float"][key].double() - trained.double()).square().sum())
            size += float(trained.double().square().sum())
    if gap > max(noise, 0.01 * size):
        raise CalibrationError(
            f"model: served, its outputs differ from those of training by {(gap / size) ** 0.5:.0%}: an operation "
            "right after a quantized layer is not carried out on quantized activations (in place, softmax, where): "
            "write it out of place or exclude the layer before it, or leave outputs float (target 'transformers')"
        )
