"""What will be quantized, what will not, and why, before anything is changed.

`inspect` decides for every layer; `qat.prepare` does exactly what it decided. A layer that stays float does so
for a reason, and the reason is printed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.adapters import adapters, without_peft
from qat.distributed import refuse_sharded
from qat.errors import SpecError, StateError, TargetError, listed, shown
from qat.formats import FORMATS, LayerTypes
from qat.hosts import Rules, Target, get_target
from qat.hosts.configurations import build_on_meta
from qat.inspection.experts import require_whole, routers
from qat.inspection.remedies import EXPERTS_APART, float_shares, require_held, target_fault
from qat.inspection.report import FloatWeight, InspectReport, LayerInspection, other_notes, other_weights
from qat.inspection.ties import break_ties, keep_ties
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
        self.able: dict[str, bool] = {}
        """Which other targets load such a model, as far as that was asked."""
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
    """Its effective weight, or a tensor like it."""
    layer: LayerSpec | None
    reason: str
    explicit: bool
    named: bool = False
    """Whether a pattern asks for it, whatever comes of it."""
    could_run: LayerSpec | None = None
    """For a layer left out only by a default of ours: the types it would run with."""
    float_activations: bool = False
    """Whether its activations stay float although the spec asks for a type."""
    mendable: str = ""
    """Why it stays float, if another adapter or target would let it be quantized; without names."""
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
        target: who will load the export: ``"quanto"``, ``"transformers"``, ``"diffusers"``, ``"compressed-tensors"``,
            ``"gguf"`` or ``"gguf-diffusers"``.
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
        if spec.resolve(name)[0] is None or cls.adoption_fault(module) is not None:
            continue  # it stays float
        if (fault := cls.usage_fault(module)) is not None:
            raise StateError(f"model: layer {name!r} {fault}")
    outside = other_weights(model, _parameters(layers.values()))
    known = sorted(layers, key=lambda name: layers[name][1].float_by_default)  # first what is quantized by default
    strange = {w.name.rpartition(".")[0]: f"a {w.class_name}, whose weights have no quantized form" for w in outside}
    wrapped = [name for name, _ in adapters(model) if name not in layers]
    strange |= dict.fromkeys(wrapped, "a layer under peft: leave it out of the adapter, and out of modules_to_save")
    spec.check_patterns(known, strange, inside=tuple(f"{name}." for name in wrapped))
    require_held(model, spec, layers, chosen.name)
    probe = Probe({name: (module, cls.masters(module)) for name, (module, cls) in layers.items() if cls.called})
    if example_inputs is not None:
        probe.watch(model, example_inputs)
    facts = _Facts(model, spec, chosen, probe)
    decisions = {name: _decide(facts, name, module, cls) for name, (module, cls) in layers.items()}
    notes = _resolve_collisions(facts, decisions)
    require_whole(decisions)
    if blind := [name for name, decision in decisions.items() if decision.float_activations]:
        cause = _float_inputs(spec, chosen, decisions[blind[0]].module)
        notes.append(f"{len(blind)} matrices of experts keep float activations ({cause}): {listed(blind, 4)}")
    keep_ties(facts, decisions)
    unnamed = {name for name, d in decisions.items() if d.cls.float_by_default and d.layer is None and not d.named}
    reasons = {f"{name}.weight": decisions[name].reason for name in unnamed}
    rest = [pair for name, pair in layers.items() if name not in unnamed]
    others = tuple(other_weights(model, _parameters(rest), reasons))
    if all(decision.layer is None for decision in decisions.values()):
        why = sorted({decision.reason for decision in decisions.values()}) or ["the model has no nn.Linear"]
        held = sorted({f"{weight.class_name} ({len(weight.shape)}-D)" for weight in others if not weight.default})
        elsewhere = f"; its weights are in {', '.join(held[:5])}, which have no quantized form" if held else ""
        others_hold = {name for d in decisions.values() if d.mendable for name in d.cls.targets} - {target}
        other = f"use target {' or '.join(map(repr, sorted(others_hold)))}, or " if others_hold else ""
        raise SpecError(
            f"spec: no layer of the model would be quantized; reasons: {why[:5]}{elsewhere}: {other}change the spec's "
            "patterns"
        )
    told, copied = break_ties(facts, decisions, unnamed)
    notes += told
    notices = chosen.format.notices(
        (facts.types(d, d.layer), d.shape, getattr(d.module, "bias", None) is not None)
        for d in decisions.values()
        if d.layer is not None
    )
    notes += [notice.warning for notice in notices]
    parameters = sum(parameter.numel() for parameter in model.parameters()) + copied
    notes += other_notes(others, parameters)
    warnings = [*float_shares(decisions, parameters)]
    if refused := [
        f"{name} ({d.reason})" for name, d in decisions.items() if d.named and not d.layer and not d.mendable
    ]:
        warnings.append(f"{len(refused)} layers that the spec names stay float: {listed(refused, 4)}")
    rows = tuple(_row(name, decision, facts) for name, decision in decisions.items() if name not in unnamed)
    return InspectReport(target, spec, rows, parameters, (*notes, *warnings), others, tuple(warnings))


def check_module(model: Any) -> None:
    """Check that a model, which a verb will change or run, is one with weights."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"model: must be an nn.Module, got {shown(model)}: load the model first")
    refuse_sharded(model, "qat.prepare and what comes with it")


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
    decision = _Decision(module, cls, cls.like_weight(module), *facts.spec.resolve(name))
    layer = decision.layer
    if layer is None:
        return decision
    decision.named = decision.explicit
    if layer.activations is not None and not cls.called and _float_inputs(facts.spec, facts.target, module):
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


