"""`prepare`: put fake quantization into a model's linear layers, in place."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qat.adapters import active_adapters, refuse_tied, without_peft
from qat.checkpoints import PREPARED, complete_float_checkpoint
from qat.distributed import reshard
from qat.errors import SpecError, StateError, TrainingError, listed, shown
from qat.files.evidence import is_frozen
from qat.hosts import get_target, inner_models
from qat.inspection import InspectReport, check_module, inspect
from qat.layers import QuantizedLayer, float_layers, quantized_layers
from qat.observers import Best, ObserverChoice
from qat.optimizers import refuse_adapters, watch
from qat.quantizers import Algorithm, Automatic, WeightQuantizer
from qat.quantizers.activation import ActivationQuantizer, LearnedScale
from qat.runs import observe_runs
from qat.spec import QuantSpec

__all__ = [
    "PrepareReport",
    "Prepared",
    "forget_prepared",
    "mark_prepared",
    "parameter_groups",
    "prepare",
    "prepared_as",
]

_HOOKS = "_qat_hooks"
_FLOAT_AGAIN = "export it with qat.export, or prepare a float model or a checkpoint of training to go on"
logger = logging.getLogger("qat")


@dataclass(frozen=True)
class Prepared:
    """How a model was prepared."""

    spec: QuantSpec
    algorithm: Algorithm
    target: str
    observer: ObserverChoice
    notes: tuple[str, ...] = ()
    """What inspection remarked, and what was untied; freezing puts it on record."""
    left_float: Mapping[str, str] = field(default_factory=dict)
    """The weights that stay float, each with the reason; freezing puts it on record too."""
    layers: tuple[str, ...] = ()
    """Full names of the layers that were prepared."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters of peft that were active."""


@dataclass(frozen=True)
class PrepareReport:
    """What was done; prints as the inspection's table."""

    inspection: InspectReport
    layers: tuple[str, ...]
    """Names of the layers that are quantized now."""
    untied: tuple[str, ...] = ()
    """Layers whose weight was tied and is now a copy of its own."""
    remarks: tuple[str, ...] = ()
    """What the algorithm does not do in some layers."""
    algorithms: Mapping[str, Algorithm] = field(default_factory=dict)
    """What finds the scales of each layer, by its name."""
    waiting: int = 0
    """How many layers wait for data to start with."""

    def __str__(self) -> str:
        types = {row.name: str(row.weights) for row in self.inspection.layers}
        used = dict.fromkeys(f"{algorithm} for {types[name]}" for name, algorithm in self.algorithms.items())
        lines = [str(self.inspection), *self.remarks, *(f"untied: {name}" for name in self.untied)]
        lines.append(f"algorithm: {', '.join(used)}")
        if self.waiting:
            lines.append(
                f"{self.waiting} layers begin with 'clip' until qat.calibrate(model, batches) gives their start"
            )
        return "\n".join(lines)


