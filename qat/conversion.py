"""`convert`: an exported directory for another target, where every value of it stays the same number.

A value belongs to a grid: which elements share a scale, and where a loader rounds. So most exports cannot move. Those
can whose codes and scales give the same values in a type of the other format: int8 and float8 rows of optimum-quanto
and compressed-tensors, or int8 rows cut into blocks of Q8_0. Nothing is rounded again. The digests that freezing left
decide: those of the trained weights, which the converted ones must have, too.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import ExportError, LoadError, TargetError, listed
from qat.exporting import CONFIG_NAME, ExportReport, export, moved_tensors
from qat.files.directory import as_path, check_destination
from qat.files.evidence import FrozenRecord, LayerEvidence, record_frozen
from qat.files.examples import read_example
from qat.files.manifest import EVIDENCE_NAME, Manifest
from qat.files.places import check_place
from qat.formats import FORMATS
from qat.hosts import Target, get_target
from qat.inspection import InspectReport, inspect
from qat.layers import float_layers
from qat.loading import fill, module_names, require_exported, skeleton, tied_layers
from qat.numerics import FrozenWeight, QType
from qat.spec import LayerSpec, QuantSpec
from qat.tensors import digest
from qat.untrusted import read_trusted

__all__ = ["convert"]


def convert(
    directory: str | PathLike[str],
    output: str | PathLike[str],
    *,
    target: str,
    model: nn.Module | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Write what `qat.export` wrote once more, for another target, with equal values or not at all.

    Every file is hashed first. Tokenizers and the like are copied. The stored example runs again, through the new
    layers: products may round otherwise there, since the loader has kernels of its own.

    Args:
        directory: the exported directory; it is only read.
        output: where to; it must not exist, or be empty, unless ``overwrite``.
        target: who will load it.
        model: a float model of the exported architecture, where the directory has no ``config.json``; it is copied.
        max_shard_size: bytes a weight file, or a text such as ``"5GB"``.
        overwrite: replace an older export, which stays whole until the new one is.
        progress: show bars; lines now and then where the standard error stream is no terminal.

    Raises:
        LoadError: the directory is not what was exported, or holds floats (``float_grid=True``).
        TargetError: values, quantized layers or dtypes would be others; it names the layers, and what to do instead.
        ExportError: the new directory cannot be written; nothing is left behind then.

    >>> import tempfile, qat
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> architecture = copy.deepcopy(model)
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int4")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = qat.export(model, f"{folder}/a")
    ...     qat.convert(f"{folder}/a", f"{folder}/b", target="gguf", model=architecture)
    Traceback (most recent call last):
    ...
    qat.errors.TargetError: ...
    """
    path, to = as_path(directory, LoadError), get_target(target)
    destination = check_place(as_path(output, ExportError), "output")
    if destination.resolve() == path.resolve():
        raise ExportError(f"output: {str(output)!r} is the directory itself, which is read: name another one")
    check_destination(destination, overwrite, "output")
    manifest = read_trusted(path)
    if manifest.float_grid:
        raise LoadError(f"directory: {str(path)!r} holds floats (float_grid=True), no codes: convert a packed export")
    require_exported(path, manifest, model, hashes=True)
    origin = get_target(manifest.target)
    architecture = skeleton(path, manifest) if model is None else copy.deepcopy(model)
    if faults := to.format.package_faults() or to.host.model_faults(architecture):
        raise TargetError("; ".join(faults))
    filled = copy.deepcopy(architecture)
    fill(filled, path, manifest, torch.device("cpu"))
    record = manifest.frozen
    types = _types(filled, record, origin, to)
    plan = _plan(architecture, _converted_spec(record, types), record, types, to)
    if moved := moved_tensors(filled, origin, to, record.spec.torch_dtype):
        raise TargetError(
            f"target: {to.name!r} would hold {len(moved)} tensors of {str(path)!r} in another dtype or with other "
            f"numbers (first: {moved[0]!r}): freeze the trained model for it"
        )
    layers = dict(_replaced(filled, architecture, manifest, types, origin, to))
    notes = (*record.notes, f"converted from an export for target {origin.name!r}; every value is the same")
    record_frozen(filled, FrozenRecord(plan.spec, to.name, record.algorithm, layers, notes, plan.left_float))
    return export(
        filled.eval(),
        output,
        processor=_Copied(path, manifest),
        example_inputs=None if manifest.example is None else read_example(path, manifest.example)[0],
        config=manifest.config,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def _types(model: nn.Module, record: FrozenRecord, origin: Target, to: Target) -> dict[str, QType]:
    """For each type of weights, the one of the new format that gives equal values in all layers."""
    if to.format is origin.format:
        return {layer.weights: origin.format.qtypes[layer.weights] for layer in record.layers.values()}
    if (active := record.spec.activation_type) is not None:
        raise TargetError(
            f"target: layers with {active} activations round otherwise in {to.name!r} than in {origin.name!r}: "
            f"calibrate, or train, the float model with target={to.name!r}"
        )
    used: dict[str, list[str]] = {}
    for name, layer in record.layers.items():
        used.setdefault(layer.weights, []).append(name)
    found: dict[str, QType] = {}
    for weights, names in used.items():
        others = sorted({*to.format.qtypes.values()}, key=lambda other: (other.name != weights, other.name))
        least = names
        for other in others:
            changed = [name for name in names if not _same(model, record, origin, name, other)]
            if not changed:
                found[weights] = other
                break
            least = min(least, changed, key=len)
        else:
            raise TargetError(
                f"target: {to.name!r} has no type with the values of {weights} from {origin.name!r}: {len(least)} "
                f"of {len(names)} layers would change ({listed(least, 4)}): train the float model for its grid, with "
                f"target={to.name!r} and weights= one of {sorted(to.format.qtypes)}, or exclude these layers"
            )
    return found


def _same(model: nn.Module, record: FrozenRecord, origin: Target, name: str, qtype: QType) -> bool:
    """Whether a layer has the trained values in a type too."""
    weight = _in_type(origin.format.read(model.get_submodule(name)).weight, qtype)
    return weight is not None and digest(weight.dequantize()) == record.layers[name].weight


def _in_type(weight: FrozenWeight, qtype: QType) -> FrozenWeight | None:
    """The same codes, and the scales of the smaller groups of a type; None where it has no such codes or groups."""
    old, new = (one.group_size(weight.shape[1]) or weight.shape[1] for one in (weight.qtype, qtype))
    alike = (qtype.bits, qtype.storage, qtype.has_shift) == (
        weight.qtype.bits,
        weight.qtype.storage,
        weight.qtype.has_shift,
    )
    if not alike or old % new:
        return None
    if not qtype.floating and not qtype.code_min <= weight.codes.min() <= weight.codes.max() <= qtype.code_max:
        return None

    def spread(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, 1).repeat_interleave(old // new, 0).to(qtype.scale_dtype(weight.dtype))

    shift = None if weight.shift is None else spread(weight.shift)
    return FrozenWeight(weight.codes, spread(weight.scale), shift, qtype, weight.dtype)


def _converted_spec(record: FrozenRecord, types: Mapping[str, QType]) -> QuantSpec:
    """The spec in the names of the new types."""
    spec, any_type = record.spec, next(iter(types.values())).name

    def named(weights: str) -> str:
        return weights if weights == "float" else types[weights].name if weights in types else any_type

    overrides = {
        pattern: value.model_copy(update={"weights": named(value.weights)})
        if isinstance(value, LayerSpec)
        else named(value)
        for pattern, value in spec.overrides.items()
    }
    outputs = spec.quantize_outputs if spec.activation_type is not None else None
    return QuantSpec(
        **{**dict(spec), "weights": named(spec.weights), "overrides": overrides, "quantize_outputs": outputs}
    )


def _plan(
    model: nn.Module, spec: QuantSpec, record: FrozenRecord, types: Mapping[str, QType], to: Target
) -> InspectReport:
    """What the new target says of a float model: it must quantize exactly the layers that were frozen."""
    report = inspect(model, spec, target=to.name)
    more = [layer.name for layer in report.layers if layer.weights and layer.name not in record.layers]
    if more:
        floats: dict[str, Any] = {**spec.overrides, **dict.fromkeys(more, "float")}
        report = inspect(model, QuantSpec(**{**dict(spec), "overrides": floats}), target=to.name)
    reasons = {weight.name.removesuffix(".weight"): weight.reason for weight in report.others}
    found: dict[str, str] = {}
    for layer in report.layers:
        if layer.weights is None:
            reasons[layer.name] = layer.reason
        else:
            found[layer.name] = layer.weights
    wrong = [
        f"{name} ({reasons.get(name, 'its kind of layer has no such type')})"
        for name, layer in record.layers.items()
        if name not in found or to.format.qtypes[found[name]] is not types[layer.weights]
    ]
    if wrong or (more := [name for name in found if name not in record.layers]):
        raise TargetError(
            f"target: {to.name!r} cannot hold the layers that are quantized here: {listed(wrong or more, 4)}: train "
            f"the float model with target={to.name!r}, or exclude them"
        )
    return report


def _replaced(
    model: nn.Module,
    architecture: nn.Module,
    manifest: Manifest,
    types: Mapping[str, QType],
    origin: Target,
    to: Target,
) -> Iterator[tuple[str, LayerEvidence]]:
    """Put the layers of the new format in their places, and give their evidence."""
    aliases = module_names(model)
    places = {name: (module, cls) for name, module, cls in float_layers(architecture)}
    for name, kept in manifest.frozen.layers.items():
        module, (like, cls) = model.get_submodule(name), places[name]
        layer = origin.format.read(module)
        weight = _in_type(layer.weight, types[kept.weights])
        assert weight is not None
        layer = replace(layer, weight=weight, types=replace(layer.types, weights=weight.qtype))
        new = to.build(layer.types, kept.shape, to.format.pack(layer), like=like)
        cls.install(model, aliases[id(module)], new)
        yield name, to.format.read(new).evidence(digest(to.format.values(new)))
    for name, source in tied_layers(manifest).items():
        to.format.tie([model.get_submodule(source), model.get_submodule(name)])


class _Copied:
    """What a processor wrote into a directory: the files that an export does not write itself."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        written = {tensor.file for tensor in manifest.tensors.values()}
        written |= {"config.json", "generation_config.json", EVIDENCE_NAME, CONFIG_NAME}
        written |= {format.map_name for format in FORMATS.values()}
        self.directory = directory
        self.names = [name for name in manifest.files.keys() - written if not name.endswith(".index.json")]

    def save_pretrained(self, directory: str) -> None:
        """Copy them."""
        for name in self.names:
            copy_of = Path(directory) / name
            copy_of.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / name, copy_of)
