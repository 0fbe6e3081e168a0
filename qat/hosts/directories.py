"""Models of directories, built from their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import LoadError
from qat.hosts.diffusers import DIFFUSERS
from qat.hosts.remote_code import refuse_remote_code

__all__ = ["build_on_meta"]


def build_on_meta(directory: Path) -> nn.Module:
    """Build the model of a directory without memory for its weights: names, shapes and ties.

    Of transformers the first architecture in ``config.json`` is built, else the base model; of a pipeline of diffusers
    its transformer.

    Raises:
        LoadError: there is no such configuration, its library cannot build it, or only code in the directory can.
    """
    if not directory.is_dir():
        raise LoadError(f"MODEL_DIR: {str(directory)!r} is not a directory; give one that holds a model's config.json")
    if (directory / "model_index.json").is_file():
        directory /= "transformer"
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        name, architectures = fields.get("_class_name"), fields.get("architectures") or []
    except FileNotFoundError:
        raise LoadError(f"MODEL_DIR: {str(directory)!r} has no config.json; give a model's directory") from None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"MODEL_DIR: {str(path)!r} is not a model's configuration: {error}") from error
    refuse_remote_code(directory, "MODEL_DIR")
    library = "transformers" if name is None else "diffusers"
    try:
        if name is None:
            import transformers

            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
            chosen: Any = getattr(transformers, architectures[0], None) if architectures else None
            base: Any = transformers.AutoModel
            with torch.device("meta"):
                return base.from_config(config, trust_remote_code=False) if chosen is None else chosen(config)  # type: ignore[no-any-return]
        import diffusers

        cls = getattr(diffusers, name)
        return DIFFUSERS.build(cls, cls.load_config(directory), torch.float32, empty=True)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        message = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(f"MODEL_DIR: {library} cannot build the model of {str(path)!r}: {message}") from error
