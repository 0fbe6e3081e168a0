"""Where a reloaded model differs from the evidence that freezing left, from the files, or from the live model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from qat.files.evidence import FrozenRecord, LayerEvidence
from qat.files.manifest import Manifest
from qat.files.shards import DTYPE_NAMES
from qat.formats import Format
from qat.formats.state import ModelState
from qat.hosts import host_of
from qat.hosts.construction import unstored_tensors
from qat.jobs import in_threads
from qat.layers import float_layers
from qat.tensors import difference, digest, stored_tensors

__all__ = ["layer_faults", "made_float", "reference_faults", "tensor_faults", "value_faults"]


def layer_faults(model: nn.Module, record: FrozenRecord, format: Format, codes_only: bool) -> list[str]:
    """Where a reloaded layer is not what freezing left, by digests: which part, not how much."""
    modules, faults = dict(model.named_modules()), []
    extra = [name for name, module in modules.items() if format.is_frozen(module) and name not in record.layers]
    faults += [f"{name} is quantized after loading, but freezing left it float" for name in extra]
    names = [name for name in record.layers if name in modules and format.is_frozen(modules[name])]
    faults += [f"{name} is not a quantized layer after loading" for name in record.layers if name not in names]
    for name, found in zip(names, in_threads(_evidence(modules[name], format) for name in names), strict=True):
        differ = record.layers[name].differences(found)
        if codes_only:
            differ = [part for part in differ if part in ("weights", "shape", "group_size", "codes")]
        if differ:
            faults.append(f"{name}: {', '.join(differ)} differ from what freezing left")
    return faults


def made_float(model: nn.Module, record: FrozenRecord, format: Format) -> FrozenRecord:
    """The layers of whose codes a stock loader made floats; none with an activation type, which it would lose."""
    packed = {name for name, module in model.named_modules() if format.is_frozen(module)}
    layers = {name: layer for name, layer in record.layers.items() if layer.activations is None and name not in packed}
    return replace(record, layers=layers if format.own_modules else {})


def value_faults(model: nn.Module, record: FrozenRecord) -> list[str]:
    """Where a loader that makes floats of codes gave a layer another value than freezing left."""
    modules, places = dict(model.named_modules()), {name: (module, cls) for name, module, cls in float_layers(model)}
    weights: dict[str, Any] = {}
    for name in record.layers:
        module, cls = places.get(name, (modules.get(name), None))
        weights[name] = getattr(module, "weight", None) if cls is None else cls.effective_weight(module)
    names = [name for name, weight in weights.items() if isinstance(weight, Tensor)]
    faults = [f"{name} has no weight after loading" for name in record.layers if name not in names]
    digests = in_threads(partial(digest, weights[name].detach()) for name in names)
    pairs = zip(names, digests, strict=True)
    return faults + [
        f"{name}: its float weight differs from what freezing left"
        for name, found in pairs
        if found != record.layers[name].weight
    ]


def _evidence(module: nn.Module, format: Format) -> Callable[[], LayerEvidence]:
    layer, values = format.read(module), format.values(module)
    return lambda: layer.evidence(digest(values))


def tensor_faults(model: nn.Module, manifest: Manifest, record: FrozenRecord, format: Format) -> tuple[list[str], int]:
    """Compare everything but quantized weights with the digests of the export."""
    state, faults, count = ModelState(model, format, host_of(model).ties(model)), [], 0
    experts = [(cls, module) for name, module, cls in float_layers(model) if name in record.layers and not cls.called]
    masters = {id(parameter) for cls, module in experts for parameter in cls.masters(module).values()}
    quantized = {name for name, tensor in stored_tensors(model) if id(tensor) in masters}
    entries = {entry.name: entry for entry in state.entries if entry.name not in quantized}
    for name, kept in manifest.tensors.items():
        if _belongs_to_weight(name, record):
            continue
        count += 1
        source = name if name in entries else state.tied.get(name, name)
        if source not in entries:
            faults.append(f"{name} is in the files, but not in the reloaded model")
        elif DTYPE_NAMES.get(entries[source].dtype) != kept.dtype:
            faults.append(f"{name} is {entries[source].dtype} after loading, {kept.dtype} in the files")
        elif digest(state.fetch(source)) != kept.sha256:
            faults.append(f"{name} differs from what was exported")
    for name in entries:
        tied_to = None if _belongs_to_weight(name, record) else manifest.tied.get(name)
        if tied_to is not None and digest(state.fetch(name)) != manifest.tensors[tied_to].sha256:
            faults.append(f"{name} is tied to {tied_to}, but differs from it after loading")
        stock = manifest.float_grid and name.endswith((".input_scale", ".output_scale"))  # no file holds those
        if tied_to is None and not (stock or name in manifest.tensors or _belongs_to_weight(name, record)):
            faults.append(f"{name} is in the reloaded model, but not in the files")
    return faults, count


def _belongs_to_weight(name: str, record: FrozenRecord) -> bool:
    layer, dot, rest = name.rpartition(".weight")
    return bool(dot) and layer in record.layers and (not rest or rest[:1] in "._")


def reference_faults(
    loaded: nn.Module,
    held: nn.Module,
    reference: nn.Module,
    record: FrozenRecord,
    format: Format,
    codes_only: bool,
) -> Iterator[str]:
    """Compare the reloaded model with the live one, tensor by tensor, and say by how much they differ.

    ``held`` is the reloaded model with its codes: another one where its loader makes floats of them.
    """
    live, again = dict(reference.named_modules()), dict(held.named_modules())
    for name in record.layers:
        old, new = live.get(name), again.get(name)
        if old is None or new is None or not format.is_frozen(old) or not format.is_frozen(new):
            yield f"{name} is not a quantized layer in both models"
            continue
        first, second = format.read(old).weight, format.read(new).weight
        parts = {"codes": (first.codes, second.codes)}
        if not codes_only:
            parts["scale"] = (first.scale, second.scale)
            if first.shift is not None and second.shift is not None:
                parts["shift"] = (first.shift, second.shift)
            parts["weight"] = (format.values(old), format.values(new))
        for part, (expected, given) in parts.items():
            if (gap := difference(expected, given)) is not None:
                yield f"{name}, {part}: {gap}"
        if first.qtype != second.qtype:
            yield f"{name}, type: {second.qtype.name} instead of {first.qtype.name}"
    unstored = {name: tensor for _, _, name, tensor in unstored_tensors(loaded)}
    for _, _, name, tensor in unstored_tensors(reference):
        gap = difference(tensor, unstored[name]) if name in unstored else None
        if gap is not None and not codes_only:
            yield f"{name}, which no file holds: {gap}"
    kept, found = (ModelState(model, format, host_of(model).ties(model)) for model in (reference, held))
    names = {entry.name for entry in found.entries} | set(found.tied)
    for entry in kept.entries:
        activation_scale = entry.name.endswith(("input_scale", "output_scale"))
        if _belongs_to_weight(entry.name, record) or (codes_only and activation_scale):
            continue
        if entry.name not in names:
            yield f"{entry.name} is in the live model only"
            continue
        gap = difference(kept.fetch(entry.name), found.fetch(found.tied.get(entry.name, entry.name)))
        if gap is not None:
            yield f"{entry.name}: {gap}"
