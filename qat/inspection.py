"""What will be quantized, what will not, and why, before anything is changed.

`inspect` decides for every linear layer; `qat.prepare` does exactly what it decided. A layer stays float for a
reason, and the reason is printed: the spec says so, the object is not exactly an `nn.Linear`, somebody reads its
weight without calling it, its weight is tied, a stock kernel cannot run it, the loader keeps it in float32, the
target cannot name it apart from a float one, or quantized activations would harm it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from qat.errors import SpecError, StateError, TargetError
from qat.probing import Probe
from qat.qtypes import QTYPES, group_size
from qat.sensitivity import sensitive_part
from qat.spec import LayerSpec, QuantSpec
from qat.targets import Target, get_target, input_hazard, kernel_hazard, loses_bias_on_cuda

__all__ = ["InspectReport", "LayerInspection", "inspect"]

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LayerInspection:
    """One linear layer's fate."""

    name: str
    kind: str
    """Class name."""
    shape: tuple[int, int]
    """(out_features, in_features)."""
    weights: str | None
    """Type of the quantized weight; None: stays float."""
    activations: str | None
    group_size: int | None
    """Elements that share a scale; None for 8-bit types and whole rows."""
    reason: str
    """Why it stays float, or which pattern chose its type."""
    bytes_before: int
    """Bytes of the weight in the serving dtype."""
    bytes_after: int
    """Bytes of the weight as exported: codes, scales and shifts, and the float twin of a weight that was tied."""


@dataclass(frozen=True)
class InspectReport:
    """Every linear layer, and the totals; prints as a table."""

    target: str
    spec: QuantSpec
    layers: tuple[LayerInspection, ...]
    parameters: int
    """All parameters of the model as prepared, shared ones once: an untied weight and its twin are two."""
    quantized_parameters: int
    notes: tuple[str, ...] = ()
    """What else a user should know (leaf-name collisions, a tie that will be broken)."""

    @property
    def quantized_share(self) -> float:
        """Share of all parameters that will be quantized, 0 to 1."""
        return self.quantized_parameters / max(1, self.parameters)

    @property
    def linear_share(self) -> float:
        """Share of the linear layers' weights that will be quantized, 0 to 1."""
        total = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return self.quantized_parameters / max(1, total)

    @property
    def bytes_before(self) -> int:
        """Bytes of all linear weights in the serving dtype."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all linear weights as exported."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        data = asdict(replace(self, spec=QuantSpec()))
        return data | {
            "spec": self.spec.model_dump(mode="json"),
            "quantized_share": self.quantized_share,
            "linear_share": self.linear_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        """A table: one line a layer, then the totals."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'shape':>13}  {'weights':8}  {'group':>5}  {'MiB':>15}  reason"]
        for layer in self.layers:
            sizes = f"{layer.bytes_before / 2**20:.2f} -> {layer.bytes_after / 2**20:.2f}"
            kind = (layer.weights or "float") + (f"+{layer.activations}" if layer.activations else "")
            group = str(layer.group_size or "row") if layer.weights else "-"
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {kind:8}  {group:>5}  {sizes:>15}  {layer.reason}".rstrip()
            )
        lines.append(
            f"{self.quantized_share:.1%} of {self.parameters:,} parameters quantized for target {self.target!r}; "
            f"linear weights {self.bytes_before / 2**20:.1f} MiB in {self.spec.dtype} -> "
            f"{self.bytes_after / 2**20:.1f} MiB"
        )
        return "\n".join([*lines, *self.notes])


class _Facts:
    """What several decisions need to know of the whole model, gathered once."""

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.model = model
        self.probe = probe
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[id(module)].append(name)
        self.holders = Counter(
            id(p) for module in model.modules() for p in module._parameters.values() if p is not None
        )
        tied = getattr(model, "all_tied_weights_keys", None) or {}  # on the meta device objects may not be shared yet
        self.tied_keys = set(tied) | set(tied.values())
        self.head = getattr(model, "get_output_embeddings", lambda: None)()

    def tied(self, name: str, module: nn.Linear) -> bool:
        """Whether another module holds this layer's weight too."""
        return f"{name}.weight" in self.tied_keys or self.holders[id(module.weight)] > 1


@dataclass
class _Decision:
    """A layer's fate while it is being decided."""

    module: nn.Linear
    layer: LayerSpec | None
    reason: str
    explicit: bool
    could_run: LayerSpec | None = None
    """For a layer left out only by a default of ours: the types it would run with."""


class _Tie(NamedTuple):
    """What comes of a tie that is broken."""

    copied: bool
    """The layer gets a copy of the weight; False: on the meta device the two may be separate already."""
    twin: bool
    """The weight stays in the file as floats too."""
    counted: bool
    """Those floats are counted with this layer, being in no other row."""


