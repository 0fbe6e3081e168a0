"""`export`: write a frozen model so that the target's loader rebuilds exactly the same numbers.

One file a target (`quanto`, `transformers`, `diffusers`), one line each in `EXPORTERS`. The quanto layout is shared:
which tensors there are and under which keys is in `quanto`, where each lies in a file in `layout`, config.json in
`configuration`, the all-or-nothing directory in `directory`, what the export says about itself in `manifest` for
programs and in `card` for people, the example and its frozen outputs in `examples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.construction import constructed_tensors, differs, unstored_tensors
from qat.errors import ExportError, TargetError
from qat.evidence import frozen_record, layer_evidence, model_device
from qat.exporting import diffusers, quanto, transformers
from qat.exporting.card import write_card
from qat.exporting.directory import atomic_directory, check_destination
from qat.exporting.examples import compute_outputs, flatten_inputs
from qat.exporting.layout import TensorEntry, parse_size, plan_shards, write_shard
from qat.exporting.manifest import (
    EVIDENCE_NAME,
    Environment,
    ExampleRecord,
    FileRecord,
    Manifest,
    file_record,
)
from qat.exporting.quanto import Content, Job, stored_tensors
from qat.packing import as_held
from qat.targets import get_target

if TYPE_CHECKING:
    from qat.evidence import FrozenRecord

__all__ = ["EXPORTERS", "ExportReport", "export"]

EXPORTERS: dict[str, Callable[[Job], Content]] = {
    "diffusers": diffusers.write,
    "quanto": quanto.write,
    "transformers": transformers.write,
}
CONFIG_NAME = "qat_config.yaml"


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote; prints as a table."""

    directory: Path
    target: str
    files: Mapping[str, FileRecord]
    """Every file with its size and hash, the manifest and the model card included."""
    notes: tuple[str, ...] = ()
    """What a reader of the directory should know."""

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        files = {name: record.model_dump() for name, record in self.files.items()}
        return {
            "directory": str(self.directory),
            "target": self.target,
            "files": files,
            "total_bytes": self.total_bytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        width = max(len(name) for name in self.files)
        lines = [f"exported to {self.directory} for target {self.target!r}"]
        lines += [f"  {name:{width}}  {record.bytes:>14,}  {record.sha256[:16]}" for name, record in self.files.items()]
        lines.append(f"  {'total':{width}}  {self.total_bytes:>14,} bytes")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def export(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    target: str | None = None,
    processor: Any = None,
    example_inputs: Any = None,
    config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    float_grid: bool = False,
) -> ExportReport:
    """Write a frozen model into a directory, all or nothing.

    A model that was moved between devices since it was frozen gets the tensor classes of its loader again, in place.

    Args:
        model: a model that `qat.freeze` froze.
        directory: where to; it must not exist, or be empty, unless ``overwrite``.
        target: who will load it; default the one it was frozen for.
        processor: a tokenizer, feature extractor or the like, or several: anything with ``save_pretrained``.
        example_inputs: keyword arguments (mapping) or positional ones (tuple); they are run through the frozen model
            now, and the outputs are stored as evidence for `qat.verify`.
        config: the resolved configuration of the recipe, plain data; kept in the manifest and as ``qat_config.yaml``.
        max_shard_size: bytes a weight file, or a text such as ``"5GB"``. Alignment may cut files below it.
        overwrite: replace a directory that is not empty; the old one stays whole until the new one is.
        float_grid: targets transformers and diffusers only: on-grid float32 weights, which a stock ``QuantoConfig``
            load quantizes back into the same codes.

    Raises:
        StateError: when the model was never frozen.
        TargetError: when the target cannot load such a model, or would serve other numbers than the one it was frozen
            for.
        ExportError: when anything cannot be written; nothing is left behind then.

    >>> import tempfile, qat
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int4")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = qat.export(model, folder, example_inputs=torch.randn(2, 256, dtype=torch.bfloat16))
    >>> sorted(report.files)
    ['README.md', 'model.safetensors', 'qat_evidence.safetensors', 'qat_manifest.json', 'quanto_qmap.json']
    """
    record = frozen_record(model)
    name = record.target if target is None else target
    if name not in EXPORTERS:
        get_target(name)
        raise TargetError(f"target: must be one of {sorted(EXPORTERS)}, which export can write; got {name!r}")
    destination = Path(directory).absolute()
    check_destination(destination, overwrite)
    limit = parse_size(max_shard_size)
    _check_target(model, record, name)
    _restore_classes(model, record)
    _check_unchanged(model, record)
    with torch.no_grad(), atomic_directory(destination, overwrite) as temporary:
        content = EXPORTERS[name](Job(model, record, temporary, limit, float_grid))
        _save_processors(processor, temporary)
        if config is not None:
            _write_config(config, temporary)
        example = None if example_inputs is None else _write_example(model, example_inputs, temporary)
        files = {
            path.relative_to(temporary).as_posix(): content.files.get(path.name) or file_record(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            target=name,
            dtype=record.spec.dtype,
            model_class=f"{type(model).__module__}.{type(model).__qualname__}",
            attn_implementation=getattr(getattr(model, "config", None), "_attn_implementation", None),
            float_grid=float_grid,
            stock_arguments=content.stock_arguments,
            weights_stem=content.weights_stem,
            frozen=record.to_json(),
            environment=Environment.current(model_device(model).type),
            tensors=content.tensors,
            tied=content.tied,
            files=files,
            example=example,
            config=None if config is None else dict(config),
            notes=(*record.notes, *content.notes),
        )
        for path in (manifest.write(temporary), write_card(temporary, manifest, record)):
            files = files | {path.name: file_record(path)}
    return ExportReport(destination, name, files, manifest.notes)


def _check_target(model: nn.Module, record: FrozenRecord, name: str) -> None:
    """Raise when the target's loader would hold something else than what the model was frozen with."""
    wanted, frozen = get_target(name), get_target(record.target)
    faults = wanted.model_faults(model)
    if faults:
        raise TargetError("; ".join(faults))
    if name == record.target:
        return
    remedy = f"call qat.freeze(model, target={name!r}) instead and export that model"
    faults = wanted.spec_faults(record.spec)
    if faults:
        raise TargetError(f"target {name!r} cannot express what was trained: {'; '.join(faults)}")
    moved = [
        key
        for key, tensor in stored_tensors(model)
        if tensor.is_floating_point()
        and wanted.tensor_dtype(model, key, record.spec) != frozen.tensor_dtype(model, key, record.spec)
    ]
    made = constructed_tensors(model, wanted, record.spec.torch_dtype)
    moved += [
        found.name
        for found in unstored_tensors(model)
        if found.name in made and differs(found.tensor, made[found.name])
    ]
    moved += [
        f"{key}.weight"
        for key, layer in _packed_layers(model, record)
        if type(as_held(layer.weight.data, wanted)) is not type(layer.weight.data)
    ]
    if moved:
        raise TargetError(
            f"target {name!r} would hold {len(moved)} tensors in another dtype or class, or computed in another dtype, "
            f"than target {record.target!r}, which the model was frozen for (first: {moved[0]!r}), so that outputs "
            f"would differ: {remedy}"
        )


def _restore_classes(model: nn.Module, record: FrozenRecord) -> None:
    """Give the layers of a model that was moved between devices the tensor class of their loader again, in place."""
    target = get_target(record.target)
    if target.plain_on_cpu:  # every other loader holds what a move makes
        for _, layer in _packed_layers(model, record):
            held = as_held(layer.weight.data, target)
            if type(held) is not type(layer.weight.data):
                layer.weight = nn.Parameter(held, requires_grad=False)


def _packed_layers(model: nn.Module, record: FrozenRecord) -> Iterator[tuple[str, Any]]:
    modules = dict(model.named_modules())
    return ((name, modules[name]) for name in record.layers if hasattr(modules.get(name), "weight_qtype"))


def _check_unchanged(model: nn.Module, record: FrozenRecord) -> None:
    """Raise when a frozen layer is no longer what freezing left."""
    layers = dict(model.named_modules())
    gone = [name for name in record.layers if name not in layers]
    changed = [
        name
        for name, kept in record.layers.items()
        if name in layers and not (hasattr(layers[name], "weight_qtype") and layer_evidence(layers[name]) == kept)
    ]
    if gone or changed:
        raise ExportError(
            f"the model changed after qat.freeze: {len(gone)} layers are gone and {len(changed)} hold other numbers "
            f"(first: {(gone + changed)[0]!r}); export the model as freezing left it, without casting or editing it"
        )


def _save_processors(processor: Any, directory: Path) -> None:
    if processor is None:
        return
    for one in processor if isinstance(processor, list | tuple) else (processor,):
        save: Callable[[str], Any] | None = getattr(one, "save_pretrained", None)
        if save is None:
            raise ExportError(
                f"processor must have save_pretrained (a tokenizer, feature extractor or processor), or be a sequence "
                f"of such; got {type(one).__name__}"
            )
        save(str(directory))


def _write_config(config: Mapping[str, Any], directory: Path) -> None:
    import yaml

    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")


def _write_example(model: nn.Module, example_inputs: Any, directory: Path) -> ExampleRecord:
    structure, tensors = flatten_inputs(example_inputs)
    try:
        outputs = compute_outputs(model, example_inputs)
    except RuntimeError as error:
        raise ExportError(
            f"example_inputs: the frozen model cannot run them: {error}: if a stock kernel refuses a layer's input, "
            "pass example_inputs to qat.prepare too, which then leaves such layers float, or exclude the layer"
        ) from error
    if not outputs:
        raise ExportError("example_inputs: the model returns no tensor for them, so there is no evidence to keep")
    tensors |= {f"output.{name}": tensor for name, tensor in outputs.items()}
    entries = (TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    (shard,) = plan_shards(entries, max_shard_size=1 << 62)
    write_shard(directory / EVIDENCE_NAME, shard, tensors.__getitem__)
    return ExampleRecord(inputs=structure, outputs=tuple(outputs))
