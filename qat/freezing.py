"""`freeze`: make codes, scales and shifts final, packed as trained, never derived again from the float weight.

A layer at a time: the float master is dropped before the next layer is packed. The fake-quantized value is hashed in a
thread, while it is compared in blocks of rows. On a CPU the next layer waits for that hash. From a GPU the value is
copied, and hashes of a few layers run at once. So memory peaks at the model plus one value with its codes. Why
optimum-quanto's own ``freeze`` is not used: docs/decisions/0002-pack-never-derive.md.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.adapters import active_adapters, adapters, merge_adapters, without_peft
from qat.checks import (
    function_check,
    hooks_change,
    other_mode,
    require_final_types,
    require_finite,
    require_held,
    require_range,
    require_target,
    unreached_layers,
    values_fault,
)
from qat.distributed import (
    gather,
    gather_rest,
    is_unit,
    mark_gathered,
    own_hooks,
    refuse_cast_ranges,
    reshard,
    sharded,
    unwrap,
)
from qat.errors import QatError, StateError, listed
from qat.files.evidence import FrozenRecord, LayerEvidence, record_frozen, refuse_saving
from qat.formats import FrozenLayer, LayerTypes
from qat.hosts import Target, get_target, host_of
from qat.hosts.construction import constructed_tensors, differs, unstored_tensors
from qat.jobs import begun, in_threads
from qat.layers import QuantizedLayer, quantized_layers
from qat.optimizers import unchanged
from qat.preparation import Prepared, forget_prepared, prepared_as
from qat.probing import several_processes, together
from qat.progress import counted
from qat.quantizers.activation import ActivationQuantizer
from qat.runs import read_without_call
from qat.starting import awaiting
from qat.tensors import await_numbers, digest, is_sharded, meta_names, model_device, same_bits, stored_tensors

__all__ = ["FreezeReport", "freeze", "frozen_copy"]

logger = logging.getLogger("qat")

_Place = tuple[dict[str, nn.Module | None], str]
"""Where a layer stands: its parent's submodules, and its key there."""


@dataclass(frozen=True)
class FreezeReport:
    """What was frozen."""

    target: str
    dtype: str
    layers: dict[str, LayerEvidence]

    def __str__(self) -> str:
        types = sorted({layer.weights for layer in self.layers.values()})
        return (
            f"froze {len(self.layers)} layers ({', '.join(types)}) for target {self.target!r}, served in {self.dtype}"
        )


def freeze(
    model: nn.Module,
    *,
    target: str | None = None,
    allow_unreached: bool = False,
    allow_reads: bool = False,
    progress: bool = False,
) -> FreezeReport:
    """Replace every prepared layer by a frozen one of the target's format, in place, ready to run and to export.

    All other float parameters and persistent buffers get the dtype in which the target's loader holds them (never by
    ``Module.to``); rotary tables and other buffers that no file holds become what that loader makes them. The model is
    put into evaluation mode; nothing in it requires a gradient afterwards in the quantized layers. ``save_pretrained``
    of a frozen model raises: `qat.export` writes it. Adapters of peft are merged, those over float layers too.

    All ranks freeze a sharded model together, and each ends with the whole frozen one: see `qat.distributed`.

    Args:
        model: a prepared model, the very module that `qat.prepare` was called on.
        target: who will load the export; default the one named at prepare.
        allow_unreached: freeze layers that never ran although the model did: training or evaluation may have gone
            around them, with the float weight. A model that never ran since it was prepared is frozen without question,
            and so are layers in compiled modules and those that a checkpoint was loaded into: nothing is known of them.
        allow_reads: freeze layers whose weight the model also uses without calling them, as for a penalty on weights
            that is no part of the outputs.
        progress: show a bar, on a terminal.

    A layer with forward hooks is called once more, with a few random rows, to see whether its hooks change it.

    Raises:
        StateError: the model was not prepared, or layers changed since; layers never ran although the model did; the
            model uses a layer's weight without calling the layer; hooks change what a layer computes; layers still have
            the type ``first_weights`` of the schedule; training left inf or NaN in a layer, or numbers that float16
            cannot hold. Nothing is changed then.
        TargetError: it was prepared for another target, and this one cannot serve it.
        CalibrationError: activations are quantized but were never calibrated. Nothing is changed then.
        QatError: a quantizer's packed codes give other values than its forward did, or a frozen layer computes another
            function: a fault of an algorithm, a layer or a format of your own. It is found layer by layer, since all
            packed tensors at once would be a second model; other layers are frozen by then, so take the masters from a
            checkpoint.

    >>> from qat import QuantSpec, prepare
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 16))
    >>> report = prepare(model, QuantSpec(weights="int4", overrides={"2": "int8"}))
    >>> loss = model(torch.randn(2, 256)).square().mean()  # ... and train
    >>> print(freeze(model))
    froze 2 layers (int4, int8) for target 'quanto', served in bfloat16
    """
    outer, model = model, without_peft(model)
    if isinstance(model, nn.Module) and sharded(model):
        if not is_unit(outer):
            raise StateError("model: is a part of what is sharded: freeze the module that qat.shard was called on")
        reshard(outer)
        refuse_cast_ranges(outer)
    report = _freeze(model, target, _remarks(model, allow_unreached, allow_reads), progress, outer)
    refuse_saving(outer)
    return report


