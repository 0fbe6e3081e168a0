"""The quanto layout: `config.json`, weights under quanto's keys, `quanto_qmap.json`.

`optimum.quanto.QuantizedModelForCausalLM.from_pretrained` and `optimum.quanto.requantize` read it. The other targets
write the same weight files and differ in `config.json` alone, so what they share is here: `PackedState`, which knows
every tensor of a frozen model without unpacking any, and the writers of the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.errors import ExportError
from qat.exporting.configuration import weights_stem, write_config, write_json
from qat.exporting.layout import (
    DTYPE_NAMES,
    TensorEntry,
    plan_shards,
    read_header,
    shard_names,
    write_shard,
)
from qat.exporting.manifest import QMAP_NAME, FileRecord, TensorRecord
from qat.qtypes import QTYPES

if TYPE_CHECKING:
    from qat.evidence import FrozenRecord

__all__ = ["Content", "Job", "PackedState", "qmap_faults", "stored_tensors", "write", "write_weights"]


@dataclass(frozen=True)
class Job:
    """What a target is asked to write, and where."""

    model: nn.Module
    record: FrozenRecord
    directory: Path
    """An empty temporary directory; the whole of it is renamed when everything is written."""
    max_shard_size: int
    float_grid: bool
    """Write on-grid float weights instead of packed ones."""


@dataclass(frozen=True)
class Content:
    """What a target wrote, for the manifest."""

    files: dict[str, FileRecord]
    """Files whose hash was taken while they were written; the others are hashed afterwards."""
    tensors: dict[str, TensorRecord]
    tied: dict[str, str]
    notes: tuple[str, ...] = ()
    stock_arguments: dict[str, Any] | None = None
    weights_stem: str = "model"


def write(job: Job) -> Content:
    """Write a frozen model in quanto's native layout. A model without a `config` gets no `config.json`.

    Raises:
        ExportError: when ``float_grid`` is asked for, or the model cannot be expressed.
    """
    if job.float_grid:
        raise ExportError(
            "float_grid=True writes weights for a stock load that quantizes; target 'quanto' has no such load: "
            "use target='transformers' or 'diffusers'"
        )
    state = PackedState(job.model)
    notes: tuple[str, ...] = ()
    if not write_config(job.model, job.directory, job.record.spec.torch_dtype):
        notes = ("no config.json: load with qat.load(directory, model=<the float model>) or quanto's requantize",)
    write_qmap(job.record, job.directory)
    stem = weights_stem(job.model)
    files, tensors = write_weights(state.entries, state.fetch, job.directory, job.max_shard_size, stem)
    return Content(files, tensors, state.tied, notes, weights_stem=stem)


class PackedState:
    """The tensors of a frozen model under quanto's keys, fetched one at a time.

    A layer whose tensor class belongs to a kernel (TinyGemm on CPU, AWQ and Marlin on CUDA) is brought back to the
    plain layout when it is fetched, and only one such layer is held at any moment.

    Attributes:
        entries: dtype and shape of every tensor that is written, in the model's order.
        tied: names that share another tensor and are not written, with the name that is.
    """

    def __init__(self, model: nn.Module, *, float_layers: Collection[str] = (), untie: bool = False) -> None:
        """Look at a frozen model.

        Args:
            model: the frozen model.
            float_layers: names of quantized layers that are written as float32 weights, without activation scales.
            untie: write a tensor for each module that holds it, for a loader that ties none again.

        Raises:
            ExportError: when a tensor has no data (meta device) or a class that has no place in this layout.
        """
        self._float_layers = frozenset(float_layers)
        self._sources: dict[str, Callable[[], torch.Tensor]] = {}
        self._held: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.tied: dict[str, str] = {}
        self.entries: tuple[TensorEntry, ...] = tuple(self._walk(model, untie))

    def fetch(self, name: str) -> torch.Tensor:
        """The tensor of a name, as it is to be written."""
        return self._sources[name]()

    def _walk(self, model: nn.Module, untie: bool) -> Iterator[TensorEntry]:
        from optimum.quanto.nn import QModuleMixin

        declared = _declared_ties(model)
        kept = _kept_names(model, declared)
        first: dict[int, str] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            quantized = isinstance(module, QModuleMixin) and module.frozen
            for key, tensor in _own_tensors(module):
                name = f"{prefix}.{key}" if prefix else key
                source = f"{first.setdefault(id(module), prefix)}.{key}" if untie and prefix else kept[id(tensor)]
                if name != source and (declared is None or name in declared):
                    self.tied[name] = source
                elif quantized and key == "weight":
                    yield from self._layer(prefix, module, name)
                elif not (prefix in self._float_layers and key in ("input_scale", "output_scale")):
                    yield self._plain(name, tensor)

    def _plain(self, name: str, tensor: torch.Tensor) -> TensorEntry:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or type(tensor.data) is not torch.Tensor:
            raise ExportError(
                f"tensor {name!r} is a {type(tensor.data).__name__}, which safetensors cannot hold; "
                f"gather or convert it to a plain tensor before qat.export"
            )
        _check_data(name, tensor)
        self._sources[name] = tensor.detach
        return TensorEntry(name, tensor.dtype, tuple(tensor.shape))

    def _layer(self, prefix: str, module: Any, name: str) -> Iterator[TensorEntry]:
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

        weight = module.weight
        if prefix in self._float_layers:
            self._sources[name] = lambda: weight.dequantize().float()
            yield TensorEntry(name, torch.float32, tuple(weight.shape))
            return
        if not isinstance(weight, WeightQBitsTensor | WeightQBytesTensor):
            raise ExportError(
                f"layer {prefix!r} holds a {type(weight.data).__name__}, which quanto's layout has no keys for; "
                f"freeze the model with qat.freeze"
            )
        for key, dtype, shape in _stored_shapes(weight):
            full = f"{name}.{key}"
            self._sources[full] = lambda full=full: self._converted(name, weight)[full]  # type: ignore[misc]
            yield TensorEntry(full, dtype, shape)

    def _converted(self, name: str, weight: Any) -> dict[str, torch.Tensor]:
        if self._held[0] != name:
            state: dict[str, torch.Tensor] = {}
            weight.save_to_state_dict(state, f"{name}.", False)
            for key, tensor in state.items():
                _check_data(key, tensor)
            self._held = (name, state)
        return self._held[1]


def _stored_shapes(weight: Any) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Keys, dtypes and shapes of a quantized weight as it is stored, computed without unpacking it.

    Kernel-specific classes keep codes and scales in an order of their own, and store them in the plain one.
    """
    from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor

    out_features, in_features = weight.shape
    plain = type(weight.data) in (WeightQBitsTensor, WeightQBytesTensor)
    if isinstance(weight, WeightQBitsTensor):
        width = weight._group_size or in_features
        rows = out_features * in_features // width
        yield "_data._data", torch.uint8, (-(-rows // (8 // weight.qtype.bits)), width)
        keys: tuple[str, ...] = ("_scale", "_shift")
    else:
        rows = out_features
        yield "_data", weight.qtype.dtype, (out_features, in_features)
        keys = ("_scale",)
    for key in keys:
        inner = getattr(weight, key) if plain else None
        yield key, weight.dtype if inner is None else inner.dtype, (rows, 1) if inner is None else tuple(inner.shape)


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer under every name it has, quantized weights as one tensor."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in _own_tensors(module):
            yield (f"{prefix}.{key}" if prefix else key), tensor


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _check_data(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ExportError(f"tensor {name!r} is on the meta device and has no data: load or initialise the model first")


def _declared_ties(model: nn.Module) -> Mapping[str, str] | None:
    """The names that a transformers model ties again on load, or none for other modules."""
    ties = getattr(model, "all_tied_weights_keys", None)
    return ties if isinstance(ties, Mapping) else None


def _kept_names(model: nn.Module, declared: Mapping[str, str] | None) -> dict[int, str]:
    """For each tensor the one name it is written under: where there are several, one that no loader restores.

    A transformers model ties again what it declares, and nothing else; any other module is filled in place, where
    names share their tensor already.
    """
    names: dict[int, str] = {}
    for name, tensor in stored_tensors(model):
        if names.setdefault(id(tensor), name) in (declared or ()) and name not in (declared or ()):
            names[id(tensor)] = name
    return names


def write_qmap(record: FrozenRecord, directory: Path) -> None:
    """Write ``quanto_qmap.json`` from the evidence that freezing left."""
    write_json(directory / QMAP_NAME, _qmap(record))


def qmap_faults(record: FrozenRecord, directory: Path) -> list[str]:
    """Compare ``quanto_qmap.json``, which quanto's loader trusts, with the evidence that freezing left."""
    wanted = _qmap(record)
    try:
        found = json.loads((directory / QMAP_NAME).read_text(encoding="utf-8"))
        names = sorted(wanted.keys() | found.keys())
    except (OSError, ValueError, AttributeError) as error:
        return [f"{QMAP_NAME} cannot be read: {error}"]
    return [
        f"{QMAP_NAME} declares {name} as {found.get(name)}, freezing left {wanted.get(name)}"
        for name in names
        if wanted.get(name) != found.get(name)
    ]


def _qmap(record: FrozenRecord) -> dict[str, dict[str, str]]:
    return {
        name: {
            "weights": QTYPES[layer.weights].quanto_name,
            "activations": "none" if layer.activations is None else QTYPES[layer.activations].quanto_name,
        }
        for name, layer in record.layers.items()
    }


def write_weights(
    entries: Sequence[TensorEntry],
    fetch: Callable[[str], torch.Tensor],
    directory: Path,
    max_shard_size: int,
    stem: str = "model",
) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
    """Write the weight files (and the index, when there are several), and check each by opening it again.

    Raises:
        ExportError: when a file does not open, or a code tensor is not aligned in it.
    """
    shards = plan_shards(entries, max_shard_size)
    names = shard_names(len(shards), stem)
    files: dict[str, FileRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    for name, shard in zip(names, shards, strict=True):
        written = write_shard(directory / name, shard, fetch)
        files[name] = FileRecord(bytes=written.bytes, sha256=written.sha256)
        for entry in shard.entries:
            tensors[entry.name] = TensorRecord(
                file=name, dtype=DTYPE_NAMES[entry.dtype], shape=entry.shape, sha256=written.tensors[entry.name]
            )
        _reopen(directory / name, {entry.name for entry in shard.entries})
    if len(shards) > 1:
        weight_map = {entry.name: tensors[entry.name].file for entry in sorted(entries, key=lambda e: e.name)}
        total = sum(shard.nbytes for shard in shards)
        write_json(
            directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return files, {entry.name: tensors[entry.name] for entry in entries}


def _reopen(path: Path, expected: set[str]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
        entries, starts = read_header(path)
    except (SafetensorError, ValueError) as error:
        raise ExportError(f"{path.name} was written but does not open again: {error}; check the disk") from error
    crooked = [name for name, entry in entries.items() if entry.is_code and starts[name] % 64]
    if found != expected or crooked:
        raise ExportError(f"{path.name} was written but holds other keys, or unaligned codes {crooked}; check the disk")
