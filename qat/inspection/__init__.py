"""What will be quantized, what will not, and why, before anything is changed.

`inspect` decides for every linear layer; `qat.prepare` does exactly what it decided. A layer that stays float does so
for a reason, and the reason is printed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.adapters import adapters, without_peft
from qat.errors import SpecError, StateError, TargetError, shown
from qat.formats import FORMATS, LayerTypes
from qat.hosts import Rules, Target, get_target
from qat.hosts.configurations import build_on_meta
from qat.inspection.report import FloatWeight, InspectReport, LayerInspection, other_notes, other_weights
from qat.layers import QuantizedLayer, float_layers
from qat.probing import Probe
from qat.spec import LayerSpec, QuantSpec

__all__ = ["FloatWeight", "InspectReport", "LayerInspection", "check_module", "inspect"]


class _Facts:
    """What several decisions need to know of the whole model, gathered once."""

    def __init__(self, model: nn.Module, spec: QuantSpec, target: Target, probe: Probe) -> None:
        self.model = model
        self.spec = spec
        self.probe = probe
        self.target = target
        self.rules: Rules = target.rules(model, spec.torch_dtype)
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[id(module)].append(name)
        self.listed = {id(leaf): name for name, leaf in _in_plain_containers(model)}
        """Modules that a module also holds in a list or a mapping of Python, and where."""
        self.adapters = [name for name, _ in adapters(model)]
        self.holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def tied(self, name: str, module: nn.Module, cls: type[QuantizedLayer]) -> list[nn.Parameter]:
        """The parameters of a layer's weight that another module holds too."""
        own = cls.masters(module).items()
        return [p for key, p in own if f"{name}.{key}" in self.rules.tied_keys or self.holders[id(p)] > 1]

    def types(self, layer: LayerSpec) -> LayerTypes:
        outputs = self.spec.outputs
        return self.target.format.types(layer.weights, layer.activations, self.spec.torch_dtype, outputs)


@dataclass
class _Decision:
    """What becomes of a layer, while it is being decided."""

    module: nn.Module
    cls: type[QuantizedLayer]
    """What it becomes where it is quantized."""
    weight: Tensor
    """Its effective weight."""
    layer: LayerSpec | None
    reason: str
    explicit: bool
    could_run: LayerSpec | None = None
    """For a layer left out only by a default of ours: the types it would run with."""
    float_copy: int = 0
    """Elements of its weight that were tied, and stay in the file as floats that no other row counts."""


def inspect(model: Any, spec: QuantSpec, *, target: str = "quanto", example_inputs: Any = None) -> InspectReport:
    """Decide for every linear layer of ``model`` what ``spec`` means for it. Changes nothing; works on the meta device.

    Args:
        model: any module (of a ``PeftModel``, the model inside); or what stands for one that is built without its
            weights: a directory, a name on the hub, a configuration of transformers, or the fields of a config.json
            (`qat.hosts.configurations.build_on_meta`).
        spec: what to quantize.
        target: who will load the export: ``"quanto"``, ``"transformers"`` or ``"diffusers"``.
        example_inputs: one batch (tensor, tuple or mapping), run through the float model to find the layers whose
            input the stock kernels cannot read, or whose weight is used without calling them; these stay float.

    Raises:
        SpecError: it is no spec or no model, a pattern matches nothing, nothing at all would be quantized, or the model
            cannot run ``example_inputs``.
        TargetError: the target cannot express the spec, or cannot load such a model.
        StateError: the model is prepared or frozen already.
        LoadError: a directory, name or configuration from which no model can be built.

    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> report = inspect(model, QuantSpec(weights="int4", overrides={"2": "int8"}))
    >>> [(layer.name, layer.weights, layer.group_size) for layer in report.layers]
    [('0', 'int4', 128), ('2', 'int8', None)]
    """
    if not isinstance(spec, QuantSpec):
        raise SpecError(
            f"spec: must be a QuantSpec, got {shown(spec)}: write QuantSpec(weights='int8'), or QuantSpec(**spec)"
        )
    if not isinstance(model, nn.Module):
        model = build_on_meta(model)
    model, chosen = without_peft(model), get_target(target)
    spec = chosen.resolved(spec)
    faults = chosen.faults(model, spec)
    if faults:
        raise TargetError("\n".join(faults))
    layers = dict(_layers(model, chosen))
    for name, (module, cls) in layers.items():
        if spec.resolve(name)[0] is not None and (fault := cls.usage_fault(module)) is not None:
            raise StateError(f"model: layer {name!r} {fault}")
    others = tuple(
        other_weights(model, [p for m, cls in layers.values() for p in (*cls.masters(m).values(), *m.parameters())])
    )
    outside = {weight.name.rpartition(".")[0]: weight.class_name for weight in others}
    spec.check_patterns(layers, outside)
    probe = Probe({name: (module, cls.masters(module)) for name, (module, cls) in layers.items() if cls.called})
    if example_inputs is not None:
        probe.watch(model, example_inputs)
    facts = _Facts(model, spec, chosen, probe)
    decisions = {name: _decide(facts, name, module, cls) for name, (module, cls) in layers.items()}
    notes = _resolve_collisions(facts, decisions)
    if all(decision.layer is None for decision in decisions.values()):
        why = sorted({decision.reason for decision in decisions.values()}) or ["the model has no nn.Linear"]
        held = sorted({f"{weight.class_name} ({len(weight.shape)}-D)" for weight in others})
        elsewhere = f"; its weights are in {', '.join(held[:5])}, which have no quantized form" if held else ""
        raise SpecError(
            f"spec: no layer of the model would be quantized; reasons: {why[:5]}{elsewhere}: change the spec's patterns"
        )
    told, copied = _break_ties(facts, decisions)
    notes += told
    notices = chosen.format.notices(
        (facts.types(d.layer), (d.weight.shape[0], d.weight.shape[1]), getattr(d.module, "bias", None) is not None)
        for d in decisions.values()
        if d.layer is not None
    )
    notes += [notice.warning for notice in notices]
    parameters = sum(parameter.numel() for parameter in model.parameters()) + copied
    notes += other_notes(others, parameters)
    rows = tuple(_row(name, decision, facts) for name, decision in decisions.items())
    return InspectReport(target, spec, rows, parameters, tuple(notes), others)


