"""What will be quantized, what will not, and why, before anything is changed.

`inspect` decides for every layer; `qat.prepare` does exactly what it decided. A layer that stays float does so
for a reason, and the reason is printed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.adapters import adapters, without_peft
from qat.errors import SpecError, StateError, TargetError, listed, shown
from qat.formats import FORMATS, LayerTypes
from qat.hosts import Rules, Target, get_target
from qat.hosts.configurations import build_on_meta
from qat.inspection.experts import require_whole, routers
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
        self.routers = routers(model)
        """Ids of the routers of experts."""
        self.adapters = [name for name, _ in adapters(model)]
        self.holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def tied(self, name: str, module: nn.Module, cls: type[QuantizedLayer]) -> list[nn.Parameter]:
        """The parameters of a layer's weight that another module holds too."""
        own = cls.masters(module).items()
        return [p for key, p in own if f"{name}.{key}" in self.rules.tied_keys or self.holders[id(p)] > 1]

    def types(self, decision: _Decision, layer: LayerSpec) -> LayerTypes:
        outputs = self.spec.outputs
        types = self.target.format.types(layer.weights, layer.activations, self.spec.torch_dtype, outputs)
        return replace(types, kernel=decision.cls.stored_kernel(decision.module))


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
    named: bool = False
    """Whether a pattern asks for it, whatever comes of it."""
    could_run: LayerSpec | None = None
    """For a layer left out only by a default of ours: the types it would run with."""
    float_activations: bool = False
    """Whether its activations stay float although the spec asks for a type."""
    float_copy: int = 0
    """Elements of its weight that were tied, and stay in the file as floats that no other row counts."""
    shared_with: str | None = None
    """The layer before it that it stays tied to."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.weight.shape[0], self.weight.shape[1]


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
    chosen.check_types(spec)
    spec = chosen.resolved(spec)
    faults = chosen.faults(model, spec)
    if faults:
        raise TargetError("\n".join(faults))
    layers = dict(_layers(model, chosen))
    for name, (module, cls) in layers.items():
        if spec.resolve(name)[0] is not None and (fault := cls.usage_fault(module)) is not None:
            raise StateError(f"model: layer {name!r} {fault}")
    outside = other_weights(model, _parameters(layers.values()))
    known = sorted(layers, key=lambda name: layers[name][1].float_by_default)  # first what is quantized by default
    spec.check_patterns(known, {weight.name.rpartition(".")[0]: weight.class_name for weight in outside})
    probe = Probe({name: (module, cls.masters(module)) for name, (module, cls) in layers.items() if cls.called})
    if example_inputs is not None:
        probe.watch(model, example_inputs)
    facts = _Facts(model, spec, chosen, probe)
    decisions = {name: _decide(facts, name, module, cls) for name, (module, cls) in layers.items()}
    notes = _resolve_collisions(facts, decisions)
    require_whole(decisions)
    if blind := [name for name, decision in decisions.items() if decision.float_activations]:
        cause = "no layer gives their outputs" if spec.outputs else "their class does not show what its matrices read"
        notes.append(f"{len(blind)} matrices of experts keep float activations ({cause}): {listed(blind, 4)}")
    _keep_ties(facts, decisions)
    unnamed = {name for name, d in decisions.items() if d.cls.float_by_default and d.layer is None and not d.named}
    reasons = {f"{name}.weight": decisions[name].reason for name in unnamed}
    rest = [pair for name, pair in layers.items() if name not in unnamed]
    others = tuple(other_weights(model, _parameters(rest), reasons))
    if all(decision.layer is None for decision in decisions.values()):
        why = sorted({decision.reason for decision in decisions.values()}) or ["the model has no nn.Linear"]
        held = sorted({f"{weight.class_name} ({len(weight.shape)}-D)" for weight in others if not weight.default})
        elsewhere = f"; its weights are in {', '.join(held[:5])}, which have no quantized form" if held else ""
        raise SpecError(
            f"spec: no layer of the model would be quantized; reasons: {why[:5]}{elsewhere}: change the spec's patterns"
        )
    told, copied = _break_ties(facts, decisions, unnamed)
    notes += told
    notices = chosen.format.notices(
        (facts.types(d, d.layer), d.shape, getattr(d.module, "bias", None) is not None)
        for d in decisions.values()
        if d.layer is not None
    )
    notes += [notice.warning for notice in notices]
    parameters = sum(parameter.numel() for parameter in model.parameters()) + copied
    notes += other_notes(others, parameters)
    rows = tuple(_row(name, decision, facts) for name, decision in decisions.items() if name not in unnamed)
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


def _parameters(layers: Iterable[tuple[nn.Module, type[QuantizedLayer]]]) -> list[nn.Parameter]:
    return [p for module, cls in layers for p in (*cls.masters(module).values(), *module.parameters())]


def _decide(facts: _Facts, name: str, module: Any, cls: type[QuantizedLayer]) -> _Decision:
    decision = _Decision(module, cls, cls.effective_weight(module), *facts.spec.resolve(name))
    layer = decision.layer
    if layer is None:
        return decision
    decision.named = decision.explicit
    if layer.activations is not None and not cls.called and (facts.spec.outputs or not module.form.shows_inputs):
        layer = decision.layer = layer.model_copy(update={"activations": None})
        decision.float_activations = True
    if not cls.linear and layer.activations is not None:
        decision.layer = layer = layer.model_copy(update={"activations": None})
        decision.reason = f"{decision.reason}; float activations, since it is no linear layer"
    fault = _impossible(facts, name, decision, layer)
    if fault is None and not cls.called and facts.tied(name, module, cls):
        fault = "its parameter is tied to another one, which no load of experts can hold"
    if fault is None and not decision.explicit:
        part = facts.rules.sensitive_part(name) if layer.activations is not None else None
        default = f"sensitive with quantized activations ({part})" if part is not None else None
        default = "output head" if id(module) in facts.rules.heads else default
        default = "router: decides which expert a token goes to" if id(module) in facts.routers else default
        default = cls.float_by_default or default
        if facts.tied(name, module, cls) and not cls.float_by_default:
            fault = "tied to another weight (include it by name to untie and quantize it)"
        elif default is not None:
            fault = f"{default}, float by default (include it by name to quantize it)"
            decision.could_run = layer
    if fault is not None:
        decision.layer, decision.reason, decision.explicit = None, fault, False
    return decision


def _impossible(facts: _Facts, name: str, decision: _Decision, layer: LayerSpec) -> str | None:
    module, cls = decision.module, decision.cls
    fault = cls.adoption_fault(module)
    if fault is not None:
        return fault
    if cls.targets and facts.target.name not in cls.targets:
        remedy = " or ".join(map(repr, cls.targets))
        what = type(module).__name__ if cls.called else "experts in one parameter"
        return f"the loader of target {facts.target.name!r} replaces no {what}: use target {remedy}"
    if module is facts.model:
        return "it is the model itself, which cannot be replaced in place: put it into a module"
    parent = facts.model.get_submodule(name.rpartition(".")[0]) if cls.called else None
    if isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return f"{type(parent).__name__} reads the weight without calling the layer"
    if name in facts.probe.read:
        return f"{facts.probe.read[name]} reads the weight without calling the layer"
    holder = id(cls.holder(module))
    if holder in facts.listed:
        return f"also held in {facts.listed[holder]}, a plain container, in which loaders replace nothing"
    if len(facts.names[holder]) > 1:
        return f"registered under several names {facts.names[holder]}: loaders replace only one of them"
    adapter = next((above for above in facts.adapters if name.startswith(f"{above}.")), None)
    if adapter is not None:
        return f"belongs to the adapter {adapter}: merge it into the model first (in peft: merge_and_unload)"
    types = facts.types(decision, layer)
    hazards = [facts.rules.layer_fault(name, types.weights)]
    if cls.linear:
        hazards += [facts.target.format.layer_hazard(types, decision.shape)]
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
        if decision.cls.targets and facts.target.name not in decision.cls.targets:
            continue  # the loader replaces no layer of its class, whatever its name
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


def _keep_ties(facts: _Facts, decisions: Mapping[str, _Decision]) -> None:
    """Let layers share one quantized weight that are tied, all chosen, and tied again by the loader."""
    ties, groups = facts.target.host.ties(facts.model) or {}, defaultdict[str, list[str]](list)
    for name, decision in decisions.items():
        if decision.layer is not None and decision.weight is getattr(decision.module, "weight", None):
            groups[ties.get(f"{name}.weight", f"{name}.weight")].append(name)
    for first, *others in groups.values():
        weight = decisions[first].weight
        tied = [name for name in others if decisions[name].weight is weight or weight.is_meta]
        if not tied or facts.holders[id(weight)] > 1 + len(tied):  # something float uses it too
            continue
        types = {name: layer.weights for name in (first, *tied) if (layer := decisions[name].layer) is not None}
        if len(set(types.values())) > 1:
            told = " and ".join(f"{name} {kind}" for name, kind in types.items())
            raise SpecError(
                f"overrides: {told} are one tied weight, which has one type: give both the same, or exclude one, which "
                "breaks the tie"
            )
        for name in tied:
            decisions[name].shared_with = first
            decisions[name].reason += f"{'; ' if decisions[name].reason else ''}tied to {first}, one table for both"
    for name in decisions.keys() - _together(decisions) if ties else ():
        d = decisions[name]
        apart = d.layer is not None and bool(facts.tied(name, d.module, d.cls))
        if apart and not facts.target.host.can_untie(facts.model):
            d.layer, d.explicit = None, False
            d.reason = "its model's class ties it on every load: include all layers that share the weight, or none"


def _together(decisions: Mapping[str, _Decision]) -> set[str]:
    """The layers that stay tied."""
    pairs = [(name, d.shared_with) for name, d in decisions.items() if d.shared_with is not None]
    return {name for pair in pairs for name in pair}


def _break_ties(facts: _Facts, decisions: Mapping[str, _Decision], unnamed: Container[str]) -> tuple[list[str], int]:
    """Notes on the tied layers that `qat.prepare` will untie, in its order, and how many elements it will copy.

    Layers that are ``unnamed`` have no row.
    """
    chosen = Counter(id(p) for d in decisions.values() if d.layer is not None for p in d.cls.masters(d.module).values())
    left_float = [d for name, d in decisions.items() if d.layer is None and name not in unnamed]
    floats = {id(p) for d in left_float for p in d.cls.masters(d.module).values()}
    holders, left = facts.holders, facts.holders.copy()
    notes, copied = [], 0
    together = _together(decisions)
    for name, decision in decisions.items():
        if name in together:
            continue
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
    layer, (out_features, in_features) = decision.layer, decision.shape
    itemsize = facts.spec.torch_dtype.itemsize
    before = 0 if decision.shared_with is not None else out_features * in_features * itemsize
    what = (name, type(decision.module).__name__, (out_features, in_features))
    if layer is None:
        return LayerInspection(*what, None, None, None, decision.reason, before, before)
    types = facts.types(decision, layer)
    after = facts.target.format.nbytes(types, decision.shape) + decision.float_copy * itemsize
    after = 0 if decision.shared_with is not None else after
    group_size, chosen = types.weights.group_size(in_features), (layer.weights, layer.activations)
    return LayerInspection(*what, *chosen, group_size, decision.reason, before, after, decision.shared_with)