def _remarks(model: nn.Module, allow_unreached: bool, allow_reads: bool) -> list[str]:
    """What the record keeps of how the model was trained; `StateError` where that forbids to freeze it."""
    layers = dict(quantized_layers(model))
    prepared, modules = prepared_as(model), dict(model.named_modules())
    if empty := meta_names(model):
        raise StateError(f"model: {listed(empty, 4)} have no numbers (meta device): load its weights first")
    gone = [name for name in prepared.layers if name not in layers]
    format = get_target(prepared.target).format
    if half := [name for name in gone if name in modules and format.is_frozen(modules[name])]:
        raise StateError(
            f"model: {len(half)} layers are frozen and others are not (first: {half[0]!r}): an earlier qat.freeze was "
            "interrupted; take the masters from a checkpoint, and freeze again"
        )
    if gone and len(layers) < len(prepared.layers):  # else a wrapper, as of torch.compile, has changed their names
        raise StateError(
            f"model: {len(gone)} of {len(prepared.layers)} prepared layers were replaced since ({listed(gone, 4)}) and "
            "would be served in float: leave peft's merge_and_unload to qat.freeze, which merges adapters as they were "
            "trained, and resize or replace layers before qat.prepare"
        )
    with together(StateError) if sharded(model) else nullcontext():  # a rank may have seen what others have not
        (unreached, idle), read = unreached_layers(model), read_without_call(model)
        if unreached and not allow_unreached:
            raise StateError(
                f"model: {len(unreached)} prepared layers never ran with their quantized weight "
                f"({listed(unreached, 4)}) although the model ran: exclude layers whose weight is read without a call "
                "(prepare finds them with example_inputs), run the model once as it will be served, or pass "
                "allow_unreached=True"
            )
        if read is not None and not allow_reads:
            raise StateError(f"{read}, or pass allow_reads=True if the outputs do not depend on them")
    require_final_types(model, "frozen")
    for name, module in (*layers.items(), *adapters(model)):
        require_finite(name, module)
    hooked = [name for name, layer in layers.items() if own_hooks(layer)]
    changing = [name for name in hooked if hooks_change(layers[name])]
    if changing:
        raise StateError(
            f"model: hooks change what {len(changing)} prepared layers compute ({listed(changing, 4)}), and freezing "
            "drops them: remove them, or move what they do into a module of its own"
        )
    now = active_adapters(model)
    if prepared.adapters and now and now != prepared.adapters:
        logger.warning("ranges were found for the adapters %s, but now %s are active", [*prepared.adapters], [*now])
    if hooked:
        logger.warning("%d layers have hooks, which freezing drops: %s", len(hooked), listed(hooked, 4))
    for warning in unchanged(model, [*unreached, *idle]):
        logger.warning("%s", warning)
    notes = [] if read is None else [read]
    if waiting := awaiting(model):
        notes.append(
            f"{len(waiting)} layers are frozen as they start with 'clip', for their own start needs data: call "
            f"qat.calibrate(model, batches) before ({listed(list(waiting), 4)})"
        )
        logger.warning("%s", notes[-1])
    if idle:
        experts: dict[str, list[str]] = {}
        for name in dict.fromkeys(name.rpartition(".")[0] for name in idle):
            experts.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
        places = [f"{name} ({', '.join(numbers)})" for name, numbers in experts.items()]
        count = sum(map(len, experts.values()))
        when = "in training, and so learned nothing" if any(one.trained for one in layers.values()) else "at all"
        when += ", as far as this rank knows" if several_processes() else ""
        notes.append(f"{count} experts never saw a token {when}: {listed(places, 100)}")
        logger.warning("%s", notes[-1])
    if unreached:
        notes.append(f"{len(unreached)} layers were frozen although they never ran quantized: {listed(unreached, 4)}")
    return notes


