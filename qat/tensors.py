"""What a model's tensors are, where they are, and how two of them differ; nothing here knows a format or a library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = [
    "TOLERANCE",
    "Difference",
    "await_numbers",
    "difference",
    "digest",
    "inner_tensors",
    "is_sharded",
    "map_tensors",
    "matrices",
    "meta_names",
    "model_device",
    "own_tensors",
    "raw_bytes",
    "same_bits",
    "stored_tensors",
    "whole",
]

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""Largest difference of outputs, relative to the largest output, allowed where kernels may round sums differently."""


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's values as raw bytes, row-major; shape and dtype do not enter.

    >>> digest(torch.zeros(2, 2)) == digest(torch.zeros(4))
    True
    """
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def await_numbers(tensor: Tensor) -> None:
    """Wait for what the caller's stream computes on a tensor's device; a thread reads tensors on another stream."""
    if tensor.device.type not in ("cpu", "meta"):
        torch.accelerator.current_stream(tensor.device).synchronize()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a plain tensor, row-major, little-endian; a contiguous CPU tensor is not copied."""
    array: Any = _bits(tensor).numpy() if tensor.numel() else b""
    return memoryview(array)


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one device have the same dtype, shape and bits: 0.0 is not -0.0, and NaN is itself.

    Compared as 64-bit integers where they can be, which takes a fifth of the time that bfloat16 numbers take.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = [tensor.detach().reshape(-1) for tensor in (a, b)]
    wide = all(part.nbytes % 8 == 0 == part.storage_offset() * part.itemsize % 8 for part in flat)
    bits = torch.int64 if wide else torch.uint8
    return torch.equal(*(part.view(bits) for part in flat))


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's data here: itself, or the parts of a quantized one, or a shard.

    Stock diffusers leaves the wrapper of a loaded weight on the meta device; only the parts say where the data is.
    """
    if is_sharded(tensor):
        return [tensor.to_local()]  # type: ignore[attr-defined]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in inner_tensors(getattr(tensor, name))]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part; told without importing its module."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all ranks must ask; another one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def meta_names(model: nn.Module) -> list[str]:
    """Parameters and buffers without data; torch computes garbage with them on CPU and says nothing."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in tensors if any(part.is_meta for part in inner_tensors(tensor))]


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return inner_tensors(tensors[0])[0].device if tensors else torch.device("cpu")


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers, by name."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters of two and more dimensions, by name: what the weight of a layer is made of.

    >>> list(matrices(nn.Linear(3, 2)))
    ['weight']
    """
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim >= 2}


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer under every name it has, quantized weights as one tensor."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in own_tensors(module):
            yield (f"{prefix}.{key}" if prefix else key), tensor


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply ``function`` to every tensor in nested containers; a tokenizer's mapping becomes a dict.

    >>> map_tensors(torch.neg, {"x": (torch.ones(1), None)})
    {'x': (tensor([-1.]), None)}
    """

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        return map_tensors(function, dict(leaf)) if isinstance(leaf, Mapping) else leaf

    return tree_map(apply, batch)


@dataclass(frozen=True)
class Difference:
    """By how much two tensors differ; prints as a few words."""

    count: int
    total: int
    largest: float
    forms: str = ""
    """Both dtypes and shapes, where these differ and numbers cannot be compared."""

    def __str__(self) -> str:
        return self.forms or f"{self.count} of {self.total} numbers differ, by up to {self.largest:.3g}"


def difference(expected: Tensor, given: Tensor) -> Difference | None:
    """How ``given`` differs from ``expected``, or None when they are equal bit for bit."""
    if (given.shape, given.dtype) != (expected.shape, expected.dtype):
        forms = f"{given.dtype} {tuple(given.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        return Difference(expected.numel(), expected.numel(), float("inf"), forms)
    if torch.equal(_bits(given), _bits(expected)):
        return None
    a, b = expected.detach().cpu().double(), given.detach().cpu().double()
    gap = (a - b).abs().nan_to_num(nan=float("inf"))  # a NaN on one side is no small difference
    return Difference(int((a != b).sum()), a.numel(), gap.max().item())
