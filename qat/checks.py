"""What freezing asks of a prepared model: did its layers run, are its numbers fit to serve, does a frozen layer agree?

The last question runs layers on a few random rows, one layer of each kind. It finds what digests of weights cannot: a
layer, a format or a quantizer of your own whose forward computes something else than what is exported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from qat.distributed import gathered
from qat.errors import StateError, TargetError, listed
from qat.hosts import Rules, Target, get_target
from qat.layers import Mode, QuantizedLayer, float_layers, quantized_layers
from qat.preparation import Prepared
from qat.probing import compiled_parts
from qat.quantizers import WeightQuantizer
from qat.quantizers.activation import fake_quantize_output
from qat.runs import runs
from qat.tensors import TOLERANCE, is_sharded, stored_tensors

__all__ = [
    "function_check",
    "hooks_change",
    "loses_scales",
    "other_mode",
    "require_final_types",
    "require_finite",
    "require_held",
    "require_range",
    "require_target",
    "unreached_layers",
    "values_fault",
]

_ROWS = 4
_CODE_STEP = 0.13
"""Effect of one activation step, relative to the largest output: 1/8 with float8."""


def unreached_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Prepared layers that never ran quantized, if anything ran; nothing is known of compiled modules.

    The second list is of experts that saw no token, while others beside them did: their path is known. Where others
    saw one with gradients, in training, a token of an evaluation does not count.
    """
    layers = list(quantized_layers(model))
    if not (runs(model) or any(layer.reached for _, layer in layers)):
        return [], []
    compiled = compiled_parts(model)
    shared = {id(layer.weight_quantizer) for _, layer in layers if layer.reached}  # layers may share a weight
    most: dict[object, int] = {}  # of the experts beside each other: what is the most that one was trained
    for name, layer in layers:
        for place in _of_experts(name, layer) if layer.reached else ():
            most[place] = max(most.get(place, 0), layer.trained)
    found: tuple[list[str], list[str]] = [], []
    for name, layer in layers:
        others = [most[place] for place in _of_experts(name, layer) if place in most]
        ran = id(layer.weight_quantizer) in shared and layer.trained >= max(others, default=0)
        if not ran and not f"{name}.".startswith(compiled):
            found[bool(others)].append(name)
    return found


def _of_experts(name: str, layer: QuantizedLayer) -> set[object]:
    """What a layer shares with those of other experts: a parameter, or all of its name but the expert's."""
    if not layer.called:
        return {id(p) for p in layer.masters(layer).values()}
    expert = re.fullmatch(r"(.*expert[^.]*)\.[^.]*\d+\.([^.]+)", name)
    return set() if expert is None else {expert.groups()}


@torch.no_grad()
def require_range(model: nn.Module, layers: list[tuple[str, QuantizedLayer]], rules: Rules) -> None:
    """Raise `StateError` where float16 cannot hold a number of a model that will be served in it."""
    largest = torch.finfo(torch.float16).max
    quantizers = tuple(f"{name}.{side}_quantizer." for name, _ in layers for side in ("weight", "input", "output"))
    for name, tensor in stored_tensors(model):
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or name.startswith(quantizers):
            continue
        if rules.tensor_dtype(name) is not torch.float16:
            continue
        if is_sharded(tensor):  # a part may have no elements
            beyond = (tensor.abs() > largest).any()
        else:
            beyond = (tensor.amax() > largest) | (tensor.amin() < -largest)
        if bool(beyond):
            raise StateError(
                f"model: {name} holds numbers beyond ±{largest:g}, which float16 cannot hold: serve in bfloat16 "
                "(QuantSpec(dtype='bfloat16')), or train with smaller weights"
            )
    for name, layer in layers:
        if not all(bool(q.serving_scale().to(q.dtype).isfinite()) for q in layer.activation_quantizers() if q.enabled):
            raise StateError(
                f"model: layer {name!r} has an activation scale beyond its dtype: serve in bfloat16, or calibrate again"
            )
        if loses_scales(layer):
            raise StateError(
                f"model: layer {name!r}: the scales of its input and its weight have a product too small for float16: "
                "serve in bfloat16 (QuantSpec(dtype='bfloat16')), or exclude the layer"
            )


def require_held(name: str, **parts: Tensor | None) -> None:
    """Raise `StateError` where the dtype of a layer's scale, shift or value cannot hold one of its numbers."""
    for what, tensor in parts.items():
        if tensor is not None and tensor.numel() and any(bool(end.isinf()) for end in torch.aminmax(tensor)):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise StateError(
                f"model: layer {name!r}: a {what} of its weight is beyond what {dtype} can hold: serve in bfloat16 "
                "(QuantSpec(dtype='bfloat16')), or train with a lower rate of learned scales"
            )