def inspect(model: nn.Module, spec: QuantSpec, target: str = "quanto", *, example_inputs: Any = None) -> InspectReport:
    """Decide for every linear layer of ``model`` what ``spec`` means for it. Changes nothing; works on the meta device.

    Args:
        model: any module.
        spec: what to quantize.
        target: who will load the export: ``"quanto"``, ``"transformers"`` or ``"diffusers"``.
        example_inputs: one batch (tensor, tuple or mapping), run through the float model to find the layers whose
            input the stock kernels cannot read, or whose weight is used without calling them; these stay float.

    Raises:
        SpecError: it is no spec, a pattern matches nothing, nothing at all would be quantized, or the model cannot run
            ``example_inputs``.
        TargetError: the target cannot express the spec, or cannot load such a model.
        StateError: the model is prepared or frozen already.

    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> report = inspect(model, QuantSpec(weights="int4", overrides={"2": "int8"}))
    >>> [(layer.name, layer.weights, layer.group_size) for layer in report.layers]
    [('0', 'int4', 128), ('2', 'int8', None)]
    """
    if not isinstance(spec, QuantSpec):
        raise SpecError(
            f"spec: must be a QuantSpec, got {spec!r}: write QuantSpec(weights='int8'), or QuantSpec(**spec)"
        )
    room = get_target(target)
    faults = [*room.model_faults(model), *room.spec_faults(spec)]
    if faults:
        raise TargetError("\n".join(faults))
    linears = dict(_linear_layers(model))
    spec.check_patterns(linears)
    probe = Probe(linears)
    if example_inputs is not None:
        probe.watch(model, linears, example_inputs)
    facts = _Facts(model, probe)
    decisions = {name: _decide(facts, name, module, spec, room) for name, module in linears.items()}
    notes = _resolve_collisions(decisions, room, facts) if room.leaf_names_only else []
    rows = tuple(_row(name, decision, spec) for name, decision in decisions.items())
    if not any(row.weights for row in rows):
        why = sorted({row.reason for row in rows}) or ["the model has no nn.Linear"]
        raise SpecError(
            f"spec: no layer of the model would be quantized; reasons: {why[:5]}: change the spec's patterns"
        )
    copied = 0
    for name, tie in _untied(facts, decisions).items():
        twin = ", and its float twin stays in the file beside the codes" if tie.twin else ""
        notes.append(
            f"{name}: its weight is tied; quantizing it breaks the tie (config.tie_word_embeddings becomes False){twin}"
        )
        copied += decisions[name].module.weight.numel() if tie.copied else 0
        rows = tuple(
            replace(row, bytes_after=row.bytes_after + row.bytes_before) if row.name == name and tie.counted else row
            for row in rows
        )
    losing = [
        row.name
        for row in rows
        if decisions[row.name].module.bias is not None
        and loses_bias_on_cuda(row.weights or "", row.activations, spec.dtype, row.shape)
    ]
    if losing:
        notes.append(
            f"{len(losing)} float8 layers have a bias that optimum-quanto 0.2.7 leaves out on a CUDA GPU of compute "
            "capability 8.0 or later: serve them by qat.load, which goes round that kernel, or mark their weights as "
            "the model card shows; int8 is not affected"
        )
    return InspectReport(
        target=target,
        spec=spec,
        layers=rows,
        parameters=sum(parameter.numel() for parameter in model.parameters()) + copied,
        quantized_parameters=sum(row.shape[0] * row.shape[1] for row in rows if row.weights),
        notes=tuple(notes),
    )


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module).__name__ == "QLinear" and isinstance(module, nn.Linear):
            raise StateError(f"model: layer {name!r} is prepared or frozen already: start from a float model")
        if isinstance(module, nn.Linear):
            yield name, module


def _decide(facts: _Facts, name: str, module: nn.Linear, spec: QuantSpec, target: Target) -> _Decision:
    layer, reason, explicit = spec.resolve(name)
    if layer is None:
        return _Decision(module, None, reason, explicit)
    impossible = _impossible(facts, name, module, layer, spec, target)
    if impossible is not None:
        return _Decision(module, None, impossible, False)
    if not explicit:
        if facts.tied(name, module):
            return _Decision(
                module, None, "tied to another weight (include it by name to untie and quantize it)", False
            )
        if module is facts.head:
            reason = "output head, float by default (include it by name to quantize it)"
            return _Decision(module, None, reason, False, could_run=layer)
        part = sensitive_part(facts.model, name) if layer.activations is not None else None
        if part is not None:
            reason = (
                f"sensitive with quantized activations ({part}), float by default (include it by name to quantize it)"
            )
            return _Decision(module, None, reason, False, could_run=layer)
    return _Decision(module, layer, reason, explicit)


