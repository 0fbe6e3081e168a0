"""`load`: an exported directory becomes a model ready for inference, whatever the target.

For the quanto layout this is a loader of our own. It builds the model without memory for its parameters (buffers that
are not stored, such as rotary tables, are real and as constructed under the serving dtype), puts frozen quanto layers
where the evidence says, and assigns the tensors of the memory-mapped files without a copy. Unlike quanto's own it is
strict: a missing or unexpected key, a code tensor of another dtype or packed shape, a tensor in another dtype than
the model's are errors, found in the files' headers before anything is read. Directories for transformers go through
`from_pretrained` with the plug-in, those for diffusers through the stock one.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.construction import build
from qat.errors import LoadError
from qat.evidence import FrozenRecord, LayerEvidence, inner_tensors, record_frozen
from qat.exporting.layout import DTYPE_NAMES, TensorEntry, read_header
from qat.exporting.manifest import Manifest, file_record, read_manifest
from qat.exporting.quanto import stored_tensors
from qat.integrations.packed import LayerShape, PackedModule, TensorHeader, layer_faults, one_error, packed_weight
from qat.loading.stock import load_pretrained, model_class, read_config
from qat.qtypes import QTYPES
from qat.targets.diffusers import is_diffusers_model

__all__ = ["check_files", "check_headers", "frozen_record_of", "load", "read_headers"]


def load(
    directory: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    verify_hashes: bool = False,
) -> nn.Module:
    """Load what `qat.export` wrote.

    Args:
        directory: the exported directory.
        model: a float model of the exported architecture, to be filled in place; needed where the directory has no
            ``config.json``, or its class is not one of transformers or diffusers.
        device: where the model goes.
        verify_hashes: compare every file's hash with the manifest first.

    Returns:
        The model in evaluation mode; no parameter requires a gradient.

    Raises:
        LoadError: when the directory is missing, corrupt or does not hold what it declares; or holds a float grid,
            which cannot fill a given model.

    >>> import copy, tempfile, qat
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> architecture, inputs = copy.deepcopy(model), torch.randn(2, 256)
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int4", dtype="float32")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = qat.export(model, folder)
    ...     loaded = qat.load(folder, model=architecture)
    ...     torch.equal(loaded(inputs), model(inputs))
    True
    """
    path = Path(directory)
    manifest = read_manifest(path)
    if model is not None and manifest.float_grid:
        raise LoadError(
            f"model: {str(path)!r} holds float weights (float_grid=True), which only the stock loader quantizes again, "
            "into a model of its own: leave model out, or export packed weights"
        )
    faults = check_files(path, manifest, hashes=verify_hashes)
    if faults:
        raise one_error(f"{str(path)!r} is not what was exported", faults)
    headers = read_headers(path, manifest)
    faults = check_headers(manifest, headers)
    if faults:
        raise one_error(f"the weight files in {str(path)!r} do not hold what the manifest declares", faults)
    record = frozen_record_of(manifest)
    if model is None and manifest.target != "quanto":
        loaded = load_pretrained(path, manifest, device)
        _leave_meta(loaded)
    else:
        loaded = model if model is not None else _skeleton(path, manifest)
        _fill(loaded, path, manifest, record, torch.device(device))
    loaded.requires_grad_(False)
    record_frozen(loaded, record)
    return loaded.eval()


def frozen_record_of(manifest: Manifest) -> FrozenRecord:
    """The evidence in a manifest.

    Raises:
        LoadError: when it is malformed.
    """
    try:
        return FrozenRecord.from_json(manifest.frozen)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"the manifest's evidence is malformed ({error}); export the directory again") from error


def check_files(directory: Path, manifest: Manifest, *, hashes: bool) -> list[str]:
    """Compare the files with the manifest: present, of the right size and, if asked, of the right hash."""
    faults = []
    for name, kept in manifest.files.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != kept.bytes:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {kept.bytes}")
        elif hashes and file_record(path).sha256 != kept.sha256:
            faults.append(f"{name} has another content (sha256) than was exported")
    return faults


def read_headers(directory: Path, manifest: Manifest) -> dict[str, tuple[str, TensorEntry, int]]:
    """Read the headers of all weight files: for each key the file, the tensor's description and its offset.

    Raises:
        LoadError: when a file is missing or not a whole safetensors file.
    """
    found: dict[str, tuple[str, TensorEntry, int]] = {}
    present = {path.name for path in directory.glob(f"{manifest.weights_stem}*.safetensors")}
    for name in sorted({tensor.file for tensor in manifest.tensors.values()} | present):
        try:
            entries, starts = read_header(directory / name)
        except (OSError, ValueError) as error:
            raise LoadError(f"{name} in {str(directory)!r} cannot be read: {error}; copy or export it again") from error
        found |= {key: (name, entry, starts[key]) for key, entry in entries.items()}
    return found


def check_headers(manifest: Manifest, headers: Mapping[str, tuple[str, TensorEntry, int]]) -> list[str]:
    """Compare the keys, dtypes and shapes in the files with the manifest, and quantized layers with their evidence."""
    faults = [f"{name} is missing" for name in manifest.tensors if name not in headers]
    faults += [f"{name} is unexpected" for name in headers if name not in manifest.tensors]
    for name, kept in manifest.tensors.items():
        if name not in headers:
            continue
        file, entry, start = headers[name]
        if file != kept.file:
            faults.append(f"{name} lies in {file} instead of {kept.file}")
        if (DTYPE_NAMES[entry.dtype], entry.shape) != (kept.dtype, kept.shape):
            faults.append(
                f"{name} is {DTYPE_NAMES[entry.dtype]} {list(entry.shape)} instead of {kept.dtype} {list(kept.shape)}"
            )
        if entry.is_code and start % 64:
            faults.append(f"{name} starts at byte {start}, which is not a multiple of 64")
    if manifest.float_grid:
        return faults
    for name, layer in frozen_record_of(manifest).layers.items():
        prefix = f"{name}."
        mine = {key.removeprefix(prefix): entry for key, (_, entry, _) in headers.items() if key.startswith(prefix)}
        found = {key: TensorHeader(DTYPE_NAMES[entry.dtype], entry.shape) for key, entry in mine.items()}
        declared = PackedModule.model_validate(
            {"weights": layer.weights, "activations": layer.activations, "group_size": layer.group_size}
        )
        size = LayerShape(*layer.shape, bias="bias" in found)
        faults += layer_faults(name, declared, size, found, manifest.dtype)
    return faults


def _skeleton(directory: Path, manifest: Manifest) -> nn.Module:
    """The model without memory for parameters; buffers are real."""
    if not (directory / "config.json").is_file():
        raise LoadError(
            f"{str(directory)!r} has no config.json to build the model from: pass the float model as model="
        )
    kind = model_class(manifest)
    try:
        # Buffers are real: those that no file holds, such as rotary tables, are only computed here.
        built = build(kind, read_config(kind, directory, manifest), getattr(torch, manifest.dtype), empty=True)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        raise LoadError(f"config.json in {str(directory)!r} does not build a {kind.__name__}: {error}") from error
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        built.generation_config = GenerationConfig.from_pretrained(directory)  # type: ignore[assignment]
    wrong = [
        f"{name} is {manifest.tensors[name].dtype} in the files and {tensor.dtype} in the model"
        for name, tensor in built.named_parameters()
        if name in manifest.tensors
        and manifest.tensors[name].dtype != DTYPE_NAMES[tensor.dtype]
        and not is_diffusers_model(built)  # whose classes may build a parameter in float32, and hold it as loaded
    ]
    if wrong:
        raise one_error(f"config.json in {str(directory)!r} does not fit the files", wrong)
    return built


def _fill(model: nn.Module, directory: Path, manifest: Manifest, record: FrozenRecord, device: torch.device) -> None:
    """Put frozen layers and all stored tensors into a float model."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    places = {name: module for name, module in model.named_modules(remove_duplicate=False) if name in record.layers}
    faults = _layer_faults(places, record)
    own = {name: tensor for name, tensor in stored_tensors(model) if name.rpartition(".")[0] not in record.layers}
    plain = {name: tensor for name, tensor in manifest.tensors.items() if not _in_layers(name, record.layers)}
    faults += [f"the files have {name}, which the model has not" for name in plain if name not in own]
    held = plain.keys() | manifest.tied.keys()
    faults += [f"the model has {name}, which the files have not" for name in own if name not in held]
    for name, kept in plain.items():
        if name in own and tuple(own[name].shape) != kept.shape:
            faults.append(f"{name} has shape {list(kept.shape)} in the files and {list(own[name].shape)} in the model")
    if faults:
        raise one_error(f"the files in {str(directory)!r} do not fit the model", faults)
    with _Tensors(directory, manifest) as tensors:
        for name, layer in record.layers.items():
            old = places[name]
            new = _frozen_layer(name, layer, old, tensors, device, record.spec.quantize_outputs)
            for alias in names[id(old)]:
                _set_module(model, alias, new)
        loaded: dict[str, Any] = {}
        for name in own:
            source = manifest.tied.get(name, name)
            if source not in loaded:
                loaded[source] = _like(own[name], tensors(source).to(device))
            parent, _, key = name.rpartition(".")
            _assign(model.get_submodule(parent), key, loaded[source])
    if device.type != "cpu":
        model.to(device)
    stranded = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if stranded:
        raise one_error("the load is incomplete", [f"{name} is still on the meta device" for name in stranded])


