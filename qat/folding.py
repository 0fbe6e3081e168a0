"""`fold_outliers`: move the scale of channels from activations into weights, before a model is prepared.

Where a few channels of an activation are far larger than the others, one scale for the whole tensor leaves few codes to
the others. SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438, eq. 3 and 4) divides channel j by s_j where
it is made, and multiplies column j of every weight that reads it.

Factors are powers of two here, so no product loses a bit, and a folded model gives the outputs of before, bit for bit.
That makes knowledge of architectures needless. One run proposes groups: a norm or a linear layer, and the layers that
read its output. Random factors then *prove* them: a group whose fold changes any output is left alone. What it trades
away: a proof holds for the operations that its batch shows, and takes a few runs of the model.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError, SpecError, StateError, listed
from qat.files.examples import flatten_outputs
from qat.formats import LayerTypes
from qat.hosts import get_target
from qat.inspection import inspect
from qat.layers import layer_class
from qat.observers import Best
from qat.probing import kept_modes, run
from qat.quantizers import StraightThrough
from qat.quantizers.activation import ActivationQuantizer, fake_quantize_output
from qat.spec import QuantSpec
from qat.tensors import TOLERANCE, model_device

__all__ = ["FoldReport", "FoldedGroup", "fold_outliers"]

_STRENGTHS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_ROWS = 256  # of a layer's inputs, on which errors are measured
_EXPONENTS = 8  # of factors; in a proof too, so that what clamps or saturates shows itself
_OFFSET_EXPONENTS = 2  # in the proof of a norm that adds 1 to its weight, since that sum is rounded
_OUTPUTS = 4096  # elements of a layer's output that a proof compares
_NEAREST = 4  # linear layers before a reader that are tried as its producer


@dataclass(frozen=True)
class FoldedGroup:
    """A norm or a linear layer, and the layers that read its output."""

    producer: str
    readers: tuple[str, ...]
    strength: float
    """Part of the channels' scale that moved into the weights; 0: the group was left alone."""
    error_before: float
    """Squared error of the readers' outputs by quantization, relative to their squares, in the mean over readers."""
    error_after: float