@torch.no_grad()
def loses_scales(layer: QuantizedLayer, mean: float = 1.0) -> bool:
    """Whether the serving dtype cannot hold the product of input scale and weight scale, by which loaders scale.

    No row may be off by more than an eighth, nor the weight as a whole, in the root of its mean square, by ``mean``.
    """
    activation, quantizer = layer.input_quantizer, layer.weight_quantizer
    if (
        quantizer.dtype is not torch.float16
        or quantizer.qtype.has_shift
        or not quantizer.qtype.multiplies
        or activation is None
        or not activation.enabled
    ):
        return False
    if not activation.initialized:
        return False
    with gathered(layer):
        weight = layer.effective_weight(layer)
        return not weight.is_meta and _loses(quantizer, weight, activation.serving_scale(), mean)


def _loses(quantizer: WeightQuantizer, weight: Tensor, x_scale: Tensor, mean: float) -> bool:
    scale = quantizer.quantize_to_codes(weight).scale
    exact = (scale.double() * x_scale.double()).flatten()
    off = ((scale.half() * x_scale.half()).double().flatten() / exact.clamp(min=1e-300) - 1).abs()
    rows = weight.double().square().sum(1)
    whole = (off.square() @ rows) / rows.sum().clamp(min=1e-300)
    return bool(((off > 1 / 8) & (rows > 0)).any() | (whole > mean * mean))


def require_target(
    model: nn.Module, target: Target, prepared: Prepared, quantized: list[tuple[str, QuantizedLayer]]
) -> None:
    """Raise `TargetError` when ``target`` cannot serve what was prepared for another one."""
    faults = target.faults(model, prepared.spec)
    if target.format is not get_target(prepared.target).format:
        faults.append(f"its format {target.format.name!r} has another arithmetic than the one that was trained with")
    rules = target.rules(model, prepared.spec.torch_dtype)
    reasons = {name: rules.layer_fault(name, layer.weight_quantizer.qtype) for name, layer in quantized}
    refused = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    refused += [
        f"{name} (its loader replaces no {layer.replaces.__name__})"
        for name, layer in quantized
        if layer.targets and target.name not in layer.targets
    ]
    if target.host.ties(model) is None:
        refused += [f"{name} (its loader ties no weights)" for name, layer in quantized if layer.shares]
    if refused:
        faults.append(f"{len(refused)} quantized layers would have to stay float, such as {', '.join(refused[:2])}")
    names = {name for name, _ in quantized}
    layers = {
        name
        for name, _, cls in float_layers(model, remove_duplicate=False)
        if target.name in (cls.targets or (target.name,))
    }
    keys = {name: target.host.layer_key(model, name) for name in names | layers}
    shared = {keys[name] for name in names} & {keys[name] for name in layers - names}
    if shared:
        faults.append(
            f"target {target.name!r} {target.host.families}, but some called {sorted(shared)[:4]} are quantized "
            "and others not"
        )
    if faults:
        raise TargetError(
            f"target: the model was prepared for {prepared.target!r} and cannot be served by {target.name!r}: "
            f"{'; '.join(faults)}: prepare for the target that will load it"
        )


def require_final_types(model: nn.Module, become: str) -> None:
    """Raise `StateError` where layers still train as another type than the one that they are to ``become``."""
    quantizers = {name: layer.weight_quantizer for name, layer in quantized_layers(model)}
    if first := [name for name, own in quantizers.items() if own.qtype != own.final_qtype]:
        now, final = quantizers[first[0]].qtype, quantizers[first[0]].final_qtype
        raise StateError(
            f"model: {len(first)} layers still train as {now.name} ({listed(first, 4)}), but are to be {become} as "
            f"{final.name}: train on, past the schedule's first_weights_until"
        )


@torch.no_grad()
def require_finite(name: str, layer: nn.Module) -> None:
    """Raise `StateError` where training left inf or NaN in a layer."""
    own: list[tuple[str, Tensor]] = []
    if isinstance(layer, QuantizedLayer) and not layer.called:  # its master is its owner's
        whole = layer.masters(layer)
        own += whole.items() if any(map(is_sharded, whole.values())) else [("weight", layer.effective_weight(layer))]
    for key, parameter in (*layer.named_parameters(), *own):
        if is_sharded(parameter):  # all ranks find the same; of a part without elements there is no minimum
            finite = bool(parameter.isfinite().all())
        else:  # NaN passes through a minimum and a maximum, and neither needs memory.
            finite = not parameter.numel() or all(bool(end.isfinite()) for end in torch.aminmax(parameter))
        if not finite:
            raise StateError(
                f"model: layer {name!r} holds inf or NaN in its {key}, so training diverged: go back to an earlier "
                "checkpoint, and train with a lower learning rate or with clipped gradients"
            )


