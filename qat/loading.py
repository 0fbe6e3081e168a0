"""`load`: an exported directory becomes a model ready for inference, whatever the target.

Directories of a host with a loader of its own go through that. For plain modules this is a loader of our own. It puts
frozen layers where the evidence says, and assigns the tensors of the memory-mapped files without a copy. It is strict:
a missing or unexpected key, another dtype or shape are errors, found in the files' headers before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import LoadError, QatError, UnjudgedError, load_error
from qat.files.directory import as_path
from qat.files.evidence import record_frozen
from qat.files.manifest import Manifest
from qat.files.shards import DTYPE_NAMES, header_faults
from qat.hosts import get_target
from qat.hosts.stock import library_and_class, load_pretrained, refuse_strange_code
from qat.layers import QuantizedLayer, float_layers
from qat.tensors import difference, meta_names, stored_tensors
from qat.untrusted import build_described, check_configuration, check_files, check_settings, read_trusted

__all__ = [
    "before_loading",
    "check_headers",
    "fill",
    "load",
    "module_names",
    "require_exported",
    "skeleton",
    "tied_layers",
]

_FILES = "{} files, sizes and hashes as written"
_KEYS = "{} tensors, dtypes, packed shapes and alignment as declared"

_Places = Mapping[str, tuple[nn.Module, type[QuantizedLayer]]]
"""The float modules that become frozen layers, each with the class of its kind."""


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
        verify_hashes: compare the hashes of large files with the manifest too, which reads all of them; those of files
            up to 64 MB are compared at every load.

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
    path = as_path(directory, LoadError)
    manifest = read_trusted(path)
    if model is not None and manifest.float_grid:
        raise LoadError(f"model: {str(path)!r} holds floats (float_grid=True), which fill no model: leave model out")
    require_exported(path, manifest, model, hashes=verify_hashes)
    target = get_target(manifest.target)
    own = not target.host.keeps_packed or (target.format.own_modules and not manifest.float_grid)
    reloaded = None if own or model is not None else load_pretrained(path, manifest)
    if reloaded is not None:
        if faults := _unfilled(reloaded.model, manifest) + _other_layers(reloaded.model, manifest):
            raise load_error(f"{str(path)!r} does not fill the model that its config.json builds", faults)
        loaded = reloaded.model if torch.device(device).type == "cpu" else reloaded.model.to(device)
    else:
        loaded = model if model is not None else skeleton(path, manifest)
        fill(loaded, path, manifest, torch.device(device))
    loaded.requires_grad_(False)
    record_frozen(loaded, manifest.frozen, may_save=reloaded is not None)
    return loaded.eval()


def _unfilled(model: nn.Module, manifest: Manifest) -> list[str]:
    """Tensors that no file holds, so that a lenient loader has left them random."""
    every, tied = dict(stored_tensors(model)), manifest.tied
    layers = tuple(f"{name}." for name in manifest.frozen.layers)
    places = [(cls, module) for name, module, cls in float_layers(model) if name in manifest.frozen.layers]
    masters = {id(parameter) for cls, module in places for parameter in cls.masters(module).values()}
    own = [(n, tensor) for n, tensor in every.items() if not n.startswith(layers) and id(tensor) not in masters]

    def is_filled(name: str, tensor: Tensor) -> bool:
        source = every.get(tied.get(name, name))  # an edited config.json may have broken a tie
        if source is None or not (name in manifest.tensors or name in tied):
            return False
        return source is tensor or difference(source, tensor) is None

    filled = {id(tensor) for name, tensor in own if is_filled(name, tensor)}
    return [f"the model has {name}, which the files have not" for name, tensor in own if id(tensor) not in filled]


def before_loading(
    directory: Path, manifest: Manifest, model: nn.Module | None, *, hashes: bool
) -> Iterator[tuple[str, list[str], str]]:
    """What is asked of a directory before a loader runs: name, faults, and what is true where there are none.

    It ends with the first question that has faults: nothing is opened after it. ``model`` is one to be filled; None:
    the model is built by its configuration.

    Raises:
        LoadError: there is nothing to build the model from.
    """

    def keys() -> list[str]:
        found = check_configuration(directory, manifest)
        if model is None:
            refuse_strange_code(directory, manifest)
        return check_headers(directory, manifest) + found

    def fits() -> list[str]:
        built = build_described(directory, manifest) if model is None else model
        return _fit(built, manifest)[0] or check_settings(built, directory, manifest)

    counts = f"{len(manifest.frozen.layers)} layers and {len(manifest.tensors)} tensors"
    faults = check_files(directory, manifest, hashes=hashes)
    yield "files", faults, _FILES.format(len(manifest.files))
    if not faults and model is None:
        library_and_class(directory, manifest)
    for name, ask, good in (("keys", keys, _KEYS.format(len(manifest.tensors))), ("model", fits, f"{counts} fit it")):
        if not faults:
            try:
                faults = ask()
            except UnjudgedError:
                raise
            except QatError as error:
                faults = [str(error)]
            yield name, faults, good


def require_exported(directory: Path, manifest: Manifest, model: nn.Module | None, *, hashes: bool) -> None:
    """Raise `LoadError` with the faults of the first question of `before_loading` that has some."""
    for name, faults, _ in before_loading(directory, manifest, model, hashes=hashes):
        if faults:
            raise load_error(f"{str(directory)!r} is not what was exported ({name})", faults)


def _other_layers(model: nn.Module, manifest: Manifest) -> list[str]:
    """Layers that a stock loader quantized and freezing did not, or the reverse."""
    format, layers = get_target(manifest.target).format, manifest.frozen.layers
    held = {name for name, module in model.named_modules() if format.is_frozen(module)}
    aliases = {name for name, module in model.named_modules(remove_duplicate=False) if format.is_frozen(module)}
    faults = [f"layer {name} is not quantized after loading" for name in layers if name not in aliases]
    return faults + [f"layer {name} is quantized after loading, not by freezing" for name in held - layers.keys()]


def check_headers(directory: Path, manifest: Manifest) -> list[str]:
    """Compare keys, dtypes and shapes in all weight files with the manifest, and quantized layers with their evidence.

    Raises:
        LoadError: when a file is missing or not whole.
    """
    target, record = get_target(manifest.target), manifest.frozen
    headers, format = target.host.container.headers(directory, manifest), target.format
    if manifest.float_grid:
        return header_faults(headers, manifest.tensors, ())
    codes: set[str] = set()
    faults: list[str] = []
    below = _keys_of_layers(manifest, headers)
    for name, layer in record.layers.items():
        found = {key: headers[full].entry for key, full in below[name].items()}
        types = replace(format.recorded(record, name), dtype=getattr(torch, manifest.dtype))
        faults += format.faults(name, types, layer.shape, "bias" in found, layer.group_size, found)
        slots = format.slots(types, layer.shape, bias=False)
        codes |= {below[name].get(key, f"{name}.{key}") for key, slot in slots.items() if slot.is_code}
    return header_faults(headers, manifest.tensors, codes) + faults


def _keys_of_layers(manifest: Manifest, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each layer the keys that begin with its name and a dot, by what follows; those of a tied weight too.

    Models of experts have thousands of both.
    """
    below: dict[str, dict[str, str]] = {name: {} for name in manifest.frozen.layers}
    for key in keys:
        for dot in re.finditer(r"\.", key):
            if key[: dot.start()] in below:
                below[key[: dot.start()]][key[dot.end() :]] = key
    for name, source in tied_layers(manifest).items():
        below[name] |= {rest: key for rest, key in below[source].items() if rest.startswith("weight")}
    return below