def _impossible(
    facts: _Facts, name: str, module: nn.Linear, layer: LayerSpec, spec: QuantSpec, target: Target
) -> str | None:
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not exactly nn.Linear: its own forward would be lost"
    if module is facts.model:
        return "it is the model itself, which cannot be replaced in place: put it into a module"
    parent = facts.model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return f"{type(parent).__name__} reads the weight without calling the layer"
    if name in facts.probe.read:
        return f"{facts.probe.read[name]} reads the weight without calling the layer"
    if len(facts.names[id(module)]) > 1:
        return f"registered under several names {facts.names[id(module)]}: loaders replace only one of them"
    hazards = [target.layer_fault(facts.model, name, layer.weights, spec.dtype)]
    hazards += [kernel_hazard(layer, spec.dtype, module.in_features, module.out_features)]
    hazards += [input_hazard(layer, spec.dtype, x) for x in facts.probe.inputs[name]]
    return next((hazard for hazard in hazards if hazard is not None), None)


def _resolve_collisions(decisions: dict[str, _Decision], target: Target, facts: _Facts) -> list[str]:
    """Make layers of one last name share one fate, in place; see the module's docstring."""
    families: dict[str, dict[str, _Decision]] = defaultdict(dict)
    for name, decision in decisions.items():
        for alias in facts.names[id(decision.module)]:
            families[alias.rpartition(".")[2]][name] = decision
    total = sum(d.module.weight.numel() for d in decisions.values())
    notes = []
    for leaf, family in families.items():
        floats = {name: d for name, d in family.items() if d.layer is None}
        if not floats or len(floats) == len(family):
            continue
        chosen = sorted(name for name, d in floats.items() if d.explicit)
        if chosen:
            others = sorted(set(family) - set(floats))
            raise SpecError(
                f"exclude: target {target.name!r} names float layers by the last part of their name, so excluding "
                f"{chosen} would also exclude {others[:4]}{'...' if len(others) > 4 else ''}: "
                f"exclude all of '*{leaf}', or none"
            )
        if all(d.could_run for d in floats.values()):
            for name, d in floats.items():
                d.layer, d.reason = d.could_run, f"quantized, since other layers called {leaf!r} are"
                notes.append(
                    f"{name}: quantized although float by default: target {target.name!r} cannot tell it from other "
                    f"{leaf!r}"
                )
            continue
        moved = {name: d for name, d in family.items() if d.layer is not None}
        for d in moved.values():
            d.layer, d.reason = None, f"shares its last name {leaf!r} with {next(iter(floats))}, which must stay float"
        share = sum(d.module.weight.numel() for d in moved.values()) / max(1, total)
        notes.append(
            f"{len(moved)} layers called {leaf!r} ({share:.1%} of linear weights) stay float with {sorted(floats)}"
        )
    return notes


def _untied(facts: _Facts, decisions: Mapping[str, _Decision]) -> dict[str, _Tie]:
    """The tied layers that will be quantized, in the order in which `qat.prepare` unties them."""
    chosen = Counter(id(d.module.weight) for d in decisions.values() if d.layer is not None)
    floats = {id(d.module.weight) for d in decisions.values() if d.layer is None}
    parted: Counter[int] = Counter()
    ties = {}
    for name, decision in decisions.items():
        key = id(decision.module.weight)
        if decision.layer is None or not facts.tied(name, decision.module):
            continue
        holders = facts.holders[key]
        twin = holders == 1 or chosen[key] < holders
        ties[name] = _Tie(holders - parted[key] > 1, twin, twin and not parted[key] and key not in floats)
        parted[key] += 1
    return ties


def _row(name: str, decision: _Decision, spec: QuantSpec) -> LayerInspection:
    module, layer = decision.module, decision.layer
    out_features, in_features = module.weight.shape
    before = out_features * in_features * _ITEM_BYTES[spec.dtype]
    weights = layer.weights if layer is not None else None
    size = None if weights is None else group_size(weights, in_features)
    after = before
    if weights is not None:
        kind = QTYPES[weights]
        groups = out_features * (in_features // size if size else 1)
        codes = -(-groups * kind.bits // 8) * (size or in_features)  # packing fills whole bytes along dim 0, the groups
        after = codes + groups * _ITEM_BYTES[spec.dtype] * (2 if kind.affine else 1)
    return LayerInspection(
        name=name,
        kind=type(module).__name__,
        shape=(out_features, in_features),
        weights=weights,
        activations=layer.activations if layer is not None else None,
        group_size=size,
        reason=decision.reason,
        bytes_before=before,
        bytes_after=after,
    )
