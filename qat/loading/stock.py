"""The loaders that a directory was written for, called as their users call them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import LoadError
from qat.exporting.manifest import Manifest
from qat.packing import keep_bias
from qat.remote_code import refuse_remote_code
from qat.targets.diffusers import is_diffusers_model

__all__ = ["attention_arguments", "load_pretrained", "model_class", "read_config"]

_LIBRARIES = ("transformers", "diffusers")


def model_class(manifest: Manifest) -> Any:
    """The class named in the manifest: one of transformers or diffusers, or one that the caller has imported already.

    Nothing else is imported by a name that a file gives.

    Raises:
        LoadError: when it is neither.
    """
    module, _, name = manifest.model_class.rpartition(".")
    library = module.partition(".")[0]
    found = getattr(importlib.import_module(library), name, None) if library in _LIBRARIES else None
    found = found or getattr(sys.modules.get(module), name, None)
    if found is None:
        raise LoadError(
            f"the exported model is a {manifest.model_class}, which is neither a class of transformers or diffusers "
            f"nor imported here: import it first, or pass a float model of it as model="
        )
    return found


def attention_arguments(manifest: Manifest) -> dict[str, str]:
    """The attention implementation the model was trained with, where every machine has it."""
    kept = manifest.attn_implementation
    return {"attn_implementation": kept} if kept in ("eager", "sdpa") else {}


def read_config(kind: Any, directory: Path, manifest: Manifest) -> Any:
    """Read the ``config.json`` of a directory as the class's own library does."""
    if is_diffusers_model(kind):
        return kind.load_config(directory)
    return kind.config_class.from_pretrained(directory, trust_remote_code=False, **attention_arguments(manifest))


def load_pretrained(directory: Path, manifest: Manifest, device: str | torch.device = "cpu") -> nn.Module:
    """Load a directory by the class's own `from_pretrained`: stock, but for packed weights of transformers.

    Raises:
        LoadError: when the loader fails, or would need code that the directory brings.
    """
    kind = model_class(manifest)
    if manifest.model_class.partition(".")[0] in _LIBRARIES:  # other classes come from the caller's own import
        refuse_remote_code(directory, auto_class=kind.__name__)
    try:
        with _quiet_quanto():
            loaded = (_from_diffusers if is_diffusers_model(kind) else _from_transformers)(kind, directory, manifest)
    except LoadError:
        raise
    except Exception as error:  # nor is there an end to what a load can raise
        raise LoadError(f"{kind.__name__}.from_pretrained({str(directory)!r}) failed: {error}") from error
    for module in loaded.modules():
        weight = getattr(module, "weight", None) if hasattr(module, "weight_qtype") else None
        if weight is not None and module.bias is not None and hasattr(weight, "qtype"):
            kept = keep_bias(weight)
            if kept is not weight:
                module.weight = nn.Parameter(kept, requires_grad=False)
    return loaded.to(device) if torch.device(device).type != "cpu" else loaded


def _from_transformers(kind: Any, directory: Path, manifest: Manifest) -> nn.Module:
    from transformers import QuantoConfig

    importlib.import_module("qat.integrations.transformers")
    arguments: dict[str, Any] = {"dtype": getattr(torch, manifest.dtype), **attention_arguments(manifest)}
    if manifest.stock_arguments is not None:
        arguments["quantization_config"] = QuantoConfig(**manifest.stock_arguments)
    loaded: nn.Module = kind.from_pretrained(directory, trust_remote_code=False, **arguments)
    return loaded


def _from_diffusers(kind: Any, directory: Path, manifest: Manifest) -> nn.Module:
    from diffusers import QuantoConfig

    arguments: dict[str, Any] = {"torch_dtype": getattr(torch, manifest.dtype)}
    if manifest.stock_arguments is not None:
        arguments["quantization_config"] = QuantoConfig(**manifest.stock_arguments)  # type: ignore[no-untyped-call]
    loaded: nn.Module = kind.from_pretrained(str(directory), **arguments)
    return loaded


@contextmanager
def _quiet_quanto() -> Iterator[None]:
    """Without the notice, at every load, that diffusers will drop its quanto backend in its release 1.0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[qQ]uanto.*deprecated", category=FutureWarning)
        yield
