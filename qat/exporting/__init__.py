"""`export`: write a frozen model so that the target's loader rebuilds exactly the same numbers.

A short story over format, host and files: the format says under which keys a layer is stored, the host writes
``config.json``, and the files are planned, written, hashed and declared in a manifest. `card` writes what people read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from qat.adapters import without_peft
from qat.compatibility import outside_tested
from qat.distributed import on_first_rank
from qat.errors import ExportError, TargetError, listed
from qat.exporting.card import write_card
from qat.files.directory import as_path, atomic_directory, check_destination
from qat.files.evidence import FrozenRecord, LayerEvidence, frozen_record
from qat.files.examples import flatten_inputs
from qat.files.manifest import (
    EVIDENCE_NAME,
    Environment,
    ExampleRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    file_record,
)
from qat.files.shards import TensorEntry, parse_size, plan_shards, write_shard
from qat.formats.state import ModelState
from qat.hosts import MODULE, Target, get_target, host_of
from qat.hosts.base import FloatGrid, shown_call
from qat.hosts.construction import constructed_tensors, differs, unstored_tensors
from qat.jobs import in_threads
from qat.progress import counted
from qat.tensors import await_numbers, inner_tensors, model_device, stored_tensors
from qat.verification.outputs import compute_outputs

__all__ = ["CONFIG_NAME", "ExportReport", "export", "moved_tensors"]

CONFIG_NAME = "qat_config.yaml"
"""The resolved configuration of a recipe, beside the weights."""
_ONE_FILE = 1 << 62
_CHANGED = "the model changed after qat.freeze"
_REMEDY = "; export the model as freezing left it, without casting or editing it"


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
    progress: bool = False,
) -> ExportReport:
    """Write a frozen model into a directory, all or nothing.

    A model that was moved between devices since it was frozen gets the tensor classes of its loader again, in place. Of
    a model that was frozen from shards, rank 0 writes the files, and other ranks that call this wait for them.

    Args:
        model: a model that `qat.freeze` froze.
        directory: where to; it must not exist, or be empty, unless ``overwrite``.
        target: who will load it; default the one it was frozen for.
        processor: a tokenizer, feature extractor or the like, or several: anything with ``save_pretrained``.
        example_inputs: keyword arguments (mapping) or positional ones (tuple); they are run through the frozen model
            now, and the outputs are stored as evidence for `qat.verify`.
        config: the resolved configuration of the recipe, plain data; kept in the manifest and as ``qat_config.yaml``.
        max_shard_size: bytes a weight file, or a text such as ``"5GB"``. Alignment may cut files below it.
        overwrite: replace an older export, which stays whole until the new one is. A directory that holds other files
            is refused, unless the old model card shows them as its pictures.
        float_grid: targets transformers and diffusers only: on-grid float32 weights, which a stock ``QuantoConfig``
            load quantizes back into the same codes.
        progress: show bars; lines now and then where the standard error stream is no terminal.

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
    model = without_peft(model)
    record = frozen_record(model)
    to = get_target(target or record.target)
    destination = as_path(directory, ExportError).absolute()
    limit = parse_size(max_shard_size)
    written = (destination, overwrite, limit, processor, example_inputs, config, float_grid, progress)
    return on_first_rank(model, lambda: _export(model, record, to, *written))