@torch.inference_mode(False)  # in which parameters would be tensors that no training can use
def prepare(
    model: nn.Module,
    spec: QuantSpec,
    *,
    algorithm: Algorithm | None = None,
    target: str = "quanto",
    observer: ObserverChoice | None = None,
    example_inputs: Any = None,
) -> PrepareReport:
    """Turn the layers that `qat.inspect` chooses into quantized ones, in place.

    Args:
        model: a float model. Its parameters stay the same objects, under the same names. Of a ``PeftModel`` with LoRA,
            the model inside is prepared, and base and adapter of a layer are quantized as one weight.
        spec: what to quantize, and the serving dtype.
        algorithm: how scales are found; default `Automatic`, the best for the type of each layer.
        target: who will load the export; decides what can be expressed.
        observer: the rule that takes scales of activations from data; default `Best`. Only with activations.
        example_inputs: one batch, to find layers whose input the stock kernels cannot read; see `qat.inspect`.

    Raises:
        SpecError, TargetError, StateError: see `qat.inspect`, or the model is wrapped, as by ``torch.compile``; nothing
            is changed then.

    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> prepare(model, QuantSpec(weights="int4")).layers
    ('0', '2')
    """
    model, algorithm = without_peft(model), algorithm or Automatic()
    if not isinstance(algorithm, Algorithm):
        raise StateError(f"algorithm: must be an Algorithm such as StraightThrough(), got {shown(algorithm)}")
    if type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        raise StateError(f"model: a {type(model).__name__} around a model: pass it (model._orig_mod or model.module)")
    check_module(model)
    report = inspect(model, spec, target=target, example_inputs=example_inputs)
    for warning in report.warnings:
        logger.warning("%s", warning)
    spec, observer, format = report.spec, observer or Best(), get_target(target).format
    untied, made, algorithms, quantizers = [], [], {}, dict[str, WeightQuantizer]()
    read_by_all: dict[tuple[int, ...], ActivationQuantizer] = {}  # of experts, which read one tensor at a parameter
    found = {name: (module, cls) for name, module, cls in float_layers(model)}
    for row in report.layers:
        if row.weights is None:
            continue
        module, cls = found[row.name]
        weight = cls.effective_weight(module)
        types = format.types(row.weights, row.activations, spec.torch_dtype)
        own = algorithms[row.name] = algorithm.for_type(types.weights)
        shared = None if row.shared_with is None else quantizers.get(row.shared_with)
        quantizer = own.make(weight, types.weights, types.dtype) if shared is None else shared
        quantizers[row.name] = quantizer
        if not isinstance(quantizer, WeightQuantizer):
            raise StateError(f"algorithm: {algorithm!r} must make a WeightQuantizer, made {quantizer!r}")
        quantizer.smooth = algorithm.gradient == "stable" and types.weights.fused and not types.weights.floating
        if algorithm.float8_backward and types.activations is not None and cls.called:
            quantizer.float8_backward |= types.weights.floating and types.activations.floating
        inputs = outputs = None
        if types.activations is not None:
            kind = LearnedScale if algorithm.learns_activations(row.name) else ActivationQuantizer
            inputs = kind(types.activations, types.dtype, observer).to(weight.device)
            if not cls.called:
                inputs = read_by_all.setdefault(tuple(map(id, cls.masters(module).values())), inputs)
            if spec.outputs:
                outputs = kind(types.activations, types.dtype, observer).to(weight.device)
            for quantizes in filter(None, (inputs, outputs)):
                quantizes.layer = quantizes.layer or row.name
        made.append((row.name, cls, module, quantizer.to(weight.device), inputs, outputs))
    calibrated = [name for name, _, _, _, inputs, _ in made if inputs is not None]
    _check_use(algorithm, calibrated, [quantizer for _, _, _, quantizer, _, _ in made])
    refuse_tied(model, {name for name, *_ in made}, {id(part) for _, _, one, *_ in made for part in one.modules()})
    holders = _holders(model)
    owners = {row.name: found[row.shared_with][0] for row in report.layers if row.shared_with is not None}
    kept = {id(owner) for owner in owners.values()}
    for name, cls, module, quantizer, inputs, outputs in made:  # now, so that no error leaves a half-prepared model
        if name not in owners and id(module) not in kept and _untie(model, module, cls, holders):
            untied.append(name)
        layer = cls.adopt(module, quantizer, inputs, outputs)
        if isinstance(owner := owners.get(name), QuantizedLayer):
            layer.share(owner)
    inexact = [n for n, cls, m, q, _, _ in made if q.float8_backward and any(s % 16 for s in cls.like_weight(m).shape)]
    remarks = []
    if inexact:
        remarks.append(
            f"float8_backward: {len(inexact)} layers keep exact gradients, since a size is no multiple of 16: "
            f"{listed(inexact, 8)}"
        )
    blind = [n for n, cls, _, q, _, _ in made if not cls.called and q.awaited_start() is not None]
    if blind:
        remarks.append(
            f"{len(blind)} matrices of experts begin with 'clip', whatever starts from data others get, since no call "
            f"shows what a single expert reads: {listed(blind, 4)}"
        )
    notes = (*report.notes, *remarks, *(f"untied: {name}" for name in untied))
    layers = tuple(name for name, _ in quantized_layers(model))
    active = active_adapters(model)
    mark_prepared(model, Prepared(spec, algorithm, target, observer, notes, report.left_float, layers, active))
    waiting = sum(layer.awaited_start() is not None for _, layer in quantized_layers(model))
    return PrepareReport(report, layers, tuple(untied), tuple(remarks), algorithms, waiting)


def mark_prepared(model: nn.Module, prepared: Prepared) -> None:
    """Note how a model was prepared, and look at its loads, runs and optimizers from now on."""
    setattr(model, PREPARED, prepared)
    complete = functools.partial(complete_float_checkpoint, prepared.algorithm)
    loaded = (model, *(layer for _, layer in quantized_layers(model)))  # a part of a model may be loaded by itself
    hooks = [module.register_load_state_dict_pre_hook(complete) for module in loaded]  # type: ignore[no-untyped-call]
    setattr(model, _HOOKS, hooks + observe_runs(model))
    watch(model)


