"""Building a model from its configuration alone, as its loader does, and the tensors that only this can give.

Rotary tables, embedding scales and the like are in no file: every loader computes them while it builds the model, each
in a dtype of its own. Casting a model, as Lightning's ``bf16-true`` does, leaves it with others than its loader makes;
so freezing takes them from a model that is built the same way, without memory for its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.targets import Target
from qat.targets.diffusers import is_diffusers_model

__all__ = ["Unstored", "build", "can_build", "constructed_tensors", "differs", "unstored_tensors"]


class Unstored(NamedTuple):
    """A tensor that no file holds, and where it lives."""

    module: nn.Module
    key: str
    """Its name in the module."""
    name: str
    """Its full name in the model."""
    tensor: Tensor


def can_build(kind: type) -> bool:
    """Whether a class is one of transformers or diffusers, which their configuration builds."""
    return hasattr(kind, "_from_config") or _is_diffusers(kind)


def build(kind: Any, config: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
    """Build a model as its library's loader does.

    Args:
        kind: a class of transformers, or one of diffusers.
        config: its configuration, which is not changed.
        dtype: the serving dtype; diffusers makes it torch's default while a model is built.
        empty: leave parameters on the meta device; buffers are real.
    """
    from accelerate import init_empty_weights

    config, default = copy.deepcopy(config), torch.get_default_dtype()
    if _is_diffusers(kind):
        torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            make = kind.from_config if _is_diffusers(kind) else lambda config: kind._from_config(config, dtype=dtype)
            if not empty:
                return make(config)  # type: ignore[no-any-return]
            with init_empty_weights(include_buffers=False):
                return make(config)  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(default)


def _is_diffusers(kind: type) -> bool:
    return is_diffusers_model(kind) and hasattr(kind, "from_config")


def unstored_tensors(model: nn.Module) -> Iterator[Unstored]:
    """The floating and complex tensors of a model that no file holds.

    These are buffers that are not persistent; in models of diffusers also tensors that are plain attributes, which is
    how some of them keep rotary tables.
    """
    attributes = is_diffusers_model(model)
    for path, module in model.named_modules():
        found = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
        if attributes:
            found |= {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        for key, tensor in found.items():
            if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                yield Unstored(module, key, f"{path}.{key}" if path else key, tensor)


def constructed_tensors(model: nn.Module, target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `unstored_tensors` as the target's loader makes them when it serves ``dtype``.

    Gemma's embedding scale takes the serving dtype, rotary tables stay float32, GPT-J's are float32 but computed in
    the serving dtype by quanto's loader. A model that was built in, or cast to, another dtype (Lightning's
    ``bf16-true``) has others. Empty for models that have none, which are not built, and for those that no
    configuration builds.
    """
    config: Any = getattr(model, "config", None)
    names = {unstored.name for unstored in unstored_tensors(model)}
    if not names or config is None or not can_build(type(model)):
        return {}

    def built(kind: torch.dtype) -> dict[str, Tensor]:
        twin = build(type(model), config, kind, empty=True)
        return {unstored.name: unstored.tensor for unstored in unstored_tensors(twin) if unstored.name in names}

    try:
        served = built(dtype)
        if dtype is torch.float32 or not target.initialises_buffers or is_diffusers_model(model):
            return served
        return {name: tensor.to(served[name].dtype) for name, tensor in built(torch.float32).items()}
    except TypeError:  # a class that its config alone does not build has no such loader
        return {}


def differs(tensor: Tensor, constructed: Tensor) -> bool:
    """Whether a tensor is not what its loader makes."""
    return tensor.dtype != constructed.dtype or not torch.equal(tensor, constructed.to(tensor.device))
