"""`freeze`: make codes, scales and shifts final, packed as trained.

optimum-quanto's own ``freeze`` derives scales again from the float weight, which loses learned ones and moves codes in
bfloat16. Here each layer's quantizer is asked for its final codes, scale and shift, and exactly those are packed into
the tensor class that the target's loader will build. A layer at a time: the float master is dropped before the next one
is packed, so memory peaks at the model plus one layer.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.construction import constructed_tensors, differs, unstored_tensors
from qat.errors import QatError, StateError, TargetError
from qat.evidence import FrozenRecord, LayerEvidence, layer_evidence, record_frozen
from qat.layers import QLinear, quantized_layers
from qat.optimizers import unchanged
from qat.packing import as_held, keep_bias, pack
from qat.preparation import Prepared, forget_prepared, prepared_as
from qat.qtypes import QTYPES
from qat.quantizers.activation import ActivationQuantizer
from qat.targets import Target, get_target

__all__ = ["FreezeReport", "freeze", "frozen_copy"]

logger = logging.getLogger("qat")


@dataclass(frozen=True)
class FreezeReport:
    """What was frozen."""

    target: str
    dtype: str
    layers: dict[str, LayerEvidence]

    def __str__(self) -> str:
        """One line."""
        kinds = sorted({layer.weights for layer in self.layers.values()})
        return (
            f"froze {len(self.layers)} layers ({', '.join(kinds)}) for target {self.target!r}, served in {self.dtype}"
        )


def freeze(model: nn.Module, target: str | None = None) -> FreezeReport:
    """Replace every prepared layer by a frozen ``optimum.quanto.nn.QLinear``, in place, ready to run and to export.

    All other float parameters and persistent buffers get the dtype in which the target's loader holds them (never by
    ``Module.to``); rotary tables and other buffers that no file holds become what that loader makes them. The model is
    put into evaluation mode; nothing in it requires a gradient afterwards in the quantized layers.

    Args:
        model: a prepared model, the very module that `qat.prepare` was called on.
        target: who will load the export; default the one named at prepare.

    Raises:
        StateError: the model was not prepared, or training left inf or NaN in a layer. Nothing is changed then.
        TargetError: it was prepared for another target, and this one cannot serve it.
        CalibrationError: activations are quantized but were never calibrated. Nothing is changed then.
        QatError: a quantizer's packed codes give other values than its forward did. That is a fault of its algorithm,
            found layer by layer, since all packed tensors at once would be a second model; the layers before it are
            frozen by then, so take the masters from a checkpoint.

    >>> from qat import QuantSpec, prepare
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 16))
    >>> report = prepare(model, QuantSpec(weights="int4", overrides={"2": "int8"}))
    >>> print(freeze(model))
    froze 2 layers (int4, int8) for target 'quanto', served in bfloat16
    """
    never = _never_called(model)
    if never:
        logger.warning("%d layers were never called, %s: %s", len(never), _NEVER_CALLED, ", ".join(never))
    for warning in unchanged(model, never):
        logger.warning("%s", warning)
    return _freeze(model, target)


def _freeze(model: nn.Module, target: str | None) -> FreezeReport:
    prepared = prepared_as(model)
    room = get_target(target or prepared.target)
    layers = list(quantized_layers(model))
    if room.name != prepared.target:
        _check_other_target(model, room, prepared, layers)
    for _, layer in layers:
        for quantizer in layer.activation_quantizers():
            quantizer.require_scale()
    for name, layer in layers:
        _require_finite(name, layer)
    notes = (*prepared.notes, *(f"{name}: never called: {_NEVER_CALLED}" for name in _never_called(model)))
    constructed = constructed_tensors(model, room, prepared.spec.torch_dtype)
    evidence: dict[str, LayerEvidence] = {}
    for name, layer in layers:
        frozen, evidence[name] = _freeze_layer(name, layer, room, model)
        _replace(model, layer, frozen)
    quantized = set(evidence)
    _cast_the_rest(model, quantized, room, constructed)
    model.eval()
    forget_prepared(model)
    record = FrozenRecord(prepared.spec, room.name, prepared.algorithm.kind, evidence, notes, prepared.left_float)
    record_frozen(model, record)
    _set_config_dtype(model, prepared.spec.dtype)
    return FreezeReport(room.name, prepared.spec.dtype, evidence)


def _check_other_target(
    model: nn.Module, target: Target, prepared: Prepared, quantized: list[tuple[str, QLinear]]
) -> None:
    """Raise `TargetError` when ``target`` cannot serve what was prepared for another one."""
    faults = [*target.model_faults(model), *target.spec_faults(prepared.spec)]
    reasons = {
        name: target.layer_fault(model, name, layer.weight_quantizer.qtype, prepared.spec.dtype)
        for name, layer in quantized
    }
    refused = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    if refused:
        faults.append(f"{len(refused)} quantized layers would have to stay float, such as {', '.join(refused[:2])}")
    names = {name for name, _ in quantized}
    linear = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}
    shared = _last_parts(names) & _last_parts(linear - names)
    if target.leaf_names_only and shared:
        faults.append(
            f"target {target.name!r} tells layers apart by the last part of their name only, but some called "
            f"{sorted(shared)[:4]} are quantized and others not"
        )
    if faults:
        raise TargetError(
            f"target: the model was prepared for {prepared.target!r} and cannot be served by {target.name!r}: "
            f"{'; '.join(faults)}: prepare for the target that will load it"
        )


def _last_parts(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def frozen_copy(model: nn.Module, target: str | None = None) -> nn.Module:
    """A frozen copy of a prepared model; the model itself goes on training."""
    duplicate = copy.deepcopy(model)
    _freeze(duplicate, target)  # without the warning, which is for the end of training
    return duplicate


_NEVER_CALLED = (
    "if its weight is read without calling the layer, training used the float weight; exclude it or pass example_inputs"
)


def _never_called(model: nn.Module) -> list[str]:
    """Prepared layers that never ran although others did; nothing is known of those within compiled modules."""
    layers = list(quantized_layers(model))
    if not any(layer.called for _, layer in layers):
        return []
    compiled = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
    )
    return [name for name, layer in layers if not layer.called and not f"{name}.".startswith(compiled)]


@torch.no_grad()
def _require_finite(name: str, layer: QLinear) -> None:
    for key, parameter in layer.named_parameters():
        # NaN passes through a minimum and a maximum, and neither needs memory.
        if parameter.numel() and not bool(parameter.amin().isfinite() & parameter.amax().isfinite()):
            raise StateError(
                f"model: layer {name!r} holds inf or NaN in its {key}, so training diverged: go back to an earlier "
                "checkpoint, and train with a lower learning rate or with clipped gradients"
            )


@torch.no_grad()
def _freeze_layer(name: str, layer: QLinear, target: Target, model: nn.Module) -> tuple[nn.Module, LayerEvidence]:
    from optimum.quanto.nn import QLinear as QuantoLinear

    quantizer, dtype = layer.weight_quantizer, layer.weight_quantizer.dtype
    activations = layer.input_quantizer
    trained = quantizer.fake_quantized(layer.weight)
    final = quantizer.final(layer.weight)
    frozen = QuantoLinear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        dtype=dtype,
        device="meta",
        weights=QTYPES[quantizer.qtype].quanto_name,
        activations=None if activations is None else QTYPES[activations.qtype].quanto_name,
        quantize_input=True,
    )
    frozen.optimizer = None  # would only serve a second quantization, which must never happen
    packed = pack(final, quantizer.qtype, frozen.activation_qtype)
    held = as_held(packed if layer.bias is None else keep_bias(packed), target)
    frozen.weight = nn.Parameter(held, requires_grad=False)
    if layer.bias is not None:
        frozen.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    device = layer.weight.device
    frozen.input_scale = _activation_scale(layer.input_quantizer, dtype, device)
    frozen.output_scale = _activation_scale(layer.output_quantizer, dtype, device)
    if activations is not None and layer.output_quantizer is None:
        frozen.disable_output_quantization()
    if not torch.equal(frozen.weight.dequantize(), trained):
        raise QatError(
            f"freeze: layer {name!r} dequantizes to other values than its fake-quantized forward used; this is a fault "
            f"of {type(quantizer).__name__}: its scale_shift must depend on nothing but its state and the weight"
        )
    frozen.train(layer.training)
    return frozen, layer_evidence(frozen, trained)


def _activation_scale(quantizer: ActivationQuantizer | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if quantizer is None:
        return torch.ones((), dtype=dtype, device=device)
    return quantizer.scale.detach().to(device=device, dtype=dtype).clone()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@torch.no_grad()
def _cast_the_rest(model: nn.Module, quantized: set[str], target: Target, constructed: dict[str, Tensor]) -> None:
    spec = prepared_as(model).spec
    for path, module in model.named_modules():
        if path in quantized:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                full = f"{path}.{name}" if path else name
                parameter.data = parameter.data.to(target.tensor_dtype(model, full, spec))
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_floating_point():
                continue
            full = f"{path}.{name}" if path else name
            if name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(target.tensor_dtype(model, full, spec))
    for module, key, full, tensor in unstored_tensors(model):
        if full in constructed and differs(tensor, constructed[full]):
            setattr(module, key, constructed[full].to(tensor.device))


def _set_config_dtype(model: nn.Module, dtype: str) -> None:
    """Tell a transformers config (and those within it) which dtype the weights now have."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "sub_configs") or not hasattr(config, "dtype"):
        return
    serving = getattr(torch, dtype)
    config.dtype = serving
    for key in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "dtype"):
            inner.dtype = serving
