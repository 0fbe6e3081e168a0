"""What one run shows of a model: the layouts its linear layers read, and the weights that are read without one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from qat.errors import CalibrationError, QatError, SpecError
from qat.tensors import map_tensors, model_device

__all__ = [
    "Probe",
    "Readers",
    "Weights",
    "compiled_parts",
    "kept_modes",
    "run",
    "run_batch",
    "running",
    "seeded",
    "several_processes",
    "together",
    "watched",
]


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


def several_processes() -> bool:
    """Whether this is one of several processes of ``torch.distributed``."""
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return known and torch.distributed.get_world_size() > 1


@contextmanager
def together(kind: type[QatError] = CalibrationError) -> Iterator[None]:
    """Where one of several processes fails within, all raise and name it: else the others would wait for it.

    They raise an error of the same class, where that is one of ours, else of ``kind``.
    """
    if not several_processes():
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told: list[tuple[type[QatError], str] | None] = [None] * torch.distributed.get_world_size()
    own = type(failed) if isinstance(failed, QatError) else kind
    torch.distributed.all_gather_object(told, failed and (own, str(failed) or type(failed).__name__))
    for rank, fault in enumerate(told):
        if fault is not None:
            raise fault[0](f"rank {rank}: {fault[1]}") from failed


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers by ``seed`` (None: as they come) within the block, and as they would be without it afterwards."""
    # Where CUDA is not in use yet, torch.manual_seed would leave a seed for when it is.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield


