"""A transformer's arguments with holes: which belong to each example, which all share.

Three recorded calls tell which is which: one caption, another one, and both at once. A tensor whose first dimension
doubles belongs to each example; so does the item of a list of such a length, where the captions' items differ. What is
equal in all three calls is shared. Anything else depends on the captions in a way that no batch of other captions could
be put together from, and is an error: to share the first caption's value would silently train on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from recipes.data import DataError

__all__ = ["Rows", "Template", "merged_arguments"]

Rows: TypeAlias = dict[str, Tensor]
"""What belongs to one example, by where it stands among the transformer's arguments; without a batch dimension."""


@dataclass(frozen=True)
class _PerExample:
    path: str


@dataclass(frozen=True)
class _Listed:
    """A list with an item for each example."""

    path: str
    tensors: bool
    """Else numbers."""


@dataclass(frozen=True)
class _Longest:
    """A tensor without a batch dimension that begins alike for all captions: a batch has its longest caption's."""

    path: str


@dataclass(frozen=True)
class _Repeated:
    """A list with the same item for each example."""

    value: Any


@dataclass(frozen=True)
class _Lengths:
    """A mask that a pipeline passes only for captions of different lengths."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Template:
    """A transformer's arguments with holes: for latents, timesteps, and what belongs to each example."""

    arguments: Mapping[str, Any]
    sample: str
    """The argument that takes the noised latents."""
    sample_shape: tuple[int, ...]
    """Of one example."""
    sample_dtype: torch.dtype
    timestep_dtype: torch.dtype
    timestep_divisor: float
    """The pipeline passes the scheduler's timestep divided by this (below 1: multiplied)."""

    def fill(self, rows: Sequence[Rows], sample: Tensor, timesteps: Tensor) -> dict[str, Any]:
        """Put a batch of arguments together.

        Args:
            rows: what `rows` returned, for each example.
            sample: noised latents, (batch, *sample_shape).
            timesteps: the scheduler's, (batch,).

        Raises:
            DataError: captions of different lengths, for a pipeline that passes no mask.
        """
        times = timesteps.to(self.timestep_dtype)
        times = times / self.timestep_divisor if self.timestep_divisor >= 1 else times * (1 / self.timestep_divisor)
        filled = {name: self._filled(value, rows) for name, value in self.arguments.items()}
        return {**filled, self.sample: sample, "timestep": times.to(self.timestep_dtype)}

    def rows(self, call: Mapping[str, Any], example: int = 0) -> Rows:
        """Take what belongs to one example out of a recorded call, to the CPU.

        Raises:
            DataError: what all examples share is not what it was in the calls that the template was made from.
        """
        found: Rows = {}
        for name in dict.fromkeys([*self.arguments, *call]):
            if name not in (self.sample, "timestep"):
                _collect(self.arguments.get(name), call.get(name), example, name, found)
        return found

    def _filled(self, value: Any, rows: Sequence[Rows]) -> Any:
        if isinstance(value, _PerExample):
            return self._stacked([row[value.path] for row in rows])
        if isinstance(value, _Listed):
            return [row[value.path] if value.tensors else row[value.path].item() for row in rows]
        if isinstance(value, _Longest):
            return max((row[value.path] for row in rows), key=len)
        if isinstance(value, _Repeated):
            return [value.value] * len(rows)
        if isinstance(value, _Lengths):
            lengths = self._lengths(rows)
            longest = max(lengths)
            if min(lengths) == longest:
                return None  # as the pipeline does
            return torch.stack([torch.arange(longest) < length for length in lengths]).to(value.dtype)
        if isinstance(value, dict):
            return {name: self._filled(item, rows) for name, item in value.items()}
        if type(value) is tuple:
            return tuple(self._filled(item, rows) for item in value)
        return value

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        lengths = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if len(set(lengths)) == 1:
            return torch.stack(list(tensors))
        if not any("mask" in name for name in self.arguments):
            raise DataError(
                "max_sequence_length: captions have different lengths and the pipeline passes no mask: give a batch "
                "size of 1"
            )
        longest = max(lengths)
        return torch.stack([torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])]) for t in tensors])

    def _lengths(self, rows: Sequence[Rows]) -> list[int]:
        """Of each caption, from the first of its tensors that has a length of its own."""
        for path in rows[0]:
            lengths = [len(row[path]) if row[path].ndim else 0 for row in rows]
            if len(set(lengths)) > 1:
                return lengths
        return [0] * len(rows)


