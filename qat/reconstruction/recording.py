"""How a block is called: its arguments, and what it returned, recorded by hooks while the model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.errors import CalibrationError, QatError, listed
from qat.probing import run_batch, seeded, watched
from qat.tensors import map_tensors

__all__ = ["Call", "Recorder", "with_inputs"]


class Call(NamedTuple):
    """One call of a block: its arguments, and what of its outputs counts; on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    devices: list[torch.device]
    """Where the tensors among the arguments were, in their order."""
    outputs: list[Tensor]

    def error(self, block: nn.Module) -> Tensor:
        """Squared error of what the block gives now, relative to the squares of the outputs: float32 scalar."""
        places = iter(self.devices)
        # A copy, since a block may change its arguments, as caches are.
        args, kwargs = copy.deepcopy(map_tensors(lambda x: x.to(next(places)), (self.args, self.kwargs)))
        found = _hidden_states(block(*args, **kwargs))
        errors = []
        for y, target in zip(found, self.outputs, strict=True):
            wanted = target.to(y.device).float()
            size = wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
            errors.append((y.float() - wanted).square().sum() / size)
        return torch.stack(errors).mean()


def _hidden_states(outputs: Any) -> list[Tensor]:
    """The first tensor of what a block returns, and others alike: of as many dimensions and features."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise CalibrationError("blocks: a block returns no tensor of floating-point numbers: name others as blocks=")
    return [t for t in tensors if (t.ndim, t.shape[-1:]) == (tensors[0].ndim, tensors[0].shape[-1:])]


class _StopError(QatError):
    """Ends a forward of the model once the block is recorded; one of ours, so that `running` lets it pass."""


class Recorder:
    """Runs a model on batches, and records how a block is called."""

    def __init__(
        self, model: nn.Module, batches: list[Any], forward: Callable[[nn.Module, Any], Any] | None, seed: int
    ) -> None:
        self._model, self._batches, self._forward, self._seed = model, batches, forward, seed
        self._counts: dict[str, list[int]] = {}

    def count(self, blocks: Mapping[str, nn.Module]) -> list[str]:
        """The names of the blocks in the order of their first calls; remembers how often each batch calls each."""
        self._counts, number = {}, 0

        def note(name: str, *_: Any) -> None:
            self._counts.setdefault(name, [0] * len(self._batches))[number] += 1

        with watched(blocks, note):
            for number in range(len(self._batches)):
                self._run(number)
        if missed := [name for name in blocks if name not in self._counts]:
            raise CalibrationError(
                f"batches: {len(missed)} blocks were never reached in {len(self._batches)} batches "
                f"({listed(missed, 3)}): pass batches that use them, or name the other blocks as blocks="
            )
        return list(self._counts)

    def record(self, name: str, block: nn.Module) -> list[list[Call]]:
        """The calls of a block in each batch."""
        found = []
        for number, count in enumerate(self._counts[name]):
            calls: list[Call] = []
            if count:
                with _recording(block, calls, count):
                    self._run(number)
            found.append(calls)
        return found

    def _run(self, number: int) -> None:
        with seeded(self._seed + number), torch.no_grad(), suppress(_StopError):
            run_batch(self._model, self._batches[number], number, self._forward)


@contextmanager
def _recording(block: nn.Module, calls: list[Call], count: int) -> Iterator[None]:
    """Put the next calls of a block into ``calls``, and stop after as many as ``count``."""
    started: list[tuple[Any, Any, list[torch.device]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        devices: list[torch.device] = []

        def waiting(x: Tensor) -> Tensor:
            devices.append(x.device)
            return x.detach().cpu()

        started.append((*copy.deepcopy(map_tensors(waiting, (args, kwargs))), devices))

    def after(_: nn.Module, args: Any, outputs: Any) -> None:
        calls.append(Call(*started.pop(), [t.detach().to("cpu", copy=True) for t in _hidden_states(outputs)]))
        if len(calls) == count:
            raise _StopError

    with block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after):
        yield


def with_inputs(name: str, wanted: list[list[Call]], given: list[list[Call]]) -> list[list[Call]]:
    """Calls with the outputs of the float block and the arguments that arrive in the quantized model."""

    def shapes(calls: list[Call]) -> list[list[torch.Size]]:
        return [[t.shape for t in call.outputs] for call in calls]

    for number, (ours, theirs) in enumerate(zip(wanted, given, strict=True)):
        if shapes(ours) != shapes(theirs):
            raise CalibrationError(
                f"batches: batch {number} calls block {name!r} with other shapes, or less often, once the "
                "blocks before it are quantized: pass inputs='float'"
            )
    return [
        [call._replace(outputs=target.outputs) for target, call in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(wanted, given, strict=True)
    ]
