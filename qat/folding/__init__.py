"""`fold_outliers`: move the scale of channels from activations into weights, before a model is prepared.

Where a few channels of an activation are far larger than the others, one scale for the whole tensor leaves few codes to
the others. SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438, eq. 3 and 4) divides channel j by s_j where
it is made, and multiplies column j of every weight that reads it.

Factors are powers of two here, so no product loses a bit, and a folded model gives the outputs of before, bit for bit.
That makes knowledge of architectures needless. One run proposes groups: a norm or a linear layer, and the layers that
read its output. Random factors then *prove* them: a group whose fold changes any output is left alone. What it trades
away: a proof holds for the operations that the batches show, and takes a few runs of the model.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qat.adapters import adapters, without_peft
from qat.data import list_batches
from qat.errors import CalibrationError, SpecError, StateError, listed
from qat.folding.groups import EXPONENTS, Group, candidates, power_of_two, require_finite
from qat.folding.proof import Proof, agree, elements
from qat.formats import LayerTypes
from qat.hosts import get_target
from qat.inspection import check_module, inspect
from qat.observers import Best
from qat.probing import kept_modes, run_batch, seeded, watched
from qat.quantizers import StraightThrough
from qat.quantizers.activation import ActivationQuantizer, fake_quantize_output
from qat.spec import QuantSpec
from qat.tensors import meta_names

__all__ = ["FoldReport", "FoldedGroup", "fold_outliers"]

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_ROWS = 256  # of a layer's inputs, on which errors are measured
_GAIN = 0.9  # an error falls to this at least, or the group stays as it is: a sample of rows is not exact
_Forward = Callable[[nn.Module, Any], Any] | None
_WIDE = (torch.float32, torch.float64)  # dtypes in which a sum with 1 can be told from a wrong one


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


def fold_outliers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    spec: QuantSpec,
    target: str = "quanto",
    strength: float | Literal["best"] = "best",
    forward: _Forward = None,
) -> FoldReport:
    """Move the scale of outlying channels into the weights that read them. In place, before `qat.prepare`.

    In evaluation mode, the model computes what it computed before, bit for bit. Norms that add 1 to their weight, and
    adaptive norms, round once more; in float32 and float64 they are folded too. Every process of a distributed run
    needs the same batches.

    Args:
        model: a float model.
        batches: see `qat.calibrate`. The first one proves which groups can be folded, in 15 runs and more, so a small
            one will do; the others confirm it. All are kept while this runs.
        spec: what will be quantized. Only layers with an activation type count.
        target: who will load the export, as in `qat.prepare`.
        strength: the alpha of SmoothQuant's ``s = max|x|^alpha / max|w|^(1 - alpha)``, above 0 and up to 1, for
            every group; the median of s is 1 here. "best": for each group what makes the smallest error of the
            outputs after it, which may be no fold.
        forward: runs the model for a batch, as in `qat.calibrate`. Compared is what the model returns in each call, and
            what ``forward`` returns.

    Raises:
        StateError: the model is prepared or frozen already, has no data (meta device), or has adapters.
        SpecError, TargetError: see `qat.inspect`; or no layer has an activation type.
        CalibrationError: there are no batches, the model cannot run one, two runs of one differ, one gives inf or NaN,
            or a later one shows operations that the first did not. The model is as before then.

    >>> model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> with torch.no_grad():
    ...     _ = model[0].weight[3].mul_(100)
    >>> print(fold_outliers(model, [torch.randn(8, 16)], spec=QuantSpec(activations="int8"), strength=0.5))
    folded 2 of 2 groups
    """
    if strength != "best" and not (isinstance(strength, int | float) and 0 < strength <= 1):
        raise SpecError(f"strength: must be above 0 and at most 1, or 'best', got {strength!r}: write strength=0.5")
    check_module(model)
    model = without_peft(model)
    if around := [name for name, _ in adapters(model)]:
        raise StateError(
            f"model: {len(around)} layers have adapters (first: {around[0]!r}), whose weights would have to be folded "
            "too: call qat.fold_outliers before get_peft_model"
        )
    report = inspect(model, spec, target=target)
    format, dtype = get_target(target).format, spec.torch_dtype
    rows = [row for row in report.layers if row.weights is not None and row.activations is not None]
    types = {row.name: format.types(row.weights, row.activations, dtype) for row in rows if row.weights is not None}
    if not types:
        raise SpecError(
            "spec: no layer quantizes activations, so there is nothing to fold for: name a type of activations, "
            "as QuantSpec(activations='int8')"
        )
    if empty := meta_names(model):
        raise StateError(f"model: {empty[0]} is on the meta device and has no data: load the model's weights first")
    batches = list_batches(batches, "folding")
    with kept_modes(model), torch.no_grad(), ExitStack() as undo:
        first = functools.partial(_run, model.eval(), forward, batches[0], 0)
        norms, adaptive, linear = candidates(model, first, types)
        proof = Proof(model, first)
        groups = proof.proven(norms)
        rest = [group.adding_one() for group in norms if group.readers.keys().isdisjoint(_readers(groups))]
        groups += proof.proven([group for group in rest + adaptive if group.offset[0].dtype in _WIDE])
        for group in proof.proven(linear):
            if group.readers.keys().isdisjoint(_readers(groups)):
                groups.append(group)
        inputs = _Inputs(model, forward, batches, _readers(groups) & types.keys())
        groups = [group for group in groups if group.readers.keys() & inputs.rows]  # some may read empty tensors
        found = [_fold_best(group, inputs, types, strength, undo) for group in groups]
        for number, batch in enumerate(batches):
            if not agree(elements(_run(model, forward, batch, number)), inputs.answers[number], groups):
                raise CalibrationError(
                    f"batches: folded, the model gives other outputs for batch {number}: pass that batch first, since "
                    "the first one proves what can be folded, or fold in float32, if the model is float16"
                )
        undo.pop_all()
    left_out = [group.producer for group in norms + adaptive if group.readers.keys().isdisjoint(_readers(groups))]
    return FoldReport(tuple(found), tuple(dict.fromkeys(left_out)))


def _readers(groups: Iterable[Group]) -> set[str]:
    return {name for group in groups for name in group.readers}


def _run(model: nn.Module, forward: _Forward, batch: Any, number: int) -> Any:
    with seeded(0):
        if forward is None:
            return run_batch(model, batch, number, None)
        answers: list[Any] = []
        with watched({"": model}, lambda _, x, y: answers.append(y)):
            returned = run_batch(model, batch, number, forward)
        return [returned, *answers]


class _Inputs:
    """What layers read over all batches: the largest magnitude of each channel, and some rows; and what came of it."""

    def __init__(self, model: nn.Module, forward: _Forward, batches: Sequence[Any], names: set[str]) -> None:
        self.largest: dict[str, Tensor] = {}
        self.answers: list[dict[str, Tensor]] = []
        kept: dict[str, list[Tensor]] = defaultdict(list)
        share = max(1, _ROWS // len(batches))
        number = 0

        def note(name: str, x: Tensor, _: Any) -> None:
            require_finite(name, x, number)
            rows = x.reshape(-1, x.shape[-1])
            if len(rows):
                largest = rows.abs().amax(0).float()
                self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)
                kept[name].append(rows[:: -(-len(rows) // share)].float().clone())

        with watched({name: model.get_submodule(name) for name in names}, note):
            for number, batch in enumerate(batches):
                self.answers.append(elements(_run(model, forward, batch, number)))
        self.rows = {name: torch.cat(rows) for name, rows in kept.items()}


def _factor(largest: Tensor, columns: Tensor, strength: float, most: Tensor) -> Tensor:
    """SmoothQuant's factors, ``(channels,)``, with a median of 1, rounded to powers of two; 1 for channels of zeros."""
    used = (largest > 0) & (columns > 0)
    exponents = strength * largest.log2() - (1 - strength) * columns.log2()
    exponents = (exponents - exponents.where(used, torch.nan).nanmedian()).round().where(used, 0.0)
    return power_of_two(torch.minimum(exponents, most).clamp(min=-EXPONENTS))


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
    group: Group, inputs: _Inputs, types: Mapping[str, LayerTypes], strength: float | str, undo: ExitStack
) -> FoldedGroup:
    """Fold a group by the strength that is asked for, or by the best one; it may stay as it is."""
    weights = {name: weight.float() for name, weight in group.weights().items() if name in inputs.rows}
    layers = [(inputs.rows[name], weight, types[name]) for name, weight in weights.items()]
    largest = torch.stack([inputs.largest[name] for name in weights]).amax(0)
    columns = torch.cat(list(weights.values())).abs().amax(0)
    strengths = _STRENGTHS if isinstance(strength, str) else (float(strength),)
    factors = {alpha: _factor(largest, columns, alpha, group.limit(largest)) for alpha in strengths}
    errors = {alpha: _error(layers, factor) for alpha, factor in factors.items()}
    before = _error(layers, torch.ones_like(largest))
    best, names = min(errors, key=lambda alpha: errors[alpha]), tuple(group.readers)
    if errors[best] < _GAIN * before or not isinstance(strength, str):
        with ExitStack() as own:
            if group.fold(factors[best], own):
                undo.enter_context(own.pop_all())
                return FoldedGroup(group.producer, names, best, before, errors[best])
    return FoldedGroup(group.producer, names, 0.0, before, before)
