"""Tensors that lie deep inside of a batch."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["move"]

Value = TypeVar("Value")


def move(value: Value, device: torch.device, dtype: torch.dtype | None = None, *, copy: bool = False) -> Value:
    """Return a value with all its tensors on a device, detached.

    Args:
        value: dictionaries, lists and tuples, nested; what is no tensor stays as it is.
        device: where to.
        dtype: also what floating tensors of two and more dimensions are cast to, as whoever serves a model brings
            them. One number an example (a timestep, a guidance scale) keeps its dtype, as with most pipelines; the few
            that round timesteps to the dtype of the latents first (Flux, QwenImage) have models that would do it next.
        copy: never share memory with ``value``.

    >>> move({"a": [torch.ones(2, 2)], "b": None}, torch.device("cpu"), torch.bfloat16)["a"][0].dtype
    torch.bfloat16
    """

    def moved(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        cast = dtype is not None and leaf.is_floating_point() and leaf.ndim > 1
        return leaf.detach().to(device, dtype if cast else leaf.dtype, copy=copy)

    result: Value = tree_map(moved, value)
    return result