def _example(layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
    """A few random rows, on the grid of a quantized input, so that no value lies near a rounding boundary."""
    x = layer.example_input(_ROWS, torch.Generator("cpu").manual_seed(0))
    x = _cast(x, dtype).to(layer.like_weight(layer).device)
    quantizer = layer.input_quantizer
    if quantizer is None or not quantizer.initialized or not quantizer.enabled:
        return x
    return fake_quantize_output(x * (quantizer.serving_scale() * quantizer.qtype.steps / 3).to(dtype), quantizer)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x  # ids stay ids


@torch.no_grad()
def hooks_change(layer: QuantizedLayer) -> bool:
    """Whether the forward hooks of a layer change what it computes. They run once; the layer is left as it was."""
    with gathered(layer):
        return _hooks_change(layer)


def _hooks_change(layer: QuantizedLayer) -> bool:
    state = [*layer.parameters(), *layer.buffers()]
    x, kept = _example(layer, layer.like_weight(layer).dtype), [tensor.clone() for tensor in state]
    reached, mode, layer.mode = layer.reached, layer.mode, Mode()
    try:
        for rows in (x, x[None]):  # a hook may want a batch of sequences
            bare = layer.forward(rows)
            with suppress(Exception):
                hooked = layer(rows)
                return not isinstance(hooked, Tensor) or not torch.equal(hooked, bare)
        return False  # of a hook that wants other inputs nothing is known; freezing names it all the same
    finally:
        layer.reached, layer.mode = reached, mode
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)


@torch.no_grad()
def values_fault(layer: QuantizedLayer, trained: Tensor) -> str:
    """What is wrong with a layer whose codes, made in the quantizer's other mode, give other values than ``trained``.

    ``trained`` is the fake-quantized weight in the serving dtype.
    """
    quantizer, master = layer.weight_quantizer, layer.effective_weight(layer)
    again = torch.equal(quantizer.quantize(master, trained.dtype).value, trained)
    with other_mode(quantizer):
        in_other_mode = torch.equal(quantizer.quantize(master, trained.dtype).value, trained)
    if again and not in_other_mode:
        return f"{type(quantizer).__name__}.quantize depends on its training mode: it must give the same in both"
    return (
        "it dequantizes to other values than its fake-quantized forward used; this is a fault of "
        f"{type(quantizer).__name__}: what quantize returns must depend on nothing but its state and the weight"
    )


@contextmanager
def other_mode(module: nn.Module) -> Iterator[None]:
    """Put a module that trains into evaluation mode for a while, or the other way round."""
    module.train(not module.training)
    try:
        yield
    finally:
        module.train(not module.training)


@torch.no_grad()
def function_check(layer: QuantizedLayer) -> Callable[[nn.Module], str | None]:
    """Run a prepared layer; what is returned says why the frozen one computes something else, or None.

    Kernels round sums in their own ways, so outputs are compared within a tolerance, and where both are finite; weights
    are compared elsewhere. What is returned does not hold the prepared layer.
    """
    dtype, master_dtype = layer.weight_quantizer.dtype, layer.like_weight(layer).dtype
    layer.mode, x = Mode(), _example(layer, dtype)
    mixed = dtype is not torch.float32 and dtype is not master_dtype
    with torch.autocast(x.device.type, dtype if mixed else None, enabled=mixed):
        wanted = layer.forward(x if mixed else _cast(x, master_dtype))
    tolerance = max(TOLERANCE.get(str(d).removeprefix("torch."), 0.0) for d in (dtype, wanted.dtype))
    if layer.input_quantizer is not None:
        tolerance = max(tolerance, _CODE_STEP)
    return functools.partial(_function_fault, type(layer).__name__, x, wanted.float(), tolerance)


@torch.no_grad()
def _function_fault(name: str, x: Tensor, wanted: Tensor, tolerance: float, frozen: nn.Module) -> str | None:
    with torch.autocast(x.device.type, enabled=False):
        found = frozen(x).dequantize().float()
    if found.shape == wanted.shape:
        finite = found.isfinite() & wanted.isfinite()  # float16 overflows with weights that it can hold
        gap, size = ((t.where(finite, 0.0)).abs().max() for t in (found - wanted, wanted))
        if bool(gap <= tolerance * size):
            return None
    return (
        f"frozen, it computes something else than {name} did (an output of {tuple(found.shape)}): its "
        f"compute, or the module that the format builds ({type(frozen).__name__}), is wrong"
    )