class Probe(TorchFunctionMode):
    """What one batch shows: the layouts in which linear layers are read, and weights that are read without a call."""

    def __init__(self, layers: Mapping[str, tuple[nn.Module, Mapping[str, nn.Parameter]]]) -> None:
        """Look at ``layers``: each a module, and the parameters of its weight."""
        super().__init__()
        self.inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
        self.read: dict[str, str] = {}
        """Layer to the class of the module that reads its weight."""
        self._masters = {name: set(map(id, masters.values())) for name, (_, masters) in layers.items()}
        self._layers = {name: module for name, (module, _) in layers.items()}
        self._weights = Weights({name: masters.values() for name, (_, masters) in layers.items()})
        self._running: list[nn.Module] = []

    @torch.no_grad()
    def watch(self, model: nn.Module, batch: Any) -> Probe:
        """Run ``batch`` as for evaluation and as for training (some models have two ways), and leave no trace.

        Its tensors may be on any device.

        Raises:
            SpecError: the model cannot run it.
        """
        handles = [m.register_forward_pre_hook(lambda m, _: self._running.append(m)) for m in model.modules()]
        handles += [m.register_forward_hook(self._leave) for m in model.modules()]
        for name, layer in self._layers.items():
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, layouts=self.inputs[name]: layouts.extend(
                        _layout(x) for x in args[:1] if torch.is_tensor(x)
                    )
                )
            )
        buffers = [(m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None]
        device = model_device(model)
        try:
            batch = map_tensors(lambda x: x.to(device), batch)
            with kept_modes(model), seeded(None), self:
                run(model.eval(), batch)
                with suppress(ValueError):  # batch norm: one row is enough for evaluation only
                    run(model.train(), batch)
        except Exception as error:  # whatever the model's own code raises
            raise SpecError(
                f"example_inputs: the model cannot run them ({type(error).__name__}: {error}): pass one batch with the "
                "arguments of its forward, in its dtype; pass none where a model on the meta device needs numbers"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for module, key, buffer, kept in buffers:
                module._buffers[key] = buffer.copy_(kept)
        return self

    def _leave(self, *_: Any) -> None:  # what a hook returns takes the place of the output
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note every function that makes a tensor from a weight outside the module that holds it."""
        result = func(*args, **(kwargs or {}))
        reader = self._running[-1] if self._running else None
        for name in self._weights.read_by(func, args, kwargs, result):
            # A layer that a weight is tied to reads its own.
            if reader is None or not any(own in self._masters[name] for own in map(id, reader._parameters.values())):
                self.read[name] = type(reader).__name__
        return result


class Readers:
    """Which layers read the same tensor, in every call; ``hazard`` says what is wrong with an input, or None."""

    def __init__(self, layers: Mapping[str, nn.Module], hazard: Callable[..., str | None] | None = None) -> None:
        self.hazards: dict[str, str] = {}
        """Layer to what is wrong with one of its calls."""
        self._hazard = hazard
        self._first: Any = WeakIdKeyDictionary()
        self._found: dict[str, set[str]] = {name: set() for name in layers}
        self._handles = [
            layer.register_forward_pre_hook(functools.partial(self._note, name), with_kwargs=True)
            for name, layer in layers.items()
        ]

    def _note(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if self._hazard is not None and (hazard := self._hazard(x, keyword=not args)) is not None:
            self.hazards.setdefault(name, hazard)
        self._found[name].add(self._first.setdefault(x, name))

    def groups(self) -> list[list[str]]:
        """Names of layers with one input, two at least, in the order of their calls. Stops looking."""
        for handle in self._handles:
            handle.remove()
        groups: dict[str, list[str]] = {}
        for name, first in self._found.items():
            if len(first) == 1:
                groups.setdefault(min(first), []).append(name)
        return [names for first, names in groups.items() if first in names and len(names) > 1]


class Weights:
    """The weights of layers, by identity, and which of them a torch function reads."""

    def __init__(self, layers: Mapping[str, Iterable[nn.Parameter]]) -> None:
        self._names: dict[int, str] = {}
        self._aliases: list[torch.Tensor] = []  # kept, so that no other tensor gets their identity
        self.add(layers)

    def add(self, layers: Mapping[str, Iterable[nn.Parameter]]) -> None:
        """Know the parameters that layers have by now, too."""
        self._names |= {id(p): name for name, parameters in layers.items() for p in parameters}

    def lack(self, args: Any, kwargs: Any) -> bool:
        """Whether a parameter among the arguments of a call is not known."""
        return any(isinstance(x, nn.Parameter) and id(x) not in self._names for x in tree_leaves((args, kwargs)))

    def read_by(self, func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[str]:
        """The layers whose numbers a call reads; views, and asking for a dtype or a shape, read none."""
        found = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if not found or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            return
        function = getattr(func, "__name__", "")
        if function == "clone" or (isinstance(result, torch.Tensor) and _shares(result, found[0])):
            self._names[id(result)] = self._names[id(found[0])]
            self._aliases.append(result)
        elif not (
            getattr(func, "namespace", None) == "qat"  # our operators, in a layer that was compiled with its caller
            or function.startswith("new_")
            or function.endswith("_like")
            or function in ("new", "__deepcopy__")
        ):
            for value in found:
                if function not in ("to", "type_as", "view_as", "expand_as", "reshape_as") or args[0] is value:
                    yield self._names[id(value)]


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except NotImplementedError:  # a subclass without storage
        return False


def _layout(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def compiled_parts(model: nn.Module) -> tuple[str, ...]:
    """How the names of layers in compiled modules begin, of which a run in Python says nothing."""
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
    )


@contextmanager
def watched(modules: Mapping[str, nn.Module], note: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Tell ``note`` of every call: the name of the module, its first argument and its output."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, y: Any, name: str = name) -> None:
                note(name, next(iter((*args, *kwargs.values())), None), y)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def running(number: int, remedy: str = "", what: str = "the model") -> Iterator[None]:
    """Say which batch a model cannot run, as `CalibrationError`; errors of ours pass. Nothing compiled runs meanwhile.

    Compiled code may ignore the hooks that look at a model, and cannot run frozen layers.
    """
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    except QatError:
        raise
    except Exception as error:  # whatever the code of a model, of a kernel or of a user raises
        remedy = remedy or (
            "pass a tensor, a tuple of positional arguments or a mapping of keyword arguments of its forward, or say "
            "how to run it by forward="
        )
        raise CalibrationError(
            f"batches: {what} cannot run batch {number} ({type(error).__name__}: {error}): {remedy}"
        ) from error


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a mapping as keyword arguments, a tuple or list as positional ones, else as one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def run_batch(
    model: nn.Module,
    batch: Any,
    number: int,
    forward: Callable[[nn.Module, Any], Any] | None,
    what: str = "the model",
) -> Any:
    """What ``forward``, or the model on its own device, returns for a batch; see `running` for failures."""
    with running(number, "" if forward is None else "mend the function forward", what):
        if forward is not None:
            return forward(model, copy.copy(batch))  # which may take things out of it
        device = model_device(model)
        return run(model, map_tensors(lambda x: x.to(device), batch))
