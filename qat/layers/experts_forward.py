"""`QExperts`: how a module of experts runs with quantized matrices, by its own forward.

Its class is made of the float one. Before a forward it finds the experts that are read, and fake-quantizes these in one
call. The module sees them in place of its parameters, closed up, and routes with the numbers that they have then. So
every form of the product runs as it is: loops, batched and grouped ones, and gates of a class's own.

Neither the fake-quantized matrices nor copies of masters are kept for backward: `qat.layers.recomputed`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.layers.base import QuantizedLayer, within_layer
from qat.layers.expert_forms import Form
from qat.layers.functional import autocast_dtype, fake_quantized
from qat.layers.recomputed import Recomputed
from qat.quantizers.activation import LearnedScale, fake_quantize_output, with_zero_gradients
from qat.quantizers.base import WeightQuantizer

__all__ = ["QExperts", "quantized_class"]

_OF_MODULES = frozenset(vars(nn.Module()))


class _Read(NamedTuple):
    """Which experts a forward reads, and what it is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    experts: Sequence[int]
    seen: frozenset[int]
    """Those with a token."""
    gone: int = 0
    """How many experts the forward does not know of."""


class QExperts(nn.Module):
    """A module of experts whose matrices are prepared or frozen; abstract, see `quantized_class`."""

    form: ClassVar[Form]
    of: ClassVar[Any]
    """The float class."""

    # Which experts are read is seen in numbers, which no graph has: so a compiler leaves this to Python.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward, of the fake-quantized matrices."""
        if getattr(self, "_is_replica", False):
            raise StateError("model: DataParallel copies modules without their experts: use DistributedDataParallel")
        layers = {key: self._layers(key) for key in self.form.keys}
        prepared = [layer for found in layers.values() for layer in found if isinstance(layer, QuantizedLayer)]
        if prepared and not any(layer.mode.weights or layer.mode.observe for layer in prepared):
            with within_layer():
                return super().forward(*args, **kwargs)
        read = self._read(args, kwargs)
        dtype = autocast_dtype(next(iter((*args, *kwargs.values()))))
        kept = Recomputed() if torch.is_grad_enabled() else None
        with nullcontext() if kept is None else kept.hooks():
            with within_layer():
                seen_so = {key: self._matrices(key, found, read, dtype, kept) for key, found in layers.items()}
            output = self._run(read, seen_so, layers)
        idle: list[nn.Parameter] = []
        for layer in prepared:
            if layer.mode.weights and layer.index in read.seen:
                layer.note_run()
            if layer.index not in read.experts:
                idle += layer.weight_quantizer.parameters()
            idle += [q.move for q in layer.activation_quantizers() if isinstance(q, LearnedScale) and not q.used]
        return with_zero_gradients(output, idle) if idle and torch.is_grad_enabled() else output

    def _run(self, read: _Read, changed: dict[str, Any], layers: dict[str, list[Any]]) -> Any:
        """The float class's forward, which sees what is ``changed`` in place of the module's own."""
        args, forward = _positional(self, read.args, read.kwargs), super().forward
        first, *_, last = map(self._given, (*layers.values(), *layers.values()))
        if first is not None:
            args = (first(args[0]), *args[1:])
        if last is not None and self.form.inner:
            own = getattr(self, self.form.inner)
            changed[self.form.inner] = lambda x: last(own(x))
            if not self._uses_inner():  # another form of the product does
                forward = functools.partial(self.of.forward.__globals__["grouped_mm_experts_forward"], self)
        if read.gone:
            changed |= {name: getattr(self, name) - read.gone for name in self.form.counts}
            others = {n: p for n, p in self._parameters.items() if p is not None and p.ndim > 1 and n not in changed}
            total = getattr(self, self.form.counts[0])
            changed |= {name: p[_index(read, p)] for name, p in others.items() if len(p) == total}
        before = {name: vars(self)[name] for name in changed if name in vars(self)}
        vars(self).update(changed)  # where a lookup comes before that of parameters
        try:
            return forward(*args)
        finally:
            for name in changed:
                del vars(self)[name]
            vars(self).update(before)

    def _given(self, layers: list[Any]) -> Callable[[Tensor], Tensor] | None:
        """What the input of the matrices at one parameter goes through, one scale for all experts; None: nothing."""
        if not layers or not isinstance(layers[0], QuantizedLayer):
            return layers[0].given if layers and layers[0].quantizes_input else None
        layer: Any = layers[0]
        quantizer, mode = layer.input_quantizer, layer.mode
        active = layer.active_input_quantizer() if mode.weights else None
        if quantizer is None or (active is None and not mode.observe):
            return None

        def given(x: Tensor) -> Tensor:
            if mode.observe:
                with within_layer():
                    master: Any = self._parameters[layer.key]
                    rows = (master.transpose(1, 2) if self.form.transposed else master).detach().flatten(0, 1)
                    quantizer.observe(x, rows, training=mode.activations)
            if active is not None and mode.watch is not None:
                mode.watch(active, x)
            return x if active is None else fake_quantize_output(x, active)

        return given

    def _uses_inner(self) -> bool:
        """Whether the form of the product that is configured calls what gives the last matrix its input."""
        if self.form.inner != "_apply_gate" or getattr(self, "config", None) is None:
            return True
        form = self.config._experts_implementation
        loop = getattr(self.of.forward, "__wrapped__", self.of.forward)
        shown = self.form.inner in loop.__code__.co_names
        return form in ("batched_mm", "grouped_mm") or (form in (None, "eager") and shown)

    def _layers(self, key: str) -> list[Any]:
        """The layers of all experts at one parameter; empty where it stays float."""
        experts = (self._modules.get(str(index)) for index in range(len(self._modules)))
        return [expert._modules[key] for expert in experts if expert is not None and key in expert._modules]

    def _read(self, args: Any, kwargs: Any) -> _Read:
        form, total = self.form, getattr(self, self.form.counts[0])
        everyone = range(total)
        if not form.argument:
            return _Read(args, kwargs, everyone, frozenset(everyone))
        place = _place_of(self.of, form.argument)
        routes = args[place] if place < len(args) else kwargs[form.argument]
        seen = _seen(routes, form, total)
        if form.kind == "rows" or len(seen) == total:
            return _Read(args, kwargs, everyone, frozenset(seen))
        read = seen or [0]  # no product takes no matrices
        if form.kind == "indices":
            numbers = torch.searchsorted(torch.tensor(read, device=routes.device), routes).to(routes.dtype)
            routes = torch.where(routes < total, numbers, routes - (total - len(read)))
        else:
            routes = routes[read] if isinstance(routes, Tensor) else [routes[expert] for expert in read]
        if place < len(args):
            args = (*args[:place], routes, *args[place + 1 :])
        else:
            kwargs = kwargs | {form.argument: routes}
        return _Read(args, kwargs, read, frozenset(seen), total - len(read))

    def _matrices(
        self, key: str, layers: list[Any], read: _Read, dtype: torch.dtype | None, kept: Recomputed | None
    ) -> Tensor:
        """What the forward sees in place of a parameter: ``(experts, out, in)``, or as it is stored."""
        master: Any = self._parameters.get(key)
        chosen = [layers[expert] for expert in read.experts] if layers else []
        if chosen and {isinstance(layer, QuantizedLayer) for layer in chosen} != {master is not None}:
            raise StateError(
                f"model: {key} of its experts is computed before each forward, as by an adapter of it, or only a part "
                "is frozen: put adapters on the float model, or take the masters from a checkpoint"
            )
        if chosen and master is None:
            return self._stored([layer.value() for layer in chosen])
        index = None if len(read.experts) == len(master) else _index(read, master)

        def rows() -> Tensor:
            part: Tensor = master if index is None else master[index]
            return (part.transpose(1, 2) if self.form.transposed else part).flatten(0, 1)

        made = rows()
        again = rows if kept is None else kept.add(made, rows, [master])
        if chosen:
            for layer in chosen:
                layer._require_quantizers_beside(master)
            dtype = dtype or master.dtype
            made = _quantized(chosen, made, dtype)
            if kept is not None:
                quantizers = [layer.weight_quantizer for layer in chosen]
                states = [t for quantizer in quantizers for t in (*quantizer.parameters(), *quantizer.buffers())]
                kept.add(made, lambda: _quantized(chosen, again(), dtype), states)
        return self._stored(made.view(len(read.experts), -1, made.shape[1]))

    def _stored(self, matrices: Tensor | list[Tensor]) -> Tensor:
        """Matrices, ``(out, in)``, in the order in which the float module stores them."""
        stacked = torch.stack(matrices) if isinstance(matrices, list) else matrices
        return stacked.transpose(1, 2) if self.form.transposed else stacked

    def __getattr__(self, name: str) -> Any:
        """A parameter that was frozen, for whoever reads it outside a forward: the values of all experts."""
        layers = self._layers(name) if name in self.form.keys else []
        if not layers or isinstance(layers[0], QuantizedLayer):
            return super().__getattr__(name)
        return self._stored([layer.value() for layer in layers])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the float class, since no module holds this one."""
        return _rebuilt, (self.of, self.form), vars(self)


@functools.cache
def quantized_class(cls: Any, form: Form) -> type[QExperts]:
    """The class that a module of experts gets with its first prepared or frozen layer."""
    return type(f"Quantized{cls.__name__}", (QExperts, cls), {"form": form, "of": cls, "__module__": cls.__module__})


def _rebuilt(cls: Any, form: Form) -> QExperts:
    made = quantized_class(cls, form)
    return made.__new__(made)


@functools.cache
def _place_of(cls: Any, argument: str) -> int:
    """Where an argument stands in a call of the forward."""
    return list(inspect.signature(cls.forward).parameters).index(argument) - 1


def _positional(module: QExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments by position, as every form of the product takes them."""
    return inspect.signature(module.of.forward).bind(module, *args, **kwargs).args[1:] if kwargs else args