def check_module(model: Any) -> None:
    """Check that a model, which a verb will change or run, is one with weights."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"model: must be an nn.Module, got {shown(model)}: load the model first")


def _layers(model: nn.Module, target: Target) -> Iterator[tuple[str, tuple[nn.Module, type[QuantizedLayer]]]]:
    """The modules that can become quantized layers, and the class that each becomes."""
    formats = {target.format, *FORMATS.values()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) or any(format.owns(module) for format in formats):
            raise StateError(f"model: layer {name!r} is prepared or frozen already: start from a float model")
    for name, module, cls in float_layers(model):
        yield name, (module, cls)


def _decide(facts: _Facts, name: str, module: nn.Module, cls: type[QuantizedLayer]) -> _Decision:
    decision = _Decision(module, cls, cls.effective_weight(module), *facts.spec.resolve(name))
    layer = decision.layer
    if layer is None:
        return decision
    fault = _impossible(facts, name, module, cls, layer)
    if fault is None and not decision.explicit:
        part = facts.rules.sensitive_part(name) if layer.activations is not None else None
        default = f"sensitive with quantized activations ({part})" if part is not None else None
        default = "output head" if id(module) in facts.rules.heads else default
        if facts.tied(name, module, cls):
            fault = "tied to another weight (include it by name to untie and quantize it)"
        elif default is not None:
            fault = f"{default}, float by default (include it by name to quantize it)"
            decision.could_run = layer
    if fault is not None:
        decision.layer, decision.reason, decision.explicit = None, fault, False
    return decision


def _impossible(facts: _Facts, name: str, module: nn.Module, cls: type[QuantizedLayer], layer: LayerSpec) -> str | None:
    fault = cls.adoption_fault(module)
    if fault is not None:
        return fault
    if cls.targets and facts.target.name not in cls.targets:
        remedy = " or ".join(map(repr, cls.targets))
        return f"the loader of target {facts.target.name!r} replaces no {type(module).__name__}: use target {remedy}"
    if module is facts.model:
        return "it is the model itself, which cannot be replaced in place: put it into a module"
    parent = facts.model.get_submodule(name.rpartition(".")[0]) if cls.called else None
    if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return f"{type(parent).__name__} reads the weight without calling the layer"
    if name in facts.probe.read:
        return f"{facts.probe.read[name]} reads the weight without calling the layer"
    if id(module) in facts.listed:
        return f"also held in {facts.listed[id(module)]}, a plain container, in which loaders replace nothing"
    if len(facts.names[id(module)]) > 1:
        return f"registered under several names {facts.names[id(module)]}: loaders replace only one of them"
    adapter = next((above for above in facts.adapters if name.startswith(f"{above}.")), None)
    if adapter is not None:
        return f"belongs to the adapter {adapter}: merge it into the model first (in peft: merge_and_unload)"
    types, weight = facts.types(layer), cls.effective_weight(module)
    hazards = [facts.rules.layer_fault(name, types.weights)]
    hazards += [facts.target.format.layer_hazard(types, (weight.shape[0], weight.shape[1]))]
    hazards += [facts.target.format.input_hazard(types, x) for x in facts.probe.inputs.get(name, ())]
    return next((hazard for hazard in hazards if hazard is not None), None)


def _in_plain_containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, list | tuple | dict) and not key.startswith("_"):
                leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, nn.Module))
                yield from ((f"{name}.{key}" if name else key, leaf) for leaf in leaves)


def _resolve_collisions(facts: _Facts, decisions: Mapping[str, _Decision]) -> list[str]:
    """Make layers of one last name all quantized or all float, in place, since the target cannot tell them apart."""
    families: dict[str, dict[str, _Decision]] = defaultdict(dict)
    for name, decision in decisions.items():
        for alias in facts.names[id(decision.module)]:
            families[facts.target.host.layer_key(alias)][name] = decision
    total = sum(d.weight.numel() for d in decisions.values())
    target, notes = facts.target.name, []
    for leaf, family in families.items():
        floats = {name: d for name, d in family.items() if d.layer is None}
        moved = {name: d for name, d in family.items() if d.layer is not None}
        if not floats or not moved:
            continue
        chosen = sorted(name for name, d in floats.items() if d.explicit)
        if chosen:
            others = sorted(moved)
            raise SpecError(
                f"exclude: target {target!r} names float layers by the last part of their name, so excluding {chosen} "
                f"would also exclude {others[:4]}{'...' if len(others) > 4 else ''}: exclude all of '*{leaf}', or none"
            )
        if all(d.could_run for d in floats.values()):
            for name, d in floats.items():
                d.layer, d.reason = d.could_run, f"quantized, since other layers called {leaf!r} are"
                notes.append(
                    f"{name}: quantized although float by default: target {target!r} cannot tell it from other {leaf!r}"
                )
            continue
        for d in moved.values():
            d.layer, d.reason = None, f"shares its last name {leaf!r} with {next(iter(floats))}, which must stay float"
        share = sum(d.weight.numel() for d in moved.values()) / max(1, total)
        notes.append(
            f"{len(moved)} layers called {leaf!r} ({share:.1%} of linear weights) stay float with {sorted(floats)}"
        )
    return notes


def _break_ties(facts: _Facts, decisions: Mapping[str, _Decision]) -> tuple[list[str], int]:
    """Notes on the tied layers that `qat.prepare` will untie, in its order, and how many elements it will copy."""
    chosen = Counter(id(p) for d in decisions.values() if d.layer is not None for p in d.cls.masters(d.module).values())
    floats = {id(p) for d in decisions.values() if d.layer is None for p in d.cls.masters(d.module).values()}
    holders, left = facts.holders, facts.holders.copy()
    notes, copied = [], 0
    for name, decision in decisions.items():
        tied = facts.tied(name, decision.module, decision.cls)
        if decision.layer is None or not tied:
            continue
        # One holder, where the two are separate already: on the meta device.
        kept = [p for p in tied if holders[id(p)] == 1 or chosen[id(p)] < holders[id(p)]]
        uncounted = [p for p in kept if left[id(p)] == holders[id(p)] and id(p) not in floats]
        decision.float_copy = sum(p.numel() for p in uncounted)
        copied += sum(p.numel() for p in tied if left[id(p)] > 1)
        left.subtract(id(p) for p in tied)
        notes.append(
            f"{name}: its weight is tied; quantizing it breaks the tie (config.tie_word_embeddings becomes False)"
            + (", and its float copy stays in the file beside the codes" if kept else "")
        )
    return notes, copied


def _row(name: str, decision: _Decision, facts: _Facts) -> LayerInspection:
    layer, (out_features, in_features) = decision.layer, decision.weight.shape
    itemsize = facts.spec.torch_dtype.itemsize
    before = out_features * in_features * itemsize
    what = (name, type(decision.module).__name__, (out_features, in_features))
    if layer is None:
        return LayerInspection(*what, None, None, None, decision.reason, before, before)
    types = facts.types(layer)
    after = facts.target.format.nbytes(types, (out_features, in_features)) + decision.float_copy * itemsize
    group_size = types.weights.group_size(in_features)
    return LayerInspection(*what, layer.weights, layer.activations, group_size, decision.reason, before, after)
