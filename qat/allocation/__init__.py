"""`search`: which layer gets which type, where all of them together have a budget of bytes.

Layers differ in what their quantization costs the model. Each is scored alone at each type (`qat.allocation.damage`),
and the types with the smallest sum of damages that fit the budget are taken (`qat.allocation.knapsack`). What it trades
away: damages are added up as if layers did not act on each other, and training after it may mend one more than another.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from torch import nn

from qat.adapters import without_peft
from qat.allocation.damage import Score, damages
from qat.allocation.knapsack import allocate
from qat.allocation.state import State, batches_digest, model_digest
from qat.data import list_batches
from qat.errors import SpecError, StateError, listed, meant, shown
from qat.hosts import get_target
from qat.inspection import check_module, inspect
from qat.layers import ExpertMatrix
from qat.probing import several_processes
from qat.progress import counted
from qat.quantizers import Algorithm
from qat.spec import QuantSpec, WeightType
from qat.tensors import meta_names

__all__ = ["LayerChoice", "SearchReport", "search"]

_FLOAT = "float"
_Options = dict[str, dict[str, int]]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LayerChoice:
    """The type of one linear layer."""

    name: str
    weights: str
    """Its type, or "float"."""
    sizes: Mapping[str, int]
    """The types that it could have, and the bytes of its weight at each: codes, scales and shifts."""
    damages: Mapping[str, float] = field(default_factory=dict)
    """What each type costs the model; empty where there was no choice."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weight as chosen."""
        return self.sizes[self.weights]

    @property
    def damage(self) -> float:
        """What the chosen type costs the model."""
        return self.damages.get(self.weights, 0.0)


@dataclass(frozen=True)
class SearchReport:
    """The types that were chosen; prints as a summary, `table` as a line for each layer."""

    spec: QuantSpec
    """What `qat.prepare` takes, for the same target."""
    layers: tuple[LayerChoice, ...]
    budget: int
    nbytes: int
    """Bytes of the weights of all linear layers, float ones included: ``inspect(model, spec).bytes_after``."""
    score: Score

    @property
    def damage(self) -> float:
        """The sum of the layers' damages: nats a prediction, or a squared error relative to the squares."""
        return sum(layer.damage for layer in self.layers)

    def __str__(self) -> str:
        counts = Counter(layer.weights for layer in self.layers)
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        return f"{types}: {self.nbytes:,} of {self.budget:,} bytes, damage {self.damage:.3g} by {self.score}"

    def table(self) -> str:
        """A line for each layer: its type, its bytes, and its damage at each type that it could have."""
        width = max(map(len, (layer.name for layer in self.layers)), default=0)
        lines = [f"{'layer':{width}}  {'type':7}  {'bytes':>13}  damages"]
        for layer in self.layers:
            told = "  ".join(f"{kind} {damage:.2e}" for kind, damage in layer.damages.items()) or "no choice"
            lines.append(f"{layer.name:{width}}  {layer.weights:7}  {layer.nbytes:13,}  {told}")
        return "\n".join([*lines, str(self)])

    def yaml(self) -> str:
        """The spec as it stands in the configuration file of a recipe."""
        fields = self.spec.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump({"spec": {"weights": self.spec.weights} | fields}, sort_keys=False)


