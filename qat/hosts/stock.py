"""The loaders that a directory was written for, called as their users call them."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import LoadError, UnjudgedError
from qat.files.manifest import Manifest
from qat.files.shards import DTYPES_BY_NAME
from qat.hosts.base import Host, Reloaded
from qat.hosts.remote_code import refuse_remote_code
from qat.hosts.targets import HOSTS, MODULE, get_target, host_of
from qat.tensors import stored_tensors

__all__ = ["library_and_class", "load_pretrained", "refuse_strange_code", "stock_reload"]


def library_and_class(directory: Path, manifest: Manifest) -> tuple[Host, Any]:
    """The class named in the manifest: of a known library, or one that the caller has imported already.

    Nothing else is imported by a name that a file gives.

    Raises:
        UnjudgedError: it is neither, or there is no ``config.json`` to build it from.
    """
    if "config.json" not in manifest.files:
        raise UnjudgedError(
            f"{str(directory)!r} has no config.json: pass the float model as model= to load or verify; it cannot be "
            f"judged without: call qat.verify({str(directory)!r}, model=float_model) in your own program"
        )
    module, _, name = manifest.model_class.rpartition(".")
    library = module.partition(".")[0]
    known = any(host.name == library for host in HOSTS)
    found = getattr(importlib.import_module(library), name, None) if known else None
    found = found or getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type):
        raise UnjudgedError(
            f"{str(directory)!r} cannot be judged without its model: the exported model is a {manifest.model_class}, "
            "which is neither a class of transformers or diffusers nor imported here: import it first, or pass a float "
            "model of it as model= to qat.load or qat.verify"
        )
    return host_of(found), found


def refuse_strange_code(directory: Path, manifest: Manifest) -> Any:
    """The class named in the manifest; `LoadError` when only code of the directory can build its model."""
    library, cls = library_and_class(directory, manifest)
    by_quanto = get_target(manifest.target).host is MODULE and library.is_language_model(cls)
    if by_quanto or cls.__module__.partition(".")[0] == library.name:  # a class that the caller imported is trusted
        refuse_remote_code(directory, auto_class="AutoModelForCausalLM" if by_quanto else cls.__name__)
    return cls


def load_pretrained(directory: Path, manifest: Manifest) -> Reloaded | None:
    """Load a directory by its host's own call; None for plain modules, which have none. Failures are `LoadError`."""
    target = get_target(manifest.target)
    if target.host is MODULE:
        return None
    cls = refuse_strange_code(directory, manifest)
    try:
        with _kept_default_dtype():
            loaded = target.host.load(cls, directory, manifest, target.format)
    except LoadError:
        raise
    except Exception as error:  # nor is there an end to what a load can raise
        raise LoadError(f"{cls.__name__}.from_pretrained({str(directory)!r}) failed: {error}") from error
    if loaded is not None:
        target.settle(loaded.model)
    return loaded


@contextmanager
def _kept_default_dtype() -> Iterator[None]:
    """Undo what diffusers leaves when a load of it fails."""
    default = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def stock_reload(directory: Path, manifest: Manifest, model: nn.Module | None) -> Reloaded | None:
    """Load a directory for verification, by the target's own loader; None where it has none but `qat.load`.

    ``model`` is a float model of the exported architecture, for directories without ``config.json``; it is copied.

    Raises:
        LoadError: when the loader fails, or there is no model to fill.
    """
    loaded, format = load_pretrained(directory, manifest), get_target(manifest.target).format
    if loaded is not None:
        return loaded
    if model is not None:
        skeleton = copy.deepcopy(model).to("cpu")
    else:
        library, cls = library_and_class(directory, manifest)
        if library.is_language_model(cls):
            refuse_strange_code(directory, manifest)
            found = format.load_language_model(directory, **library.attention_arguments(manifest))
            if found is not None:
                return Reloaded(*found)
        # On CPU, not meta: quanto's loader fills the buffers of a meta model with garbage.
        skeleton = library.build_from(cls, directory, manifest, empty=False)
    serving = getattr(torch, manifest.dtype)
    for name, tensor in stored_tensors(skeleton):  # the loader may copy into the model, whose dtypes then decide
        if name in manifest.tensors:
            tensor.data = tensor.data.to(DTYPES_BY_NAME[manifest.tensors[name].dtype])
        elif name.rpartition(".")[0] in manifest.frozen.layers:
            tensor.data = tensor.data.to(serving)
    files = sorted({tensor.file for tensor in manifest.tensors.values()})
    filled = format.fill(skeleton, directory, files)
    return None if filled is None else Reloaded(*filled)