def _freeze(
    model: nn.Module,
    target: str | None,
    remarks: Sequence[str] = (),
    progress: bool = False,
    outer: nn.Module | None = None,
) -> FreezeReport:
    prepared = prepared_as(model)
    chosen = get_target(target or prepared.target)
    notes = (*prepared.notes, *remarks, *_check_layers(model, chosen, prepared))
    shards = sharded(model)
    cast = unwrap(outer or model) if shards else {}
    if cast:
        dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in cast.values()}))
        notes = (
            *notes,
            f"codes are of the {dtypes} copies of masters that a mixed-precision policy trained with",
        )
    places = _places(model)
    for name, module in adapters(model):
        if name not in places:
            gather(module, cast)
    merge_adapters(model, places)
    constructed = constructed_tensors(model, chosen, prepared.spec.torch_dtype)
    types = [layer.weight_quantizer.final_qtype for _, layer in quantized_layers(model)]
    algorithms = ", ".join(sorted({prepared.algorithm.for_type(qtype).kind for qtype in types}))
    kinds: set[tuple[object, ...]] = set()
    tied: dict[int, list[str]] = {}
    for name, layer in quantized_layers(model):
        tied.setdefault(id(layer.weight_quantizer), []).append(name)

    def calls() -> Iterator[Callable[[], LayerEvidence]]:
        for name, held in places.items():
            with together(QatError) if shards else nullcontext():
                gather(held[0][0][held[0][1]], cast)
                call = _freeze_layer(name, held, chosen, prepared, kinds)
            yield call

    hashed = in_threads(calls(), threads=2) if model_device(model).type == "cpu" else in_threads(calls())
    evidence = dict(zip(places, counted(hashed, "freezing", progress, len(places)), strict=True))
    for names in tied.values():
        chosen.format.tie([model.get_submodule(name) for name in names])
    _cast_the_rest(model, set(evidence), chosen, constructed)
    _own_forward(model)
    if shards:
        mark_gathered(model)
    model.eval()
    forget_prepared(model)
    record = FrozenRecord(prepared.spec, chosen.name, algorithms, evidence, notes, prepared.left_float)
    record_frozen(model, record)
    host_of(model).set_dtype(model, prepared.spec.torch_dtype)
    return FreezeReport(chosen.name, prepared.spec.dtype, evidence)


def _own_forward(model: nn.Module) -> None:
    """Take off the autocast that accelerate has put around a model's forward: a frozen one computes as it is served."""
    original = vars(model).pop("_original_forward", None)
    if original is not None and vars(model).pop("forward", None) and original.__func__ is not type(model).forward:
        setattr(model, "forward", original)  # noqa: B010 (mypy takes the plain form for a method)


def _check_layers(model: nn.Module, chosen: Target, prepared: Prepared) -> list[str]:
    """What the record keeps of the layers' activations; raise where a layer cannot be frozen."""
    layers = list(quantized_layers(model))
    if chosen.name != prepared.target:
        require_target(model, chosen, prepared, layers)
    for _, layer in layers:
        for quantizer in layer.activation_quantizers():
            quantizer.require_scale()
    for name, layer in layers:
        if (fault := layer.object_fault(layer) or layer.usage_fault(layer)) is not None:
            raise StateError(f"model: layer {name!r} has changed since it was prepared: {fault}")
    require_range(model, layers, chosen.rules(model, prepared.spec.torch_dtype))
    narrow = [name for name, layer in layers if _narrower(layer.weight_quantizer.dtype, layer)]
    if narrow:
        logger.warning(
            "%d layers trained in a narrower dtype than they are served in, which rounded their values: %s",
            len(narrow),
            listed(narrow, 4),
        )
    if calm := [name for name, layer in layers if not all(q.enabled for q in layer.activation_quantizers())]:
        return [f"calibration left the activations of {len(calm)} layers float: {listed(calm, 8)}"]
    return []