def search(
    model: nn.Module,
    spec: QuantSpec,
    batches: Iterable[Any],
    *,
    budget: int | str,
    target: str = "quanto",
    types: Sequence[str] = ("int2", "int4", "int8"),
    score: Score = "kl",
    algorithm: Algorithm | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SearchReport:
    """Choose the type of each layer, so that all weights fit ``budget`` and the model loses least. Changes nothing.

    Where the target has one type a checkpoint (``"diffusers"``), it chooses that type, and the layers that stay float.
    Weights alone are searched; an activation type of the spec stands in the result too.

    Args:
        model: a float model.
        spec: what to quantize. ``weights`` is not read; layers that ``overrides`` names keep what it says.
        batches: see `qat.calibrate`. All are kept, and with ``score="kl"`` the float outputs of all, too.
        budget: bytes of the weights of all linear layers, those that stay float included, as `qat.inspect` counts them
            (``bytes_after``). Or the name of a type: as many as if it were the spec's ``weights``.
        target: who will load the export, as in `qat.prepare`.
        types: what a layer may become: names of types, and ``"float"``.
        score: how the damage of a layer is measured. ``"kl"`` runs all batches for each layer and type: the divergence
            of the logits, or the squared distance of other outputs. ``"gradient"`` estimates the same from one
            gradient a batch; for a batch it holds the activations of a backward, and of all layers outputs and their
            errors for each type. ``"output"`` is the squared error of the layer's own output, relative to its squares,
            one layer at a time.
        algorithm: how scales are found; default `Automatic`. Scores are those of its start before training: of
            ``clip``, where a start needs data.
        forward: runs the model once for a batch, ``forward(model, batch)``, and returns its outputs.
        state: a file for the damages. A second search by the same arguments goes on with it; ``budget``, ``types`` and
            ``forward`` may change.
        progress: show a bar on the standard error stream.

    Raises:
        SpecError, TargetError, StateError: see `qat.inspect`; an argument is none of these; there are several
            processes; the budget is too small for the smallest types; the file ``state`` is none, has no folder, or
            belongs to another model, spec, or batches.
        CalibrationError: there are no batches, the model cannot run one, a layer was never reached, the outputs hold no
            prediction or are all zero, or a damage is inf or NaN.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> report = search(model, QuantSpec(), [torch.randn(4, 128)], budget="int4", types=("int2", "int8"))
    >>> report.nbytes <= inspect(model, QuantSpec(weights="int4")).bytes_after
    True
    """
    model = without_peft(model)
    _check(model, types, score, algorithm)
    check_module(model)
    report = inspect(model, spec, target=target)  # says what is wrong with it
    kinds = [kind for kind in types if kind != _FLOAT]
    known_types = get_target(target).format.qtypes
    if lacking := [kind for kind in kinds if kind not in known_types]:
        raise SpecError(
            f"types: target {target!r} has {sorted(known_types)}, got {lacking[0]!r}: give types=, of those"
        )
    sizes, plans, single = _options(model, spec, target, kinds, floats=_FLOAT in types)
    tied = {row.name: row.shared_with or row.name for row in report.layers}
    most, host = _bytes(model, spec, target, budget), get_target(target).host
    keys = {n: host.layer_key(model, tied[n]) for n in sizes}
    smallest = min(sum(min(options.values()) for options in _families(plan, keys).values()) for plan in plans)
    if most < smallest:
        raise SpecError(
            f"budget: must be {smallest:,} bytes at least, for layers that stay float and the smallest of "
            f"{', '.join(types)} everywhere else; got {most:,}: give more, add a smaller type, or exclude less"
        )
    batches = list_batches(batches, "a search")
    known = _state(model, spec, batches, target, score, algorithm, state)
    format = get_target(target).format
    wanted = {
        name: [format.types(kind, None, spec.torch_dtype) for kind in lacking]
        for name, options in sizes.items()
        if len(options) > 1
        and (lacking := [kind for kind in options if kind not in {_FLOAT, *known.damages.get(name, {})}])
    }
    if wanted:
        scores = damages(model, wanted, batches, score, algorithm, forward)
        for name, found in counted(scores, "scoring layers", progress, total=len(wanted)):
            known.add(name, found)
    chosen = _best(plans, keys, known.damages, most)
    if set(chosen.values()) == {_FLOAT}:
        raise SpecError(f"budget: the float model fits {most:,} bytes, so nothing would be quantized: give fewer")
    result = _written(spec, kinds, sizes, chosen, single)
    layers = []
    for name, options in sizes.items():
        scored = known.damages.get(name, {}) if len(options) > 1 else {}
        told = {kind: scored.get(kind, 0.0) for kind in options if scored}
        layers.append(LayerChoice(name, chosen[name], options, told))
    return SearchReport(result, tuple(layers), most, inspect(model, result, target=target).bytes_after, score)


def _check(model: nn.Module, types: Sequence[str], score: str, algorithm: Algorithm | None) -> None:
    known = (*get_args(WeightType), _FLOAT)
    if not isinstance(types, list | tuple) or any(t not in known for t in types) or not set(types) - {_FLOAT}:
        raise SpecError(f"types: must be some of {', '.join(known)}, not float alone; got {shown(types)}: list some")
    if score not in get_args(Score):
        raise SpecError(
            f"score: must be one of {get_args(Score)}, got {shown(score)}: choose one{meant(score, get_args(Score))}"
        )
    if not isinstance(algorithm, Algorithm | None):
        raise StateError(f"algorithm: must be an Algorithm such as LearnedAffine(), got {shown(algorithm)}")
    if several_processes():
        raise StateError(
            "model: each process would find types of its own: call qat.search in one process, and give its report.spec "
            "to all"
        )
    empty = meta_names(model) if isinstance(model, nn.Module) else []
    if empty:
        raise StateError(f"model: {empty[0]} is on the meta device, without numbers: load the weights first")


def _options(
    model: nn.Module, spec: QuantSpec, target: str, kinds: list[str], *, floats: bool
) -> tuple[_Options, list[_Options], bool]:
    """The types that each layer can have, with its bytes; the same for each choice that the target leaves; and whether
    it is single: one type a checkpoint.
    """
    reports = [inspect(model, spec.model_copy(update={"weights": kind}), target=target) for kind in kinds]
    one, other, *_ = get_args(WeightType)
    mixture = spec.model_copy(update={"weights": one, "overrides": {"*": other}})
    single = bool(get_target(target).host.spec_faults(mixture))
    sizes: _Options = {}
    for row in (row for report in reports for row in report.layers):
        sizes.setdefault(row.name, {})[row.weights or _FLOAT] = row.bytes_after
    blind = [row.name for row in reports[0].layers if row.class_name == ExpertMatrix.__name__]
    if blind := [name for name in blind if _is_searched(spec, name, sizes[name])]:
        raise SpecError(
            f"overrides: no damage of {len(blind)} matrices of experts can be seen, since no layer is called with what "
            f"a single one reads ({listed(blind, 3)}): give them a type, as by overrides={{'*experts*': 'int4'}}, or "
            "exclude them"
        )
    for row in reports[0].layers:
        if _is_searched(spec, row.name, sizes[row.name]):
            sizes[row.name].pop(_FLOAT, None)  # of a type that such a layer cannot have
            if single or floats:
                sizes[row.name][_FLOAT] = row.bytes_before
    if not single:
        return sizes, [sizes], single
    plans = [
        {name: {key: size for key, size in options.items() if key in (kind, _FLOAT)} for name, options in sizes.items()}
        for kind in kinds
    ]
    return sizes, plans, single


def _is_searched(spec: QuantSpec, name: str, options: Mapping[str, int]) -> bool:
    return set(options) != {_FLOAT} and not any(fnmatchcase(name, pattern) for pattern in spec.overrides)


def _bytes(model: nn.Module, spec: QuantSpec, target: str, budget: int | str) -> int:
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    if budget not in get_args(WeightType):
        raise SpecError(
            f"budget: must be bytes, an int, or the name of a type, got {shown(budget)}: a share b of bits a weight is "
            "int(weights * b / 8) bytes, and what stays float counts too"
        )
    return inspect(model, spec.model_copy(update={"weights": budget}), target=target).bytes_after


def _families(plan: Mapping[str, Mapping[str, Number]], keys: Mapping[str, str]) -> dict[str, Mapping[str, Number]]:
    """The sums over layers that the target cannot tell apart, for the types that all of them can have."""
    families: dict[str, Mapping[str, Number]] = {}
    for name, options in plan.items():
        other = families.get(keys[name])
        families[keys[name]] = options if other is None else {k: other[k] + v for k, v in options.items() if k in other}
    return families


def _best(
    plans: list[_Options],
    keys: Mapping[str, str],
    scored: Mapping[str, Mapping[str, float]],
    most: int,
) -> dict[str, str]:
    """The type of each layer, by the plan with the smallest damage."""
    found: list[tuple[float, dict[str, str]]] = []
    for plan in plans:
        sizes = _families(plan, keys)
        lost = {name: {kind: scored.get(name, {}).get(kind, 0.0) for kind in options} for name, options in plan.items()}
        costs = _families(lost, keys)
        options = [[(size, costs[key][kind]) for kind, size in kinds.items()] for key, kinds in sizes.items()]
        numbers = allocate(options, most)
        if numbers is not None:
            kinds = {key: list(sizes[key])[number] for key, number in zip(sizes, numbers, strict=True)}
            found.append((sum(costs[key][kinds[key]] for key in sizes), {name: kinds[keys[name]] for name in plan}))
    return min(found, key=lambda pair: pair[0])[1]


def _written(spec: QuantSpec, kinds: list[str], sizes: _Options, chosen: Mapping[str, str], single: bool) -> QuantSpec:
    searched = {name: kind for name, kind in chosen.items() if _is_searched(spec, name, sizes[name])}
    counts = Counter(kind for kind in searched.values() if kind != _FLOAT)
    base = counts.most_common(1)[0][0] if counts else kinds[0]
    others = {glob.escape(name): kind for name, kind in searched.items() if kind != base}
    change = {"exclude": (*spec.exclude, *others)} if single else {"overrides": {**spec.overrides, **others}}
    return spec.model_copy(update={"weights": base, **change})


def _state(
    model: nn.Module,
    spec: QuantSpec,
    batches: list[Any],
    target: str,
    score: str,
    algorithm: Algorithm | None,
    path: str | os.PathLike[str] | None,
) -> State:
    if path is None:
        return State(None, {})
    facts = {
        "model": model_digest(model),
        "batches": batches_digest(batches),
        "spec": spec.model_dump(mode="json", exclude={"weights"}),
        "target": target,
        "score": score,
        "algorithm": None if algorithm is None else algorithm.model_dump(mode="json"),
    }
    return State(Path(path), facts)