def _index(read: _Read, parameter: Tensor) -> Tensor:
    return torch.tensor(read.experts, device=parameter.device)


@torch.no_grad()
def _seen(routes: Any, form: Form, total: int) -> list[int]:
    """The experts that have a token, in order; this waits for the device, as a loop over experts does."""
    if form.kind == "indices":
        return [expert for expert in routes.unique().tolist() if expert < total]
    if form.kind == "rows":
        return routes.reshape(total, -1).ne(0).any(1).nonzero().flatten().tolist()  # type: ignore[no-any-return]
    sizes = routes.tolist() if isinstance(routes, Tensor) else routes
    return [expert for expert, size in enumerate(sizes) if size]


def _quantized(layers: list[Any], rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The fake-quantized ``rows`` of matrices below each other, ``(experts * out, in)``, with their gradients."""
    joined = _joined(layers, rows)
    if joined is not None:
        return fake_quantized(rows, joined.quantize(rows, dtype), joined)
    parts = []
    for layer, part in zip(layers, rows.chunk(len(layers)), strict=True):
        quantizer = layer.weight_quantizer
        is_on = layer.mode.weights
        parts.append(fake_quantized(part, quantizer.quantize(part, dtype), quantizer) if is_on else part.to(dtype))
    return torch.cat(parts)


def _joined(layers: list[Any], rows: Tensor) -> WeightQuantizer | None:
    """One quantizer for the matrices of all, where groups of rows do not depend on each other; else None.

    A call for each of a hundred experts would take longer than all the arithmetic.
    """
    quantizers = [layer.weight_quantizer for layer in layers]
    first, options = quantizers[0], _options(quantizers[0])
    alike = first.by_groups and all(type(q) is type(first) and _options(q) == options for q in quantizers)
    if not alike or not all(layer.mode.weights for layer in layers):
        return None
    groups = len(rows) // len(layers) * (rows.shape[1] // (first.qtype.group_size(rows.shape[1]) or rows.shape[1]))
    state: dict[str, Tensor | None] = {}
    for name, one in (*first._parameters.items(), *first._buffers.items()):
        if one is None or not one.ndim:
            state[name] = one
        elif len(one) == groups:
            state[name] = torch.cat([getattr(quantizer, name) for quantizer in quantizers])
        else:
            return None
    joined: WeightQuantizer = first.with_state(state)
    return joined


def _options(quantizer: WeightQuantizer) -> dict[str, Any]:
    return {name: value for name, value in vars(quantizer).items() if name not in _OF_MODULES}