def tied_layers(manifest: Manifest) -> dict[str, str]:
    """The quantized layers without a weight of their own, each with the layer that has it."""
    tied = {name: manifest.tied.get(f"{name}.weight", "").removesuffix(".weight") for name in manifest.frozen.layers}
    return {name: source for name, source in tied.items() if source in manifest.frozen.layers}


def skeleton(directory: Path, manifest: Manifest) -> nn.Module:
    """The model without memory for parameters; buffers are real.

    Raises:
        LoadError: there is no ``config.json``, or it does not build the class, or not what is in the files.
    """
    library, cls = library_and_class(directory, manifest)
    try:
        # Buffers are real: those that no file holds, such as rotary tables, are only computed here.
        built = library.build_from(cls, directory, manifest, empty=True)
    except LoadError:
        raise
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        raise LoadError(f"config.json in {str(directory)!r} does not build a {cls.__name__}: {error}") from error
    rules = get_target(manifest.target).rules(built, getattr(torch, manifest.dtype))
    wrong = [
        f"{name} is {manifest.tensors[name].dtype} in the files, but the model holds it in {rules.tensor_dtype(name)}"
        for name, tensor in built.named_parameters()
        if name in manifest.tensors
        and name.rpartition(".")[0] not in manifest.frozen.layers  # whose codes may be stored as ``weight``
        and tensor.is_floating_point()
        and manifest.tensors[name].dtype != DTYPE_NAMES[rules.tensor_dtype(name)]
    ]
    if wrong:
        raise load_error(f"config.json in {str(directory)!r} does not fit the files", wrong)
    return built