def _check_use(algorithm: Algorithm, names: list[str], quantizers: list[WeightQuantizer]) -> None:
    """Raise `SpecError` for an option of the algorithm that no layer uses; ``names`` are of those with activations."""
    fault = None
    if algorithm.float8_backward and not any(quantizer.float8_backward for quantizer in quantizers):
        fault = "float8_backward=True needs layers with float8 weights and float8 activations: set both to 'float8'"
    if algorithm.gradient == "stable" and not any(quantizer.smooth for quantizer in quantizers):
        fault = "gradient='stable' needs layers with integer codes: its formula is that of a grid of equal steps"
    if algorithm.learn_activations and not any(map(algorithm.learns_activations, names)):
        fault = "learn_activations=True needs layers with quantized activations that are not among static_activations"
    for pattern in algorithm.static_activations:
        if not any(fnmatchcase(name, pattern) for name in names) or not algorithm.learn_activations:
            fault = f"static_activations: {pattern!r} keeps no layer's scales, which learn_activations=True would learn"
    if fault is not None:
        raise SpecError(f"algorithm: {fault}, or leave it out")


def prepared_as(model: nn.Module) -> Prepared:
    """How ``model`` was prepared; `StateError` if it was not (or only a submodule of it was)."""
    if not isinstance(model, nn.Module):
        raise StateError(f"model: must be a prepared nn.Module, got {type(model).__name__}")
    model = without_peft(model)
    prepared: Prepared | None = getattr(model, PREPARED, None)
    if is_frozen(model):
        raise StateError(f"model: is frozen already: {_FLOAT_AGAIN}")
    if prepared is None:
        raise StateError("model: was not prepared: call qat.prepare(model, spec) first, on this same module")
    refuse_adapters(model)
    return prepared


def forget_prepared(model: nn.Module) -> None:
    """Mark ``model`` as no longer prepared (freezing has replaced its layers)."""
    delattr(model, PREPARED)
    for hook in vars(model).pop(_HOOKS):
        hook.remove()


def _holders(model: nn.Module) -> dict[int, set[int]]:
    """The modules that hold each parameter, by their identities."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    return holders


def _untie(model: nn.Module, module: nn.Module, cls: type[QuantizedLayer], all_holders: dict[int, set[int]]) -> bool:
    """Give a layer a weight of its own if it shares one, and tell the configs of the models around it."""
    untied = False
    for key, weight in cls.masters(module).items():
        holders = all_holders[id(weight)]
        if len(holders) < 2:
            continue
        untied = True
        path, _, own = key.rpartition(".")
        holder = module.get_submodule(path)
        all_holders[id(weight)] = holders - {id(holder)}
        setattr(holder, own, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
        for _, inner, host in inner_models(model):
            if holders <= {id(part) for part in inner.modules()}:
                host.untie(inner)
    return untied


def parameter_groups(
    module: nn.Module, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups in which learned scales have their own learning rate and never meet weight decay.

    Call it after `prepare`, which makes the learned scales. transformers' Trainer builds an optimizer of its own, which
    decays them: `qat.integrations.trainer.grouped_optimizer` gives it one with these groups.

    Any optimizer that would decay a learned scale of a prepared model is refused at its first step.

    Args:
        module: anything that contains prepared layers.
        lr: learning rate of the weights.
        scale_lr: learning rate of learned scales; default a tenth of ``lr``.
        weight_decay: for parameters of two and more dimensions; biases, norms and scales get none.

    Returns:
        Groups for any ``torch.optim`` optimizer; empty ones are left out, parameters that need no gradient too. A
        module that is frozen, has a frozen part, or has an adapter over a prepared layer raises `StateError`; a number
        below 0, `TrainingError`.

    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> [group["weight_decay"] for group in parameter_groups(model, lr=1e-4, weight_decay=0.1)]
    [0.1, 0.0]
    """
    if any(is_frozen(part) for part in module.modules()):
        raise StateError(f"module: is frozen, and frozen layers cannot be trained: {_FLOAT_AGAIN}")
    refuse_adapters(module)
    reshard(module)
    for name, value in (("lr", lr), ("scale_lr", scale_lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0:
            raise TrainingError(f"{name}: must be 0 or more, got {value}: a rate below 0 trains away from the loss")
    scales = {id(p) for _, layer in quantized_layers(module) for p in layer.quantizer_parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in scales]
    groups = (
        ("weights", [p for p in others if p.ndim >= 2], lr, weight_decay),
        ("vectors", [p for p in others if p.ndim < 2], lr, 0.0),
        ("scales", [p for p in trained if id(p) in scales], lr / 10 if scale_lr is None else scale_lr, 0.0),
    )
    return [{"params": p, "lr": rate, "weight_decay": decay, "name": name} for name, p, rate, decay in groups if p]
