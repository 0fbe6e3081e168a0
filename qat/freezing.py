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

from qat.errors import QatError, StateError, TargetError
from qat.evidence import FrozenRecord, LayerEvidence, layer_evidence, record_frozen
from qat.layers import QLinear, quantized_layers
from qat.preparation import Prepared, forget_prepared, prepared_as
from qat.qtypes import QTYPES, group_size
from qat.quantizers import Final
from qat.quantizers.activation import ActivationQuantizer
from qat.targets import Target, get_target

__all__ = ["FreezeReport", "constructed_buffers", "differs", "freeze", "frozen_copy"]

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
    return _freeze(model, target)


def _freeze(model: nn.Module, target: str | None) -> FreezeReport:
    prepared = prepared_as(model)
    room = get_target(target or prepared.target)
    layers = list(quantized_layers(model))
    if room.name != prepared.target:
        _check_other_target(model, room, prepared, [name for name, _ in layers])
    for _, layer in layers:
        for quantizer in (layer.input_quantizer, layer.output_quantizer):
            if quantizer is not None:
                quantizer.require_scale()
    for name, layer in layers:
        _require_finite(name, layer)
    notes = (*prepared.notes, *(f"{name}: never called: {_NEVER_CALLED}" for name in _never_called(model)))
    constructed = constructed_buffers(model, room.name, prepared.spec.torch_dtype)
    evidence: dict[str, LayerEvidence] = {}
    for name, layer in layers:
        frozen, evidence[name] = _freeze_layer(name, layer, room, model)
        _replace(model, layer, frozen)
    quantized = set(evidence)
    _cast_the_rest(model, quantized, room, constructed)
    model.eval()
    forget_prepared(model)
    record = FrozenRecord(prepared.spec, room.name, prepared.algorithm.kind, evidence, notes)
    record_frozen(model, record)
    _set_config_dtype(model, prepared.spec.dtype)
    return FreezeReport(room.name, prepared.spec.dtype, evidence)


def _check_other_target(model: nn.Module, target: Target, prepared: Prepared, quantized: list[str]) -> None:
    """Raise `TargetError` when ``target`` cannot serve what was prepared for another one."""
    faults = target.spec_faults(prepared.spec)
    kept = [name for name in quantized if target.kept_in_float32(model, name, prepared.spec.dtype)]
    if kept:
        faults.append(f"target {target.name!r} keeps {kept[:4]} in float32, but they are quantized")
    if faults:
        raise TargetError(
            f"target: the model was prepared for {prepared.target!r} and cannot be served by {target.name!r}: "
            f"{'; '.join(faults)}: prepare for the target that will load it"
        )


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
    frozen.weight = nn.Parameter(_pack(final, quantizer.qtype, frozen.activation_qtype), requires_grad=False)
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


def _pack(final: Final, qtype: str, activation_qtype: Any) -> Tensor:
    """The weight tensor as the loaders build it from a file."""
    from optimum.quanto import qtypes
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor

    kind = QTYPES[qtype]
    codes, scale, shift = final
    size, stride = codes.size(), codes.stride()
    if not kind.affine:
        scale = scale.reshape(()) if codes.shape[0] == 1 else scale  # one row: per-tensor, as quanto has it
        packed = WeightQBytesTensor(qtypes[kind.quanto_name], 0, size, stride, codes, scale, activation_qtype)
    else:
        elements = group_size(qtype, codes.shape[1])
        rows = codes if elements is None else codes.reshape(-1, elements)
        packed = WeightQBitsTensor(qtypes[kind.quanto_name], 0, elements, size, stride, rows, scale, shift)
    return packed.optimize()  # type: ignore[no-any-return]


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
            elif full in constructed and differs(buffer, constructed[full]):
                module._buffers[name] = constructed[full].to(buffer.device)


def differs(buffer: Tensor, constructed: Tensor) -> bool:
    """Whether a buffer is not what its loader makes."""
    return buffer.dtype != constructed.dtype or not torch.equal(buffer, constructed.to(buffer.device))


def constructed_buffers(model: nn.Module, target: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating buffers that no file holds, as a transformers model's loader makes them when it serves ``dtype``.

    Gemma's embedding scale takes the serving dtype, rotary tables stay float32, GPT-J's are float32 but computed in
    the serving dtype by quanto's loader. A model that was built in, or cast to, another dtype (Lightning's
    ``bf16-true``) has others. Empty for models that no config builds.
    """
    build, config = getattr(type(model), "_from_config", None), getattr(model, "config", None)
    names = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    if build is None or config is None or not names:
        return {}
    from accelerate import init_empty_weights

    def built(kind: torch.dtype) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            twin: nn.Module = build(copy.deepcopy(config), dtype=kind)
        return {name: b for name, b in twin.named_buffers() if name in names and b.is_floating_point()}

    try:
        served = built(dtype)
        if dtype is torch.float32 or not get_target(target).initialises_buffers:
            return served
        return {name: buffer.to(served[name].dtype) for name, buffer in built(torch.float32).items()}
    except TypeError:  # a class that its config alone does not build has no such loader
        return {}


def _set_config_dtype(model: nn.Module, dtype: str) -> None:
    """Tell a transformers config (and those within it) which dtype the weights now have."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "dtype"):
        return
    serving = getattr(torch, dtype)
    config.dtype = serving
    for key in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "dtype"):
            inner.dtype = serving