def _float_inputs(spec: QuantSpec, target: Target, expert: Any) -> str:
    """Why what a matrix of experts reads stays float, or nothing."""
    if not target.host.quantizes_inputs_of_experts:
        return f"the loader of target {target.name!r} quantizes no inputs of experts"
    if spec.outputs:
        return "no layer gives their outputs"
    return "" if expert.form.shows_inputs else "their class does not show what its matrices read"


def _impossible(facts: _Facts, name: str, decision: _Decision, layer: LayerSpec) -> str | None:
    module, cls = decision.module, decision.cls
    fault = cls.adoption_fault(module)
    if fault is not None:
        decision.mendable = fault if name in facts.adapters else ""
        return fault
    if (fault := target_fault(facts.model, module, cls, facts.target.name, facts.able)) is not None:
        decision.mendable = fault if decision.explicit or not cls.float_by_default else ""
        return fault
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
        if not cls.called:
            decision.mendable = EXPERTS_APART
            return EXPERTS_APART
        if set(name[len(adapter) + 1 :].split(".")) == {"base_layer"}:  # not its own parts, which are merged into that
            decision.mendable = "under adapters other than LoRA over nn.Linear: leave these layers without one"
        return f"belongs to the adapter {adapter}: merge it into the model first (in peft: merge_and_unload)"
    types = facts.types(decision, layer)
    fault = facts.rules.layer_fault(name, types.weights)
    decision.mendable = fault or "" if not cls.called else ""
    hazards = [fault, facts.target.format.shape_fault(types, decision.shape)]
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
        for alias in facts.names[id(decision.module)] or [name]:  # no module of the model is an expert's matrix
            families[facts.target.host.layer_key(facts.model, alias)][name] = decision
    total = sum(d.weight.numel() for d in decisions.values())
    target, notes = facts.target.name, []
    for leaf, family in families.items():
        floats = {name: d for name, d in family.items() if d.layer is None}
        moved = {name: d for name, d in family.items() if d.layer is not None}
        pattern = leaf if "." in leaf else f"*{leaf}"
        types = {name: d.layer.weights for name, d in family.items() if d.layer is not None}
        if len(set(types.values())) > 1:
            told = " and ".join(f"{name} {kind}" for name, kind in types.items())
            raise SpecError(
                f"overrides: target {target!r} {facts.target.host.families}, so {told} must be of one type: override "
                f"{pattern!r} as a whole"
            )
        if not floats or not moved:
            continue
        chosen = sorted(name for name, d in floats.items() if d.explicit)
        if chosen:
            others = sorted(moved)
            raise SpecError(
                f"exclude: target {target!r} {facts.target.host.families}, so excluding {chosen} would also exclude "
                f"{others[:4]}{'...' if len(others) > 4 else ''}: exclude all of {pattern!r}, or none"
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