def _leave_meta(model: nn.Module) -> None:
    """Give weights that stock diffusers wrapped on the meta device a wrapper on the device where their data is.

    A pipeline asks the first parameter for the model's device.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.is_meta and not any(part.is_meta for part in inner_tensors(weight)):
            module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)


def _like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As the frozen model held it, which is as the file has it, whatever the model was built in."""
    return nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value


def _in_layers(name: str, layers: Mapping[str, LayerEvidence]) -> bool:
    return any(name[:i] in layers for i, character in enumerate(name) if character == ".")


def _layer_faults(places: Mapping[str, nn.Module], record: FrozenRecord) -> list[str]:
    faults = [f"the files have layer {name}, which the model has not" for name in record.layers if name not in places]
    for name, module in places.items():
        shape = record.layers[name].shape
        if not isinstance(module, nn.Linear):
            faults.append(f"layer {name} is a {type(module).__name__} in the model, not an nn.Linear")
        elif (module.out_features, module.in_features) != shape:
            size = (module.out_features, module.in_features)
            faults.append(f"layer {name} is {size} in the model, {shape} in the files")
    return faults


class _Tensors:
    """Tensors of the weight files by key, memory-mapped."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()  # tensors that were handed out keep their mapping alive

    def __call__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        file = self._manifest.tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(self._directory / file, framework="pt")
        tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    def below(self, layer: str) -> dict[str, torch.Tensor]:
        """All tensors of a layer, by their names below it."""
        names = [name for name in self._manifest.tensors if name.startswith(f"{layer}.")]
        return {name.removeprefix(f"{layer}."): self(name) for name in names}


def _frozen_layer(
    name: str, layer: LayerEvidence, old: Any, tensors: _Tensors, device: torch.device, quantize_outputs: bool
) -> nn.Module:
    """A frozen quanto layer, filled from the files; built on the meta device, so that nothing is initialised."""
    from optimum.quanto import QLinear, qtypes

    stored = {key: tensor.to(device) for key, tensor in tensors.below(name).items()}
    if (old.bias is None) != ("bias" not in stored):
        has, lacks = ("files", "model") if old.bias is None else ("model", "files")
        raise LoadError(f"layer {name} has a bias in the {has} but none in the {lacks}: the model is another one")
    new: Any = QLinear(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        dtype=stored["weight._scale"].dtype,
        device="meta",
        weights=qtypes[QTYPES[layer.weights].quanto_name],
        activations=None if layer.activations is None else qtypes[QTYPES[layer.activations].quanto_name],
        quantize_input=True,
    )
    new.weight = nn.Parameter(packed_weight(new, stored), requires_grad=False)
    if old.bias is not None:
        new.bias = nn.Parameter(stored["bias"], requires_grad=False)
    new.input_scale, new.output_scale = stored["input_scale"], stored["output_scale"]
    if not quantize_outputs:
        new.disable_output_quantization()
    frozen: nn.Module = new
    return frozen


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = module


def _assign(module: nn.Module, key: str, value: Any) -> None:
    store: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
    store[key] = value