@dataclass(frozen=True)
class FoldReport:
    """What was folded; prints as a summary, `table` as a line for each group."""

    groups: tuple[FoldedGroup, ...]
    left_out: tuple[str, ...]
    """Norms before quantized layers that cannot be folded, as where their output goes elsewhere too."""

    def __str__(self) -> str:
        folded = sum(group.strength > 0 for group in self.groups)
        out = f"; {len(self.left_out)} norms cannot be folded: {listed(self.left_out, 4)}" if self.left_out else ""
        return f"folded {folded} of {len(self.groups)} groups{out}"

    def table(self) -> str:
        """A line for each group: strength, error before and after, producer and readers."""
        width = max((len(group.producer) for group in self.groups), default=8)
        lines = [f"{'producer':{width}}  strength   before    after  readers"]
        for group in self.groups:
            errors = f"{group.error_before:7.1e}  {group.error_after:7.1e}"
            lines.append(f"{group.producer:{width}}  {group.strength:8.3g}  {errors}  {listed(group.readers, 4)}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Group:
    producer: str
    made: tuple[Tensor, ...]
    """What is divided: parameters of the producer, the channel first."""
    readers: Mapping[str, nn.Module]
    offset: tuple[Tensor, ...] = ()
    """Parameters that the producer adds 1 to: they become (1 + parameter) / s - 1, which rounds."""

    def kind(self) -> tuple[str, ...]:
        """Names without numbers: groups of one kind stand or fall together, as a rule."""
        return tuple(re.sub(r"\d+", "*", name) for name in (self.producer, *self.readers))


def fold_outliers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    spec: QuantSpec,
    target: str = "quanto",
    strength: float | Literal["best"] = "best",
) -> FoldReport:
    """Move the scale of outlying channels into the weights that read them. In place, before `qat.prepare`.

    The model computes what it computed before, bit for bit; a norm that adds 1 to its weight rounds once more, and is
    folded only for the serving dtype float32. Every process of a distributed run needs the same batches.

    Args:
        model: a float model.
        batches: see `qat.calibrate`; the first one proves which groups can be folded. All are kept while this runs.
        spec: what will be quantized. Only layers with an activation type count.
        target: who will load the export, as in `qat.prepare`.
        strength: the alpha of SmoothQuant's ``s = max|x|^alpha / max|w|^(1 - alpha)``, above 0 and up to 1, for
            every group; the median of s is 1 here. "best": for each group what makes the smallest error of the
            outputs after it, which may be no fold.

    Raises:
        StateError: the model is prepared or frozen already, or has no data (meta device).
        SpecError, TargetError: see `qat.inspect`; or no layer has an activation type.
        CalibrationError: there are no batches, the model cannot run one, two runs of one differ, or one gives inf or
            NaN. The model is as before then.

    >>> model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[3].mul_(100)
    >>> print(fold_outliers(model, [torch.randn(8, 16)], spec=QuantSpec(activations="int8"), strength=0.5))
    folded 2 of 2 groups
    """
    if strength != "best" and not (isinstance(strength, int | float) and 0 < strength <= 1):
        raise SpecError(f"strength: must be above 0 and at most 1, or 'best', got {strength!r}: write strength=0.5")
    report = inspect(model, spec, target=target)
    format, dtype = get_target(target).format, spec.torch_dtype
    rows = [row for row in report.layers if row.weights is not None and row.activations is not None]
    types = {row.name: format.types(row.weights, row.activations, dtype) for row in rows if row.weights is not None}
    if not types:
        raise SpecError(
            "spec: no layer quantizes activations, so there is nothing to fold for: name a type of activations, "
            "as QuantSpec(activations='int8')"
        )
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise StateError(f"model: {empty[0]} is on the meta device and has no data: load the model's weights first")
    if isinstance(batches, Mapping | Tensor):
        raise CalibrationError(f"batches: must be several batches, got one {type(batches).__name__}: pass [batch]")
    batches = list(batches)
    if not batches:
        raise CalibrationError("batches: folding needs at least one batch, got none: pass some training batches")
    with kept_modes(model), torch.no_grad(), ExitStack() as undo:
        norms, pairs = _candidates(model.eval(), batches[0], types)
        proof = _Proof(model, batches[0])
        groups = proof.proven(norms)
        if dtype is torch.float32:
            groups += proof.proven([_adding_one(group) for group in norms if not _taken(group, groups)])
        for group in proof.proven(pairs):
            if not _taken(group, groups):
                groups.append(group)
        inputs = _Inputs(model, batches, {name for group in groups for name in group.readers if name in types})
        found = [_fold_best(group, inputs, types, strength, undo) for group in groups]
        if not proof.holds(groups):
            raise CalibrationError(
                "model: folded, it gives other outputs, since numbers leave the range of its dtype: fold in float32; "
                "nothing was changed"
            )
        undo.pop_all()
    return FoldReport(tuple(found), tuple(group.producer for group in norms if not _taken(group, groups)))


def _taken(group: _Group, groups: Iterable[_Group]) -> bool:
    return any(name in other.readers for other in groups for name in group.readers)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if layer_class(module) is not None}


def _weight(layer: nn.Module) -> Tensor:
    cls = layer_class(layer)
    assert cls is not None
    return cls.effective_weight(layer).detach()


def _run(model: nn.Module, batch: Any, number: int) -> Any:
    device = model_device(model)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return run(model, batch)
    except CalibrationError:
        raise
    except Exception as error:  # whatever the code of a model raises
        raise CalibrationError(
            f"batches: the model cannot run batch {number} ({type(error).__name__}: {error}): pass a tensor, a tuple "
            "of positional arguments or a mapping of keyword arguments of its forward, on its device"
        ) from error