def _export(
    model: nn.Module,
    record: FrozenRecord,
    to: Target,
    destination: Path,
    overwrite: bool,
    limit: int,
    processor: Any,
    example_inputs: Any,
    config: Mapping[str, Any] | None,
    float_grid: bool,
    progress: bool,
) -> ExportReport:
    check_destination(destination, overwrite)
    _check_target(model, record, to)
    _check_there(model, record)
    parts = {part.data_ptr(): part.nbytes for _, tensor in stored_tensors(model) for part in inner_tensors(tensor)}
    with torch.no_grad(), atomic_directory(destination, overwrite, sum(parts.values())) as temporary:
        grid = to.host.float_grid(model, record, to.format) if float_grid else None
        state, notes = _configured(model, record, to, temporary, grid)
        if grid is not None and grid.one_file:
            limit = _ONE_FILE
        stem = host_of(model).weights_stem
        _save_processors(processor, temporary)
        given = (model, state.entries, state.fetch, temporary, limit, stem, progress)
        hashed, tensors = to.host.container.write(*given)
        _check_unchanged(model, record, tensors, progress)
        if config is not None:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
        example = None if example_inputs is None else _write_example(model, example_inputs, temporary)
        files = {
            path.relative_to(temporary).as_posix(): hashed.get(path.name) or file_record(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            target=to.name,
            dtype=record.spec.dtype,
            model_class=f"{type(model).__module__}.{type(model).__qualname__}",
            attn_implementation=host_of(model).attention(model),
            experts_implementation=host_of(model).experts(model),
            float_grid=float_grid,
            stock_arguments=None if grid is None else grid.arguments,
            weights_stem=stem,
            frozen=record,
            environment=Environment.current(model_device(model).type),
            tensors=tensors,
            tied=state.tied,
            files=files,
            example=example,
            config=None if config is None else dict(config),
            notes=(
                *(*record.notes, *notes, *host_of(model).export_notes(model), *to.host.container.notes(temporary)),
                *outside_tested(),
            ),
        )
        for path in (manifest.write(temporary), write_card(temporary, manifest, model)):
            files = files | {path.name: file_record(path)}
    return ExportReport(destination, to.name, files, manifest.notes)


def _configured(
    model: nn.Module, record: FrozenRecord, target: Target, directory: Path, grid: FloatGrid | None
) -> tuple[ModelState, tuple[str, ...]]:
    """Write the configuration; return the tensors to write, and notes for readers. ``grid`` is for float weights."""
    library, host = host_of(model), target.host
    ties = library.ties(model)
    # A library that ties nothing again fills each module from its own key; a plain module is filled in place.
    untie = ties is None and host is not MODULE
    if grid is not None:
        state = ModelState(model, target.format, ties, float_layers=record.layers, untie=untie)
        library.write_config(model, directory, torch.float32, None)
        config = shown_call(target.format.libraries[host.name].config_class, grid.arguments)
        given = f"directory, {grid.dtype}quantization_config={config}"
        return state, (f"on-grid float32 weights: load with from_pretrained({given})",)
    state, settings = ModelState(model, target.format, ties, untie=untie), target.settings(model, record)
    notes: tuple[str, ...] = ()
    if not library.write_config(model, directory, record.spec.torch_dtype, settings):
        notes = ("no config.json: load with qat.load(directory, model=<the float model>) or quanto's requantize",)
    if host.writes_map() and not _strange(model, record, target.format.name):
        target.format.write_map(record, directory)  # without which the format's own loader refuses the directory
    return state, notes


def _check_target(model: nn.Module, record: FrozenRecord, wanted: Target) -> None:
    """Raise when the target's loader would hold something else than what the model was frozen with."""
    frozen = get_target(record.target)
    faults = wanted.host.model_faults(model)
    if faults:
        raise TargetError("; ".join(faults))
    frozen.settle(model)
    if wanted.name == record.target:
        return
    remedy = (
        f"export for {record.target!r} and try qat.convert(directory, output, target={wanted.name!r}), or prepare and "
        f"train the float model with target={wanted.name!r}"
    )
    faults = wanted.spec_faults(record.spec)
    if faults:
        raise TargetError(f"target {wanted.name!r} cannot express what was trained: {'; '.join(faults)}")
    if strange := _strange(model, record, wanted.name):
        raise TargetError(
            f"target {wanted.name!r}: its loader cannot hold {len(strange)} of the quantized layers "
            f"({listed(strange, 3)}): export for target {record.target!r}, or prepare for this one"
        )
    moved = moved_tensors(model, frozen, wanted, record.spec.torch_dtype)
    moved += [
        f"{name}.weight"
        for name, module in model.named_modules()
        if name in record.layers and not (wanted.format is frozen.format and wanted.is_settled(module))
    ]
    if moved:
        raise TargetError(
            f"target {wanted.name!r} would hold {len(moved)} tensors in another dtype or class, or computed in another "
            f"dtype, than target {record.target!r}, which the model was frozen for (first: {moved[0]!r}), so that "
            f"outputs would differ: {remedy}"
        )


def moved_tensors(model: nn.Module, old: Target, new: Target, dtype: torch.dtype) -> list[str]:
    """The tensors outside frozen layers that the loader of ``new`` would hold in another dtype, or make otherwise."""
    before, after = old.rules(model, dtype), new.rules(model, dtype)
    floats = (key for key, tensor in stored_tensors(model) if tensor.is_floating_point())
    moved = [key for key in floats if after.tensor_dtype(key) != before.tensor_dtype(key)]
    made = constructed_tensors(model, new, dtype)
    others = (found for found in unstored_tensors(model) if found.name in made)
    return moved + [found.name for found in others if differs(found.tensor, made[found.name])]


def _strange(model: nn.Module, record: FrozenRecord, name: str) -> list[str]:
    """The frozen layers that the loader of the target called ``name`` cannot hold."""
    layers = {layer: model.get_submodule(layer) for layer in record.layers}
    return [layer for layer, module in layers.items() if name not in (getattr(module, "targets", ()) or (name,))]


def _check_there(model: nn.Module, record: FrozenRecord) -> None:
    """Raise when a layer that was frozen is gone, or no frozen one any more."""
    format, layers = get_target(record.target).format, dict(model.named_modules())
    if gone := [name for name in record.layers if name not in layers or not format.is_frozen(layers[name])]:
        raise ExportError(f"{_CHANGED}: {len(gone)} layers are gone (first: {gone[0]!r}){_REMEDY}")


def _check_unchanged(
    model: nn.Module, record: FrozenRecord, written: Mapping[str, TensorRecord], progress: bool
) -> None:
    """Raise when a frozen layer is no longer what freezing left; then the files are discarded.

    Codes, scale, shift and bias are what is written. Codes of 8 bits lie in the files as they are, so the hash of their
    one write is enough; packed ones are hashed again. The value that they dequantize to follows from them: freezing
    compared it with the trained one, and verification hashes it again after a load.
    """
    format, layers = get_target(record.target).format, dict(model.named_modules())

    def evidence(name: str) -> Callable[[], LayerEvidence]:
        layer, frozen = format.read(layers[name]), record.layers[name]
        await_numbers(layer.weight.codes)
        keys = (f"{name}.{key}" for key in format.slots(layer.types, frozen.shape, bias=False))
        stored = any(key in written and written[key].sha256 == frozen.codes for key in keys)
        return lambda: layer.evidence(frozen.weight, frozen.codes if stored else None)

    found = counted(in_threads(map(evidence, record.layers)), "comparing", progress, len(record.layers))
    pairs = zip(record.layers, found, strict=True)
    if changed := [name for name, layer in pairs if record.layers[name].differences(layer)]:
        raise ExportError(f"{_CHANGED}: {len(changed)} layers hold other numbers (first: {changed[0]!r}){_REMEDY}")


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
    (shard,) = plan_shards(entries, max_shard_size=_ONE_FILE)
    write_shard(directory / EVIDENCE_NAME, shard, tensors.__getitem__)
    return ExampleRecord(inputs=structure, outputs=tuple(outputs))