def frozen_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of a prepared model; the model itself goes on training."""
    duplicate = copy.deepcopy(model)
    _freeze(duplicate, None)  # without the question that is for the end of training
    return duplicate


@torch.no_grad()
def _freeze_layer(
    name: str, places: list[_Place], target: Target, prepared: Prepared, kinds: set[tuple[object, ...]]
) -> Callable[[], LayerEvidence]:
    """Freeze a layer in place, and return the call that hashes its evidence.

    ``kinds`` are those whose function was compared already.
    """
    (children, key), *_ = places
    layer = children[key]
    assert isinstance(layer, QuantizedLayer)
    quantizer = layer.weight_quantizer
    master = layer.effective_weight(layer)
    device = master.device
    with other_mode(quantizer):
        weight = quantizer.final_codes(master)
    if narrow := quantizer.dtype is torch.float16:
        require_held(name, scale=weight.scale, shift=weight.shift)
    bias: Tensor | None = getattr(layer, "bias", None)
    kernel = layer.stored_kernel(layer)
    types = LayerTypes(weight.qtype, layer.activation_qtype, quantizer.dtype, prepared.spec.outputs, kernel)
    out_features, in_features = weight.shape
    final = FrozenLayer(
        weight,
        None if bias is None else bias.detach().to(types.dtype),
        types,
        _activation_scale(layer.input_quantizer, types.dtype, device),
        _activation_scale(layer.output_quantizer, types.dtype, device),
    )
    tensors = target.format.pack(final)
    del weight, final  # codes of 4 and 2 bits are packed now
    frozen = target.build(types, (out_features, in_features), tensors, like=layer)
    del tensors
    trained = quantizer.quantize(master, quantizer.dtype).value  # as a forward asks for it, apart from the codes
    if narrow:
        require_held(name, value=trained)
    hashed = begun(functools.partial(digest, trained.cpu()))
    packed, first = target.format.read(frozen), 0
    for block in target.format.value_blocks(frozen, packed):
        nan = block.numel() and bool(block.max().isnan())  # which no file should hold, whatever its bits
        if nan or not same_bits(block, trained[first : first + len(block)]):
            raise QatError(f"freeze: layer {name!r}: {values_fault(layer, trained)}")
        first += len(block)
    if device.type == "cpu":
        hashed()  # so that no thread holds the value of this layer beside that of the next one
    del trained
    kind = (type(layer), type(quantizer), types, bias is None, device.type, master.dtype)
    check = None if kind in kinds else function_check(layer)
    kinds.add(kind)
    frozen.train(layer.training)
    for children, key in places:
        children[key] = frozen
    layer.released()
    del layer, master, quantizer
    if check is not None and (fault := check(frozen)) is not None:
        raise QatError(f"freeze: layer {name!r}: {fault}")
    await_numbers(packed.weight.codes)
    return lambda: packed.evidence(hashed())


def _narrower(serving: torch.dtype, layer: QuantizedLayer) -> bool:
    first = next(iter(layer.masters(layer).values()), None)  # of a shard, a part would be gathered
    master = layer.like_weight(layer).dtype if first is None or not is_sharded(first) else first.dtype
    return torch.promote_types(master, serving) is not master


def _activation_scale(quantizer: ActivationQuantizer | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if quantizer is None or not quantizer.enabled:
        return torch.ones((), dtype=dtype, device=device)
    return quantizer.serving_scale().to(device=device, dtype=dtype).clone()


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """The places of each prepared layer, by its name; they keep no layer that was replaced, and so no master."""
    places: dict[int, list[_Place]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent._modules, key))
    return {name: places[id(layer)] for name, layer in quantized_layers(model)}


@torch.no_grad()
def _cast_the_rest(model: nn.Module, quantized: set[str], target: Target, constructed: dict[str, Tensor]) -> None:
    rules = target.rules(model, prepared_as(model).spec.torch_dtype)
    gather_rest(model, lambda name, x: x.to(rules.tensor_dtype(name)) if x.is_floating_point() else x)
    for name, tensor in stored_tensors(model):
        if tensor.is_floating_point() and name.rpartition(".")[0] not in quantized:
            tensor.data = tensor.data.to(rules.tensor_dtype(name))
    for module, key, full, tensor in unstored_tensors(model):
        if full in constructed and differs(tensor, constructed[full]):
            fresh = constructed[full].to(tensor.device)
            cast = fresh.to(tensor.dtype)
            grown = fresh.shape != tensor.shape  # a table of positions, by a longer input
            if grown or not torch.allclose(cast, tensor, rtol=0.02, atol=1e-3, equal_nan=True):  # no mere cast
                logger.warning("%s is in no file: it is set to what the target's loader makes, not what it was", full)
            setattr(module, key, fresh)
