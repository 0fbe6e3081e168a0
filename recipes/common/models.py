"""Float models to start from, and the optional packages that they need."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from recipes.common.config import ConfigError

__all__ = ["load_language_model", "load_pipeline", "require_packages"]


def require_packages(extras: Mapping[str, str]) -> None:
    """Check that optional packages are there, before any work.

    Args:
        extras: package to the extra of this project that brings it.

    Raises:
        ConfigError: some are not.
    """
    missing = {package: extra for package, extra in extras.items() if find_spec(package) is None}
    if missing:
        raise ConfigError(
            f"this recipe needs {', '.join(missing)}, not installed here: run "
            f"pip install 'qat[{','.join(dict.fromkeys(missing.values()))}]'"
        )


def load_language_model(source: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model with float32 master weights, and its tokenizer.

    Args:
        source: a local directory or a hub name.
        trust_remote_code: run code that comes with the model.

    Raises:
        LoadError: either cannot be loaded, or weights are missing or have other shapes than the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, info = load(source, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        raise _load_error(source, error) from error
    unfilled = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if unfilled:
        raise qat.LoadError(f"model: the weights in {source!r} do not fill {unfilled[:5]}: give a complete checkpoint")
    return model, tokenizer


def _load_error(source: str, error: Exception) -> qat.LoadError:
    """What a library's error means for who named a model; a path that cannot be a hub's name never gets this far."""
    meant = "" if Path(source).expanduser().is_dir() else "is no directory here, and as a hub's name "
    return qat.LoadError(f"model: {source!r} {meant}cannot be loaded: {' '.join(str(error).split())}")


def load_pipeline(
    source: str,
    dtype: torch.dtype = torch.float32,
    *,
    transformer: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Path]:
    """Load a diffusion pipeline.

    Args:
        source: a local directory or a hub name.
        dtype: of all its parts; float32 for master weights.
        transformer: what takes the place of its own, which is then never read; left as it is.
        trust_remote_code: run code that comes with the pipeline.

    Returns:
        The pipeline, and the folder that holds its files.

    Raises:
        LoadError: it cannot be loaded, or has no transformer.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = Path(diffusers.DiffusionPipeline.download(source, trust_remote_code=trust_remote_code))
        load: Any = diffusers.DiffusionPipeline.from_pretrained
        given = {} if transformer is None else {"transformer": transformer}
        pipeline = load(folder, dtype=dtype, trust_remote_code=trust_remote_code, **given)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        raise _load_error(source, error) from error
    if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
        parts = ", ".join(name for name, part in pipeline.components.items() if isinstance(part, nn.Module))
        raise qat.LoadError(
            f"model: {type(pipeline).__name__} in {source!r} has no transformer, only {parts}: give a pipeline whose "
            "denoiser is one"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder
