"""What is known of a prepared model's runs: whether it ran, and which weights it read without calling their layer.

A model may call a layer and use its weight a second time, or use it in training only. Then a part of it trains with the
float weight, and nothing in the layers tells so. So the first run in training mode, and the first in evaluation mode,
are watched by a torch function mode. It belongs to one run in one thread, and costs nothing afterwards. Runs of
compiled models, and of the copies that DataParallel makes at each step, are not watched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from qat.distributed import sharded
from qat.errors import listed
from qat.layers import inside_layer, quantized_layers
from qat.optimizers import watch
from qat.probing import Weights, compiled_parts

__all__ = ["note_runs", "observe_runs", "read_without_call", "run_state", "runs", "set_run_state", "stop_watch"]

_RUNS, _READ = "_qat_runs", "_qat_read_without_call"
logger = logging.getLogger("qat")


class _Watch(TorchFunctionMode):
    """Notes the weights that one run of a model reads outside their layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.weights, self.shards = Weights(self._masters()), sharded(model)
        self.read: set[str] = set()

    def _masters(self) -> dict[str, Iterable[nn.Parameter]]:
        return {name: layer.masters(layer).values() for name, layer in quantized_layers(self.model)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling() and not inside_layer():
            if self.shards and self.weights.lack(args, kwargs):  # a unit has whole parameters in their place now
                self.weights.add(self._masters())
            self.read.update(self.weights.read_by(func, args, kwargs, result))
        return result


class _Thread(threading.local):
    watch: _Watch | None = None


_thread = _Thread()


def observe_runs(model: nn.Module) -> list[RemovableHandle]:
    """Take note of the runs of a prepared model from now on."""
    return [model.register_forward_pre_hook(_before), model.register_forward_hook(_after, always_call=True)]


def runs(model: nn.Module) -> frozenset[bool]:
    """In which modes a model itself was called, outside compiled code, since it was prepared or loaded.

    ``training`` True, False or both.
    """
    return getattr(model, _RUNS, frozenset())


def note_runs(model: nn.Module, modes: frozenset[bool]) -> None:
    """Set what `runs` says."""
    setattr(model, _RUNS, modes)


def run_state(model: nn.Module) -> dict[str, Any]:
    """What is known of a prepared model's runs, as plain data; a state dict of the model lacks it."""
    layers = {name: [layer.reached, layer.trained] for name, layer in quantized_layers(model)}
    return {"modes": sorted(runs(model)), "layers": layers}


def set_run_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take over what `run_state` gave, after the load of the weights that ran so."""
    note_runs(model, frozenset(state["modes"]))
    for name, layer in quantized_layers(model):
        layer.reached, layer.trained = state["layers"].get(name, (layer.reached, layer.trained))


def read_without_call(model: nn.Module) -> str | None:
    """A sentence on the layers whose float weight was read without a call; None if there are none."""
    read: frozenset[str] = getattr(model, _READ, frozenset())
    if not read:
        return None
    return (
        f"model: the weights of {len(read)} prepared layers are used without calling their layer, in float "
        f"({listed(sorted(read), 4)}): exclude those layers in the spec"
    )


def _before(model: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling() or getattr(model, "_is_replica", False):
        return  # under checkpointing, compiled code may set no attributes; replicas last for one step
    stop_watch()  # what an interrupt has left
    if model.training not in runs(model) and not compiled_parts(model):
        _thread.watch = _Watch(model)
        _thread.watch.__enter__()  # type: ignore[no-untyped-call]
    watch(model)  # a copy of a prepared model is not known yet


def _after(model: nn.Module, _: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    watched = stop_watch()
    if output is not None and not getattr(model, "_is_replica", False):
        note_runs(model, runs(model) | {model.training})  # without an output, the run has failed
    if watched is not None and watched.read:
        setattr(model, _READ, getattr(model, _READ, frozenset()) | watched.read)
        logger.warning("%s", read_without_call(model))


def stop_watch() -> _Watch | None:
    """End the watch of this thread, if there is one."""
    watched, _thread.watch = _thread.watch, None
    if watched is not None:
        watched.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    return watched
