"""What is asked of an exported directory before a loader runs: it may be damaged, or come from anybody.

Stock loaders are lenient. They fill what no file holds with random numbers, build a model of any size from an empty
configuration, and follow any name. So nothing of a directory is handed to them before all of it fits together: the
manifest with itself and its target, the files with the manifest, the configuration with both, and the model that the
configuration builds, without memory for its weights, with the tensors.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qat.errors import LoadError, QatError, load_error
from qat.files.manifest import EVIDENCE_NAME, MANIFEST_NAME, FileRecord, Manifest, file_record, read_manifest
from qat.files.shards import DTYPES_BY_NAME
from qat.files.trusted import file_fault, read_json, strays
from qat.hosts import get_target
from qat.hosts.configurations import MOST_DEEP, depths
from qat.hosts.stock import library_and_class
from qat.hosts.targets import HOSTS
from qat.jobs import in_threads

__all__ = ["build_described", "check_configuration", "check_files", "check_settings", "read_trusted"]

SMALL = 64_000_000
"""Bytes of the largest file that is hashed at every load."""


def read_trusted(directory: Path) -> Manifest:
    """Read a manifest, and refuse one that contradicts itself or its target.

    Raises:
        LoadError: the directory or the manifest is missing, unreadable, changed or contradicts itself.
    """
    manifest, missing = read_manifest(directory), list[str]()
    try:
        missing = get_target(manifest.target).format.package_faults()
        faults = [] if missing else _contradictions(manifest)
    except (QatError, ZeroDivisionError, OverflowError) as error:
        faults = [str(error)]
    if missing:
        raise LoadError(f"{str(directory)!r}: {missing[0]}")
    if faults:
        raise load_error(f"{MANIFEST_NAME} in {str(directory)!r} contradicts itself", faults)
    return manifest


def _contradictions(manifest: Manifest) -> list[str]:
    target, record, files = get_target(manifest.target), manifest.frozen, manifest.files
    get_target(record.target)
    target.check_types(record.spec)
    faults = [f"frozen.spec: {fault}" for fault in target.spec_faults(record.spec)]
    if record.spec.dtype != manifest.dtype:
        faults.append(f"dtype is {manifest.dtype}, and that of frozen.spec {record.spec.dtype}")
    if manifest.weights_stem not in {host.weights_stem for host in HOSTS}:
        faults.append(f"weights_stem: no loader's files begin with {manifest.weights_stem!r}")
    if manifest.example is not None and EVIDENCE_NAME not in files:
        faults.append(f"it has an example, and no file {EVIDENCE_NAME}")
    for name, layer in record.layers.items():
        if min(*layer.shape, *layer.kernel, 1) < 1:
            faults.append(f"layer {name} has the shape {list(layer.shape)}")
        elif layer.activations not in (None, record.spec.activation_type):
            faults.append(
                f"layer {name} has activations of {layer.activations}, the spec {record.spec.activation_type}"
            )
        else:
            target.format.recorded(record, name)
    for name, tensor in manifest.tensors.items():
        if tensor.file not in files:
            faults.append(f"{name} lies in {tensor.file[:200]!r}, which is none of its files")
        if tensor.dtype not in DTYPES_BY_NAME:
            faults.append(f"{name} has the dtype {tensor.dtype[:200]!r}")
    known = manifest.tensors.keys() | {f"{name}.weight" for name in record.layers}
    return faults + [f"{name} is tied to {kept[:200]!r}" for name, kept in manifest.tied.items() if kept not in known]


def check_files(directory: Path, manifest: Manifest, *, hashes: bool) -> list[str]:
    """Compare the files with the manifest: names, kinds, sizes; the hashes of small files, and, if asked, of all."""

    def fault(name: str, kept: FileRecord) -> str | None:
        if (found := file_fault(directory, name)) is not None:
            return found
        path = directory / name
        if path.stat().st_size != kept.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {kept.bytes}"
        if (hashes or kept.bytes <= SMALL) and file_record(path).sha256 != kept.sha256:
            return f"{name} has another content (sha256) than was exported"
        return None

    found = in_threads(functools.partial(fault, *file) for file in manifest.files.items())
    return [*filter(None, found), *strays(directory, manifest.files, get_target(manifest.target).format.map_name)]


def check_configuration(directory: Path, manifest: Manifest) -> list[str]:
    """Compare what the small files beside the weights declare, and loaders trust, with the manifest.

    Raises:
        LoadError: when one of them is no JSON, or names further files.
    """
    target, record, faults = get_target(manifest.target), manifest.frozen, []
    index = f"{manifest.weights_stem}.safetensors.index.json"
    if index in manifest.files:
        parts = {name: tensor.stored_as or (name,) for name, tensor in manifest.tensors.items()}
        first = {parts[name][0]: tensor.file for name, tensor in manifest.tensors.items()}
        found = read_json(directory, index).get("weight_map")
        places = dict.fromkeys(itertools.chain(*parts.values())) | (found if isinstance(found, dict) else {}) | first
        if found != places or not {*places.values()} <= manifest.files.keys():
            faults.append(f"{index} places tensors in other files than {MANIFEST_NAME}")
    if target.format.map_name in manifest.files:
        read_json(directory, target.format.map_name)
        faults += target.format.map_faults(record, directory)
    if "config.json" not in manifest.files:
        return faults
    fields = read_json(directory, "config.json")
    classes = fields["architectures"] if "architectures" in fields else [fields.get("_class_name")]
    if classes != [manifest.model_class.rpartition(".")[2]]:
        faults.append(f"config.json describes a model of {classes}, {MANIFEST_NAME} a {manifest.model_class}")
    others = fields.get("configuration_files", [])
    if not isinstance(others, list) or not {*map(str, others)} <= manifest.files.keys():
        raise LoadError(
            f"config.json in {str(directory)!r}: configuration_files names what is not one of the exported files"
        )
    return faults + [f"config.json: {key} is {value}, too deep" for key, value in depths(fields) if value > MOST_DEEP]


def check_settings(model: nn.Module, directory: Path, manifest: Manifest) -> list[str]:
    """Whether ``config.json`` tells loaders what freezing left; ``model`` is a float one that it builds."""
    if "config.json" not in manifest.files:
        return []
    settings = None if manifest.float_grid else get_target(manifest.target).settings(model, manifest.frozen)
    wanted = json.loads(json.dumps(settings))
    if read_json(directory, "config.json").get("quantization_config") == wanted:
        return []
    return ["config.json: quantization_config is not what freezing left"]


def build_described(directory: Path, manifest: Manifest) -> nn.Module:
    """The model that ``config.json`` builds, all of it on the meta device, where its class can be built there.

    Raises:
        LoadError: nothing builds it, or it is larger than the files.
    """
    library, cls = library_and_class(directory, manifest)
    elements = [math.prod(tensor.shape) for tensor in manifest.tensors.values()]
    elements += [math.prod(layer.shape) for layer in manifest.frozen.layers.values()]
    # No attention is named: some classes take one for a part alone, and names and shapes do not depend on it.
    plain = manifest.model_copy(update={"attn_implementation": None, "experts_implementation": None})
    # More, for tied tensors (T5 builds its embeddings four times), and for parts that a class builds and replaces.
    most = 8 * sum(elements) + 1_000_000, 8 * len(elements) + 1000
    try:
        with _bounded(*most):
            try:
                with torch.device("meta"):
                    model = library.build_from(cls, directory, plain, empty=False)
            except LoadError:
                raise
            except Exception:  # classes that compute with numbers while they are built
                model = library.build_from(cls, directory, plain, empty=True)
    except LoadError:
        raise
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        text = f"{type(error).__name__}: {str(error)[:500]}"
        raise LoadError(f"config.json in {str(directory)!r} does not build a {cls.__name__}: {text}") from error
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > max(1 << 30, 2 * sum(file.bytes for file in manifest.files.values())):
        raise LoadError(f"config.json in {str(directory)!r} builds a {cls.__name__} with {size} bytes of buffers")
    return model


@contextmanager
def _bounded(elements: int, tensors: int) -> Iterator[None]:
    """Within the block, modules may be built with so many parameters, and numbers in them, in all."""
    left = [elements, tensors]

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        left[0] -= 0 if parameter is None else parameter.numel()
        left[1] -= 1
        if min(left) < 0:
            raise LoadError(
                f"config.json describes a model that is larger than its files: at {type(module).__name__}.{name} there "
                f"are more than {elements} numbers or {tensors} tensors"
            )

    handle: Any = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
