"""Reloading a directory for verification, by the target's own loader."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.construction import build
from qat.errors import LoadError
from qat.evidence import FrozenRecord
from qat.exporting.layout import DTYPE_NAMES
from qat.exporting.manifest import QMAP_NAME, Manifest
from qat.exporting.quanto import stored_tensors
from qat.loading.stock import attention_arguments, load_pretrained, model_class, read_config
from qat.remote_code import refuse_remote_code

__all__ = ["reload"]


def reload(directory: Path, manifest: Manifest, record: FrozenRecord, model: nn.Module | None) -> tuple[nn.Module, str]:
    """Load with the target's own loader, and say which that was."""
    if manifest.target != "quanto":
        loaded = load_pretrained(directory, manifest)
        how = f"{type(loaded).__name__}.from_pretrained"
        if manifest.target == "diffusers":
            how += f" with torch_dtype=torch.{manifest.dtype}"
            how += "" if manifest.dtype == "float32" else "; without one diffusers loads float32, and outputs differ"
        return loaded, how
    if model is None and (directory / "config.json").is_file():
        kind = model_class(manifest)
        if _is_causal_language_model(kind):
            from optimum.quanto import QuantizedModelForCausalLM

            refuse_remote_code(directory, auto_class="AutoModelForCausalLM")
            arguments = attention_arguments(manifest)
            load: Any = QuantizedModelForCausalLM.from_pretrained
            wrapper = load(str(directory), trust_remote_code=False, **arguments)
            return wrapper._wrapped, "QuantizedModelForCausalLM.from_pretrained"
        # On CPU, not meta: requantize fills the buffers of a meta model with garbage.
        skeleton = build(kind, read_config(kind, directory, manifest), getattr(torch, manifest.dtype), empty=False)
    elif model is not None:
        skeleton = copy.deepcopy(model).to("cpu")
    else:
        raise LoadError(f"{str(directory)!r} has no config.json: pass the float model as model=")
    return _requantized(skeleton, directory, manifest, record), "optimum.quanto.requantize on a model built on CPU"


def _is_causal_language_model(kind: Any) -> bool:
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    config = getattr(kind, "config_class", None)
    return config in mapping and mapping[config] is kind


def _requantized(model: nn.Module, directory: Path, manifest: Manifest, record: FrozenRecord) -> nn.Module:
    from optimum.quanto import requantize
    from safetensors.torch import load_file

    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    for name, tensor in stored_tensors(model):  # requantize copies into the model, whose dtypes therefore decide
        kept = manifest.tensors.get(name)
        if kept is not None:
            tensor.data = tensor.data.to(dtypes[kept.dtype])
        elif name.rpartition(".")[0] in record.layers:
            tensor.data = tensor.data.to(getattr(torch, manifest.dtype))
    state: dict[str, torch.Tensor] = {}
    for file in sorted({tensor.file for tensor in manifest.tensors.values()}):
        state |= load_file(directory / file)
    requantize(model, state, json.loads((directory / QMAP_NAME).read_text(encoding="utf-8")))
    return model.eval()
