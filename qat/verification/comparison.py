"""Where a reloaded model differs from the evidence that freezing left, from the files, or from the live model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import nn

from qat.evidence import FrozenRecord, digest, inner_tensors, layer_evidence, unpack_weight
from qat.exporting.examples import difference
from qat.exporting.layout import DTYPE_NAMES
from qat.exporting.manifest import Manifest
from qat.exporting.quanto import PackedState

__all__ = ["layer_faults", "meta_faults", "reference_faults", "tensor_faults"]


def meta_faults(model: nn.Module) -> list[str]:
    """Tensors without data; torch computes garbage with them on CPU and says nothing."""
    faults = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        inner = inner_tensors(tensor)
        if any(part.device.type == "meta" for part in inner):
            faults.append(f"{name} is on the meta device: it was never loaded")
    return faults


def layer_faults(model: nn.Module, record: FrozenRecord, codes_only: bool) -> list[str]:
    """Where a reloaded layer is not what freezing left, by digests: which part, not how much."""
    from optimum.quanto.nn import QModuleMixin

    modules, faults = dict(model.named_modules()), []
    extra = [name for name, m in modules.items() if isinstance(m, QModuleMixin) and name not in record.layers]
    faults += [f"{name} is quantized after loading, but freezing left it float" for name in extra]
    for name, kept in record.layers.items():
        module = modules.get(name)
        if not isinstance(module, QModuleMixin) or not module.frozen:
            faults.append(f"{name} is not a quantized layer after loading")
            continue
        found = layer_evidence(module)
        compared = ("weights", "shape", "group_size", "codes") if codes_only else [field.name for field in fields(kept)]
        differ = [part for part in compared if getattr(found, part) != getattr(kept, part)]
        if differ:
            faults.append(f"{name}: {', '.join(differ)} differ from what freezing left")
    return faults


def tensor_faults(model: nn.Module, manifest: Manifest, record: FrozenRecord) -> tuple[list[str], int]:
    """Compare everything but quantized weights with the digests of the export."""
    state, faults, count = PackedState(model), [], 0
    entries = {entry.name: entry for entry in state.entries}
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
        twin = manifest.tied.get(name)
        if twin is not None and digest(state.fetch(name)) != manifest.tensors[twin].sha256:
            faults.append(f"{name} is tied to {twin}, but differs from it after loading")
        stock = manifest.float_grid and name.endswith((".input_scale", ".output_scale"))  # no file holds those
        if twin is None and not (stock or name in manifest.tensors or _belongs_to_weight(name, record)):
            faults.append(f"{name} is in the reloaded model, but not in the files")
    return faults, count


def _belongs_to_weight(name: str, record: FrozenRecord) -> bool:
    layer, dot, rest = name.rpartition(".weight")
    return bool(dot) and layer in record.layers and (not rest or rest.startswith("._"))


def reference_faults(loaded: nn.Module, reference: nn.Module, record: FrozenRecord, codes_only: bool) -> Iterator[str]:
    """Compare the reloaded model with the live one, tensor by tensor, and say by how much they differ."""
    live, again = dict(reference.named_modules()), dict(loaded.named_modules())
    for name in record.layers:
        old: Any = live.get(name)
        new: Any = again.get(name)
        if not hasattr(old, "weight_qtype") or not hasattr(new, "weight_qtype"):
            yield f"{name} is not a quantized layer in both models"
            continue
        three = ("codes", "scale", "shift")
        parts = list(zip(three, unpack_weight(old.weight), unpack_weight(new.weight), strict=True))
        parts.append(("weight", old.weight.dequantize(), new.weight.dequantize()))
        for part, expected, given in parts[:1] if codes_only else parts:
            if expected is None or given is None:
                gap: object = None if expected is given else "exists in one model only"
            else:
                gap = difference(expected, given)
            if gap is not None:
                yield f"{name}, {part}: {gap}"
    first, second = PackedState(reference), PackedState(loaded)
    names = {entry.name for entry in second.entries} | set(second.tied)
    for entry in first.entries:
        activation_scale = entry.name.endswith(("input_scale", "output_scale"))
        if _belongs_to_weight(entry.name, record) or (codes_only and activation_scale):
            continue
        if entry.name not in names:
            yield f"{entry.name} is in the live model only"
            continue
        gap = difference(first.fetch(entry.name), second.fetch(second.tied.get(entry.name, entry.name)))
        if gap is not None:
            yield f"{entry.name}: {gap}"
