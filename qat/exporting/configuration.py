"""`config.json`, as the model's own library writes it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.construction import can_build
from qat.errors import ExportError
from qat.targets.diffusers import is_diffusers_model

__all__ = ["DIFFUSERS_STEM", "weights_stem", "write_config", "write_json"]

DIFFUSERS_STEM = "diffusion_pytorch_model"


def weights_stem(model: nn.Module) -> str:
    """How the names of a model's weight files begin, in the library that it belongs to."""
    return DIFFUSERS_STEM if is_diffusers_model(model) else "model"


def write_config(
    model: nn.Module,
    directory: Path,
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any] | None = None,
) -> bool:
    """Write ``config.json`` and, for models that generate, ``generation_config.json``.

    The model's own config object is left as it is. Nothing is written for models that no configuration builds.

    Args:
        model: the frozen model.
        directory: where to.
        dtype: the serving dtype, which transformers keeps in the file.
        quantization_config: what the loader is told about the weights.

    Returns:
        Whether there is a ``config.json`` now.
    """
    if not can_build(type(model)) or getattr(model, "config", None) is None:
        return False
    fields = _diffusers_fields(model) if is_diffusers_model(model) else _transformers_fields(model, dtype)
    if quantization_config is not None:
        fields["quantization_config"] = dict(quantization_config)
    write_json(directory / "config.json", fields)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():  # type: ignore[operator]
        try:
            generation.save_pretrained(directory)
        except ValueError as error:
            raise ExportError(
                f"the model's generation_config does not validate ({error}); mend model.generation_config first"
            ) from error
    return True


def _transformers_fields(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    for key in getattr(config, "sub_configs", ()):
        if getattr(config, key, None) is not None:
            getattr(config, key).dtype = dtype
    config.architectures = [type(model).__name__]
    if getattr(config, "tie_word_embeddings", False) and not _embeddings_are_tied(model):
        config.tie_word_embeddings = False
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return fields


def _diffusers_fields(model: Any) -> dict[str, Any]:
    """What ``save_config`` writes, without the path that the float model came from."""
    shown = copy.copy(model)  # to_json_string writes into the dictionary that it shows
    shown._internal_dict = copy.deepcopy(model._internal_dict)
    fields: dict[str, Any] = json.loads(shown.to_json_string())
    return {key: value for key, value in fields.items() if key not in ("_name_or_path", "quantization_config")}


def _embeddings_are_tied(model: Any) -> bool:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None:
        return True
    return getattr(inputs, "weight", None) is getattr(outputs, "weight", None)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