def fill(model: nn.Module, directory: Path, manifest: Manifest, device: torch.device) -> None:
    """Put frozen layers and all stored tensors into a float model, in place.

    Raises:
        LoadError: the files do not fit the model. Nothing is changed then.
    """
    faults, places, own = _fit(model, manifest)
    if faults:
        raise load_error(f"the files in {str(directory)!r} do not fit the model", faults)
    read = _reader(directory, manifest, device)
    _place(model, manifest, places, read)
    for name, source in tied_layers(manifest).items():
        get_target(manifest.target).format.tie([model.get_submodule(source), model.get_submodule(name)])
    loaded: dict[str, Any] = {}
    for name, old in own.items():
        source = manifest.tied.get(name, name)
        if source not in loaded:  # in the dtype of the file, which the frozen model had, whatever this one was built in
            value = read(source)
            loaded[source] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        store: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
        store[key] = loaded[source]
    if device.type != "cpu":
        model.to(device)
    if without_data := meta_names(model):
        raise load_error("the load is incomplete", [f"{name} is still on the meta device" for name in without_data])


def _fit(model: nn.Module, manifest: Manifest) -> tuple[list[str], _Places, dict[str, Tensor]]:
    """Where a float model differs from the files; the places of its layers; its other tensors."""
    record = manifest.frozen
    places = {name: (module, cls) for name, module, cls in float_layers(model) if name in record.layers}
    faults = _place_faults(places, model, manifest)
    masters = {id(p) for module, cls in places.values() for p in cls.masters(module).values()}
    own = {
        name: tensor
        for name, tensor in stored_tensors(model)
        if name.rpartition(".")[0] not in record.layers and id(tensor) not in masters
    }
    below = _keys_of_layers(manifest, manifest.tensors)
    packed = {key for keys in below.values() for key in keys.values()}
    plain = {name: tensor for name, tensor in manifest.tensors.items() if name not in packed}
    faults += [f"the files have {name}, which the model has not" for name in plain if name not in own]
    held = plain.keys() | manifest.tied.keys()
    faults += [f"the model has {name}, which the files have not" for name in own if name not in held]
    for name, kept in plain.items():
        if name in own and tuple(own[name].shape) != kept.shape:
            faults.append(f"{name} has shape {list(kept.shape)} in the files and {list(own[name].shape)} in the model")
    return faults, places, own


def _reader(directory: Path, manifest: Manifest, device: torch.device) -> Callable[[str], Tensor]:
    """What gives the tensor of a key, on the device."""
    fetch = get_target(manifest.target).host.container.reader(directory, manifest)
    return lambda key: fetch(key).to(device)


def _place(model: nn.Module, manifest: Manifest, places: _Places, read: Callable[[str], Tensor]) -> None:
    """Put all frozen layers into a model."""
    target, record = get_target(manifest.target), manifest.frozen
    below, aliases = _keys_of_layers(manifest, manifest.tensors), module_names(model)
    for name, layer in record.layers.items():
        tensors = {rest: read(key) for rest, key in below[name].items()}
        module, cls = places[name]
        new = target.build(target.format.recorded(record, name), layer.shape, tensors, like=module)
        cls.install(model, aliases.get(id(module), [name]), new)


def module_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by its ``id``."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _place_faults(places: _Places, model: nn.Module, manifest: Manifest) -> list[str]:
    layers = manifest.frozen.layers
    modules, faults = dict(model.named_modules(remove_duplicate=False)), []
    for name in layers.keys() - places.keys():
        if name in modules:
            what = f"layer {name} is a {type(modules[name]).__name__} in the model, which is no layer to quantize"
        else:
            what = f"the files have layer {name}, which the model has not"
        faults.append(what)
    for name, (module, cls) in places.items():
        shape = layers[name].shape
        if (found := tuple(cls.effective_weight(module).shape)) != shape:
            faults.append(f"layer {name} is {found} in the model, {shape} in the files")
        elif (found := cls.stored_kernel(module)) != layers[name].kernel:
            faults.append(f"layer {name} has a kernel of {found} in the model, of {layers[name].kernel} in the files")
        elif (getattr(module, "bias", None) is None) != (f"{name}.bias" not in manifest.tensors):
            has, lacks = ("files", "model") if getattr(module, "bias", None) is None else ("model", "files")
            faults.append(f"layer {name} has a bias in the {has} but none in the {lacks}: the model is another one")
    return faults