def merged_arguments(
    first: Mapping[str, Any], second: Mapping[str, Any], both: Mapping[str, Any], left_out: Sequence[str]
) -> dict[str, Any]:
    """Tell what belongs to each example from what all share, for `Template.arguments`.

    Args:
        first: the transformer's arguments for a caption alone.
        second: for another caption alone.
        both: for the two at once.
        left_out: names of arguments that are filled in otherwise.

    Raises:
        DataError: an argument depends on the captions in a way that is not understood.

    >>> made = merged_arguments({"x": torch.ones(1, 3)}, {"x": torch.zeros(1, 3)}, {"x": torch.ones(2, 3)}, ())
    >>> Template(made, "latents", (1,), torch.float32, torch.float32, 1.0).rows({"x": torch.ones(1, 3)})
    {'x': tensor([1., 1., 1.])}
    """
    names = [name for name in dict.fromkeys([*first, *both]) if name not in left_out]
    merged = {name: _merge(first.get(name), second.get(name), both.get(name), name) for name in names}
    return {name: value for name, value in merged.items() if value is not None}


def _merge(first: Any, second: Any, both: Any, path: str) -> Any:
    if isinstance(both, Mapping) and isinstance(first, Mapping) and isinstance(second, Mapping):
        return {name: _merge(first.get(name), second.get(name), both[name], f"{path}.{name}") for name in both}
    if type(first) is type(second) is type(both) is tuple and len(first) == len(second) == len(both):
        parts = zip(first, second, both, strict=True)
        return tuple(_merge(*part, f"{path}.{number}") for number, part in enumerate(parts))
    if isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(both, Tensor):
        if first.ndim and (len(first), len(second), len(both)) == (1, 1, 2):
            return _PerExample(path)
        if not _same(first, second) and first.ndim and first.shape[1:] == second.shape[1:]:
            shorter, longer = sorted((first, second), key=len)
            if _same(longer, both) and _same(longer[: len(shorter)], shorter):
                return _Longest(path)
    if first is None and second is None and isinstance(both, Tensor) and both.ndim == 2:
        return _Lengths(both.dtype)
    if isinstance(both, list) and (_length(first), _length(second), len(both)) == (1, 1, 2):
        if _same(first, second) and _same(both, first * 2):
            return _Repeated(_kept(first[0]))
        if _same(both, [*first, *second]):
            if all(isinstance(item, Tensor) for item in both):
                return _Listed(path, True)
            if all(type(item) in _WIDEST for item in both):
                return _Listed(path, False)
    if _same(first, second) and _same(first, both):
        return _kept(first)
    raise DataError(
        f"model: the argument {path} of the transformer depends on the captions in a way that is not understood: it is "
        f"{_shown(first)} for one caption, {_shown(second)} for another and {_shown(both)} for both: give another "
        "pipeline, or a max_sequence_length that makes captions alike"
    )


def _collect(value: Any, found: Any, example: int, path: str, rows: Rows) -> None:
    """Fill ``rows`` from what was ``found`` at a place of the template, ``value``."""
    if isinstance(value, _Lengths):
        return
    fits: bool
    if isinstance(value, _PerExample | _Longest):
        if fits := isinstance(found, Tensor):
            rows[path] = _row(found[example] if isinstance(value, _PerExample) else found)
    elif isinstance(value, _Listed):
        if fits := isinstance(found, list) and (isinstance(found[example], Tensor) or type(found[example]) in _WIDEST):
            rows[path] = _row(found[example])
    elif isinstance(value, dict):
        if fits := isinstance(found, Mapping) and found.keys() == value.keys():
            for name, item in value.items():
                _collect(item, found[name], example, f"{path}.{name}", rows)
    elif type(value) is tuple:
        if fits := isinstance(found, tuple) and len(found) == len(value):
            for number, item in enumerate(value):
                _collect(item, found[number], example, f"{path}.{number}", rows)
    elif isinstance(value, _Repeated):
        fits = isinstance(found, list) and all(_same(value.value, item) for item in found)
    else:
        fits = _same(value, found)
    if not fits:
        raise DataError(
            f"model: the argument {path} of the transformer depends on the caption: it is {_shown(found)}, where it "
            f"was {_shown(value)} for others: give another pipeline, or a max_sequence_length that makes captions alike"
        )


def _row(value: Any) -> Tensor:
    # In the widest types, so that a number comes back as it was.
    kept = value if isinstance(value, Tensor) else torch.tensor(value, dtype=_WIDEST[type(value)])
    return kept.detach().cpu().clone()


_WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64}


def _kept(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _same(one: Any, two: Any) -> bool:
    """Whether two arguments are equal, as far as that can be told: objects of other types count as equal."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and torch.equal(one.detach().cpu(), two.detach().cpu())
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, bool | int | float | complex | str | bytes | torch.dtype | None):
        return bool(one == two)
    return type(one) is type(two)


def _shown(value: Any) -> str:
    if isinstance(value, _Repeated):
        return _shown([value.value])
    if isinstance(value, _PerExample | _Listed | _Longest):
        return "another value for each"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
