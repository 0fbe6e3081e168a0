"""Tensors that backward computes again: whatever operations save of them is only noted, not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qat.errors import StateError

__all__ = ["Recomputed"]


class _Again:
    """A tensor that can be made again; it is kept from the first use in backward until the graph is gone."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor], reads: Iterable[Tensor]) -> None:
        self.dtype = tensor.dtype
        self._make = make
        self._versions = [(read, read._version) for read in reads]
        self._made: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if self._made is None:
            if any(read._version != version for read, version in self._versions):
                raise StateError(
                    "model: weights or scales of experts changed between forward and backward: step optimizers after "
                    "backward"
                )
            self._made = self._make()
        return self._made


class _Part(NamedTuple):
    """What an operation has saved of such a tensor."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Outer(NamedTuple):
    """What hooks around these made of another tensor, as those of checkpointing."""

    packed: Any
    unpack: Callable[[Any], Tensor]


class Recomputed:
    """The tensors of one forward that operations within `hooks` do not keep.

    >>> weight, kept = torch.ones(2, requires_grad=True), Recomputed()
    >>> with kept.hooks():
    ...     doubled = weight * 2
    ...     _ = kept.add(doubled, lambda: weight * 2, [weight])
    ...     loss = doubled.square().sum()
    >>> loss.backward()
    >>> weight.grad
    tensor([8., 8.])
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[_Again, StorageWeakRef]] = {}
        self._outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def add(self, tensor: Tensor, make: Callable[[], Tensor], reads: Iterable[Tensor]) -> Callable[[], Tensor]:
        """Let ``make`` give ``tensor`` again, from what it ``reads``; a view of that is kept as any other tensor."""
        again, reads = _Again(tensor, make, reads), list(reads)
        if all(_storage(read) != _storage(tensor) for read in reads):
            # Its place in memory is no other's as long as there is a weak reference.
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._known[_storage(tensor)] = again, reference
        return again

    def hooks(self) -> AbstractContextManager[object]:
        """The block in which operations save tensors."""
        if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
            return nullcontext()  # within a transform of torch.func
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Any:
        again, _ = self._known.get(_storage(tensor), (None, None))
        if again is not None and again.dtype is tensor.dtype:
            return _Part(again, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor if self._outer is None else _Outer(self._outer[0](tensor), self._outer[1])


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Part):
        return packed.again().as_strided(packed.size, packed.stride, packed.offset)
    return packed.unpack(packed.packed) if isinstance(packed, _Outer) else packed


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a subclass without storage
        return -1
