"""The tensors that no file holds, as a target's loader makes them.

Rotary tables, embedding scales and the like are in no file: every loader computes them while it builds the model, each
in a dtype of its own. Casting a model, as Lightning's ``bf16-true`` does, leaves it with others than its loader makes;
so freezing takes them from a model that is built the same way, without memory for its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.hosts.targets import Target, host_of

__all__ = ["Unstored", "constructed_tensors", "differs", "unstored_tensors"]


class Unstored(NamedTuple):
    """A tensor that no file holds, its module, its name there, and its full name."""

    module: nn.Module
    key: str
    name: str
    tensor: Tensor


def unstored_tensors(model: nn.Module) -> Iterator[Unstored]:
    """The floating and complex tensors of a model that no file holds.

    These are buffers that are not persistent; in models of some libraries also tensors that are plain attributes.
    """
    host = host_of(model)
    for path, module in model.named_modules():
        for key, tensor in host.unstored(module).items():
            if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                yield Unstored(module, key, f"{path}.{key}" if path else key, tensor)


def constructed_tensors(model: nn.Module, target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `unstored_tensors` as the target's loader makes them when it serves ``dtype``.

    Gemma's embedding scale takes the serving dtype, rotary tables stay float32, GPT-J's are float32 but computed in
    the serving dtype by quanto's loader. Empty for models that have none, which are not built, and for those that no
    configuration builds.
    """
    config: Any = getattr(model, "config", None)
    library = host_of(model)
    names = {unstored.name for unstored in unstored_tensors(model)}
    if not names or config is None or not library.can_build(type(model)):
        return {}

    def built(dtype: torch.dtype) -> dict[str, Tensor]:
        other = library.build(type(model), config, dtype, empty=True)
        return {unstored.name: unstored.tensor for unstored in unstored_tensors(other) if unstored.name in names}

    try:
        return target.host.constructed(built, dtype)
    except TypeError:  # a class that its config alone does not build has no such loader
        return {}


def differs(tensor: Tensor, constructed: Tensor) -> bool:
    """Whether a tensor is not what its loader makes."""
    return tensor.dtype != constructed.dtype or not torch.equal(tensor, constructed.to(tensor.device))
