"""Second moments of layers' inputs, ``mean(x x^T)``, collected by hooks over batches, within a budget of memory.

A layer with n inputs needs 4 n^2 bytes, and all layers of a large model together more than a device has. So layers are
taken in rounds, each of which runs all batches. Layers that read the same tensor share one matrix. Which ones do is
seen in the first batch; should a later batch tell otherwise, those layers get a round of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError

__all__ = ["BUDGET", "Moments", "rounds"]

BUDGET = 4 << 30
"""Bytes of all matrices of a round."""


def rounds(layers: Mapping[str, int], groups: Sequence[Sequence[str]], budget: int) -> Iterator[list[list[str]]]:
    """Split layers, each with its number of inputs, into rounds of groups that read one tensor; one group at least.

    >>> list(rounds({"q": 10, "k": 10, "up": 10, "down": 20}, [["q", "k"]], 1000))
    [[['q', 'k'], ['up']], [['down']]]
    """
    shared = {name: list(group) for group in groups for name in group}
    units = [shared.get(name, [name]) for name in layers if shared.get(name, [name])[0] == name]
    taken: list[list[str]] = []
    free = budget
    for unit in units:
        size = 4 * layers[unit[0]] ** 2
        if taken and size > free:
            yield taken
            taken, free = [], budget
        taken.append(unit)
        free -= size
    if taken:
        yield taken


class Moments:
    """The second moments of one round; hooks collect while it is open.

    >>> layer = nn.Linear(2, 1)
    >>> with Moments({"0": layer}, [["0"]]) as moments:
    ...     _ = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> moments.take(["0"])
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """

    def __init__(self, layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> None:
        self._layers, self._groups = layers, groups
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, Any] = {}
        self._handles: list[Any] = []
        self.apart: list[str] = []
        """Layers that do not always read the tensor of their group's first one."""

    def __enter__(self) -> Moments:
        for first, *others in self._groups:
            for name in (first, *others):
                hook = functools.partial(self._note, name, first, bool(others))
                self._handles.append(self._layers[name].register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._last.clear()

    @torch.no_grad()
    def _note(self, name: str, first: str, shared: bool, _: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if name != first:
            if self._last.get(first) is not x and name not in self.apart:
                self.apart.append(name)
            return
        if shared:
            self._last[first] = x
        rows = x.detach().reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            rows = rows.float()
            if first not in self._sums:
                self._sums[first] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._sums[first].addmm_(rows.t(), rows)
        self._counts[first] = self._counts.get(first, 0) + len(rows)

    def take(self, group: Sequence[str]) -> Tensor | None:
        """``mean(x x^T)`` of a group's inputs, float32, ``(in, in)``, summed over ranks, or None without inputs.

        Raises:
            CalibrationError: a batch gave inf or NaN.
        """
        first, total, count = group[0], self._sums.pop(group[0], None), self._counts.get(group[0], 0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            total, count = _reduced(total, count, self._layers[first])
        if total is None or not count:
            return None
        total /= count
        if not bool(total.isfinite().all()):
            raise CalibrationError(
                f"batches: give inf or NaN, or numbers whose squares overflow, in the input of layer {first!r}: check "
                "the batches and the model; nothing was changed"
            )
        return total


def _reduced(total: Tensor | None, count: int, layer: Any) -> tuple[Tensor, int]:
    """Sums over all ranks; a rank may have seen nothing."""
    weight = layer.effective_weight(layer)
    if total is None:
        total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    counts = torch.tensor(float(count), dtype=torch.float64, device=weight.device)
    torch.distributed.all_reduce(total)
    torch.distributed.all_reduce(counts)
    return total, int(counts)