@contextmanager
def _reading(layers: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Tell ``note`` of each input of each layer."""
    with ExitStack() as stack:
        for name, layer in layers.items():

            def hook(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                note(name, args[0] if args else kwargs["input"])

            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _candidates(model: nn.Module, batch: Any, types: Mapping[str, LayerTypes]) -> tuple[list[_Group], list[_Group]]:
    """Norms with the layers that read their output; and pairs of linear layers that stand close to each other."""
    layers, kept = _linear(model), []
    norms: dict[tuple[int, int], str] = {}
    readers: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    pairs: dict[str, list[str]] = {}

    def place(x: Tensor) -> tuple[int, int]:
        return x.untyped_storage().data_ptr(), x.shape[-1]  # the same for its views

    def made(name: str, module: nn.Module, y: Any) -> None:
        if isinstance(y, Tensor) and y.shape[-1:] == module.weight.shape:
            kept.append(y)  # so that no other tensor gets its place
            norms[place(y)] = name

    def read(name: str, x: Tensor) -> None:
        _require_finite(name, x, 0)
        if place(x) in norms:
            readers[norms[place(x)]][name] = layers[name]
        elif name in types:
            around = ".".join(name.split(".")[:-2])
            near = [n for n in pairs_before if n.startswith(around) and _weight(layers[n]).shape[0] == x.shape[-1]]
            pairs.setdefault(name, near[: -_NEAREST - 1 : -1])
        pairs_before.setdefault(name)

    pairs_before: dict[str, None] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 1 and not module._modules:
                hook = functools.partial(lambda name, module, _, y: made(name, module, y), name)
                stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(_reading(layers, read))
        _run(model, batch, 0)
    groups = []
    for norm, found in readers.items():
        if not types.keys().isdisjoint(found):
            groups.append(_Group(norm, _vectors(model.get_submodule(norm)), found))
    linear = []
    for name, near in pairs.items():
        linear += [_Group(n, (_weight(layers[n]), *_vectors(layers[n])), {name: layers[name]}) for n in near]
    return groups, linear


def _vectors(module: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p.detach() for p in module._parameters.values() if p is not None and p.ndim == 1)


def _adding_one(norm: _Group) -> _Group:
    weight, *others = norm.made
    return replace(norm, made=tuple(others), offset=(weight,))


def _require_finite(name: str, x: Tensor, batch: int) -> None:
    if not bool(x.isfinite().all()):
        raise CalibrationError(
            f"batches: batch {batch} gives inf or NaN in the input of layer {name!r}: check the batch and the model; "
            "nothing was changed"
        )


def _fold(group: _Group, factor: Tensor, undo: ExitStack) -> bool:
    """Fold in place, and let ``undo`` take it back; False as soon as a product would lose bits."""
    for tensor in group.offset:
        undo.callback(tensor.copy_, tensor.clone())
        tensor.copy_((1 + tensor.double()) / factor - 1)
    products = [(tensor, (1 / factor).reshape(-1, *[1] * (tensor.ndim - 1))) for tensor in group.made]
    for tensor, by in (*products, *((_weight(reader), factor) for reader in group.readers.values())):
        by = by.to(tensor)
        product = tensor * by
        if not torch.equal(product / by, tensor):
            return False
        undo.callback(tensor.mul_, 1 / by)
        tensor.copy_(product)
    return True


class _Proof:
    """The outputs of a model and of its linear layers for one batch, and whether they stay when groups are folded."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model, self._batch, self._layers = model, batch, _linear(model)
        self._wanted: dict[str, Tensor] = {}
        self._wanted = self._outputs()
        if not self.holds([]):
            raise CalibrationError(
                "batches: two runs of batch 0 in evaluation mode differ, or give NaN, so that no fold can be proven: "
                "make the model deterministic, and leave caches out of the batch"
            )

    def proven(self, groups: Sequence[_Group]) -> list[_Group]:
        """The groups that can be folded."""
        kinds: dict[tuple[str, ...], list[_Group]] = defaultdict(list)
        for group in groups:
            kinds[group.kind()].append(group)
        return [group for kind in kinds.values() for group in self._among(kind)]

    def _among(self, kind: list[_Group]) -> list[_Group]:
        if self._bears(kind):
            return kind
        if len(kind) == 1 or (len(kind) > 2 and not self._bears(kind[:1]) and not self._bears(kind[-1:])):
            return []  # where neither end can be folded, the others are not tried
        half = len(kind) // 2
        return self._among(kind[:half]) + self._among(kind[half:])

    def _bears(self, groups: list[_Group]) -> bool:
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as undo:
            for group in groups:
                weight = _weight(next(iter(group.readers.values())))
                most = _OFFSET_EXPONENTS if group.offset else _EXPONENTS
                exponents = torch.randint(-most, most + 1, weight.shape[1:], generator=generator)
                if not _fold(group, _power_of_two(exponents).to(weight.device), undo):
                    return False
            return self.holds(groups)

    def holds(self, folded: Sequence[_Group]) -> bool:
        """Whether outputs are as before, but those of the producers of ``folded``."""
        tolerance = TOLERANCE["float32"] if any(group.offset for group in folded) else 0.0
        producers = {group.producer for group in folded}
        for name, found in self._outputs().items():
            wanted = self._wanted[name]
            if name.partition("#")[0] in producers or torch.equal(found, wanted):
                continue
            if not tolerance or not bool((found - wanted).abs().max() <= tolerance * wanted.abs().max()):
                return False
        return True

    def _outputs(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def note(name: str, y: Tensor) -> None:
            seen[f"{name}#{len(seen)}"] = y.flatten()[:: y.numel() // _OUTPUTS + 1].clone()

        with ExitStack() as stack:
            for name, layer in self._layers.items():
                hook = functools.partial(lambda name, _, args, y: note(name, y), name)
                stack.callback(layer.register_forward_hook(hook).remove)
            outputs = flatten_outputs(_run(self._model, self._batch, 0))
        return seen | {f"#{name}": tensor for name, tensor in outputs.items()}


class _Inputs:
    """What layers read over all batches: the largest magnitude of each channel, and some rows; float32."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], names: set[str]) -> None:
        self.largest: dict[str, Tensor] = {}
        kept: dict[str, list[Tensor]] = defaultdict(list)
        share = max(1, _ROWS // len(batches))
        number = 0

        def note(name: str, x: Tensor) -> None:
            _require_finite(name, x, number)
            rows = x.reshape(-1, x.shape[-1])
            if len(rows):
                largest = rows.abs().amax(0).float()
                self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)
                kept[name].append(rows[:: -(-len(rows) // share)].float().clone())

        with _reading({name: model.get_submodule(name) for name in names}, note):
            for number, batch in enumerate(batches):
                _run(model, batch, number)
        self.rows = {name: torch.cat(rows) for name, rows in kept.items()}


def _power_of_two(exponents: Tensor) -> Tensor:
    return ((exponents.int() + 127) << 23).view(torch.float32)  # its bits: functions of powers may round


def _factor(largest: Tensor, columns: Tensor, strength: float) -> Tensor:
    """SmoothQuant's factors, ``(channels,)``, with a median of 1, rounded to powers of two; 1 for channels of zeros."""
    used = (largest > 0) & (columns > 0)
    exponents = strength * largest.log2() - (1 - strength) * columns.log2()
    exponents = (exponents - exponents[used].median()).round().where(used, 0.0) if bool(used.any()) else used.int()
    return _power_of_two(exponents.clamp(-_EXPONENTS, _EXPONENTS))


def _error(layers: Iterable[tuple[Tensor, Tensor, LayerTypes]], factor: Tensor) -> float:
    """Squared error of outputs, relative to their squares, in the mean over layers: rows, weight and types of each."""
    errors = []
    for rows, weight, types in layers:
        assert types.activations is not None
        x, folded = rows / factor, weight * factor
        quantizer = ActivationQuantizer(types.activations, types.dtype, Best()).to(x.device)
        quantizer.observe(x, folded)
        quantizer.refresh()
        value = StraightThrough().make(folded, types.weights, types.dtype).quantize(folded, torch.float32).value
        wanted, given = rows @ weight.T, fake_quantize_output(x, quantizer) @ value.T
        errors.append((given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
    return float(torch.stack(errors).mean())


def _fold_best(
    group: _Group, inputs: _Inputs, types: Mapping[str, LayerTypes], strength: float | str, undo: ExitStack
) -> FoldedGroup:
    """Fold a group by the strength that is asked for, or by the best one; it may stay as it is."""
    names = [name for name in group.readers if name in inputs.rows]
    layers = [(inputs.rows[name], _weight(group.readers[name]).float(), types[name]) for name in names]
    largest = torch.stack([inputs.largest[name] for name in names]).amax(0)
    columns = torch.cat([weight for _, weight, _ in layers]).abs().amax(0)
    before = _error(layers, torch.ones_like(largest))
    tried = {0.0: before} if isinstance(strength, str) else {}
    for alpha in _STRENGTHS if isinstance(strength, str) else (float(strength),):
        tried[alpha] = _error(layers, _factor(largest, columns, alpha))
    chosen = min(tried, key=lambda alpha: tried[alpha])
    with ExitStack() as own:
        if chosen and _fold(group, _factor(largest, columns, chosen), own):
            undo.enter_context(own.pop_all())
            return FoldedGroup(group.producer, tuple(group.readers), chosen, before, tried[chosen])
    return FoldedGroup(group.producer, tuple(group.readers), 0.0, before, before)
