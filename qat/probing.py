"""What one run shows of a model: the layouts its linear layers read, and who reads a weight uncalled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qat.errors import SpecError
from qat.tensors import matrices

__all__ = ["Probe", "compiled_parts", "kept_modes", "run"]


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its training mode back at the end, one by one: what a user keeps in evaluation mode stays so.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with kept_modes(model):
    ...     _ = model.eval()
    >>> [module.training for module in model]
    [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Probe(TorchFunctionMode):
    """What a run shows: the layouts in which linear layers are read, and weights that are read without a call.

    ``layers`` are those to watch, by name, with their ``weights``.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        self.read: dict[str, str] = {}
        """Layer to the class of the module that reads its weight."""
        self._layers = layers
        self._names = {id(p): name for name, layer in layers.items() for p in matrices(layer).values()}
        self._running: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def start(self, model: nn.Module) -> None:
        """Begin to look, right before ``model`` runs or in a hook before its forward."""
        self._running = [model]
        for module in list(model.modules())[1:]:
            self._handles += [
                module.register_forward_pre_hook(lambda m, _: self._running.append(m)),
                module.register_forward_hook(lambda *_: self._running.pop() and None, always_call=True),
            ]
        for name, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, layouts=self.inputs[name]: layouts.extend(map(_layout, args[:1]))
                )
            )
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Look no longer, and leave no hook."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def watch(self, model: nn.Module, batch: Any) -> Probe:
        """Run ``batch`` as for evaluation and as for training (some models have two ways), and leave no trace.

        Raises:
            SpecError: the model cannot run it.
        """
        buffers = [(m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None]
        self.start(model)
        try:
            with kept_modes(model), torch.random.fork_rng(devices=[]):
                run(model.eval(), batch)
                with suppress(ValueError):  # batch norm: one row is enough for evaluation only
                    run(model.train(), batch)
        except Exception as error:  # whatever the model's own code raises
            raise SpecError(
                f"example_inputs: the model cannot run them ({type(error).__name__}: {error}): pass one batch with the "
                "arguments of its forward, on its device and in its dtype; a model on the meta device cannot be run: "
                "leave example_inputs out"
            ) from error
        finally:
            self.stop()
            for module, key, buffer, kept in buffers:
                module._buffers[key] = buffer.copy_(kept)
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note every function that makes a tensor from a weight outside the module that holds it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs)):
            name = self._names.get(id(value)) if isinstance(value, torch.Tensor) else None
            if name is None or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
                continue  # its dtype or shape is no reading
            reader = self._running[-1]
            if not any(value is parameter for parameter in reader._parameters.values()) and _reads(func, args, value):
                self.read[name] = type(reader).__name__
        return result


def _reads(func: Any, args: tuple[Any, ...], value: torch.Tensor) -> bool:
    """Whether a function reads the numbers of ``value``, and not only its dtype, device or shape."""
    name = getattr(func, "__name__", "")
    if name in ("to", "type_as"):
        return args[0] is value
    return not (name.endswith("_like") or name.startswith("new_"))


def _layout(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def compiled_parts(model: nn.Module) -> tuple[str, ...]:
    """How the names of layers in compiled modules begin, of which a run in Python says nothing."""
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
    )


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a mapping as keyword arguments, a tuple or list as positional ones, else as one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)
