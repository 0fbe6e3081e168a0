"""Float models to start from, and the optional packages that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import qat
from qat.hosts.configurations import hub_directory, local_directory
from qat.hosts.pretrained import cannot_load, check_folder, load_processor, require_filled
from qat.training.teacher import INDEX
from recipes.common.config import ConfigError
from recipes.common.settings import RecipeConfig

__all__ = ["load_classifier", "load_language_model", "load_pipeline", "load_teacher", "require_packages"]


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


def load_teacher(config: RecipeConfig, load: Callable[[str], nn.Module]) -> nn.Module | qat.CachedLogits | None:
    """Load the teacher that a configuration names: a model, or the logits that `qat.cache_logits` wrote.

    Args:
        config: of the run.
        load: makes a model of a directory or hub name, as the recipe makes its own.

    Raises:
        LoadError: it cannot be loaded.
    """
    if config.teacher is None:
        return None
    if (Path(config.teacher) / INDEX).is_file():
        return qat.CachedLogits(config.teacher)
    try:
        return load(config.teacher)
    except qat.LoadError as error:
        raise qat.LoadError(f"teacher{str(error).removeprefix('model')}") from error


def load_language_model(source: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model with float32 master weights, and its tokenizer.

    Args:
        source: a local directory or a hub name.
        trust_remote_code: run code that comes with the model.

    Raises:
        LoadError: either cannot be loaded, or weights are missing or have other shapes than the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return _load(source, AutoModelForCausalLM, AutoTokenizer, "tokenizer", trust_remote_code)


def load_classifier(
    source: str,
    kind: Literal["image", "sequence"],
    *,
    new_classes: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a classifier with float32 master weights, and its image processor or tokenizer.

    Args:
        source: a local directory or a hub name.
        kind: what it classifies.
        new_classes: names of the classes of a new, untrained output layer; none: the model's own.
        trust_remote_code: run code that comes with the model.

    Raises:
        LoadError: either cannot be loaded, or weights are missing or have other shapes than the model; those of a new
            output layer may.
    """
    import transformers

    library: Any = transformers
    model_class = getattr(library, f"AutoModelFor{kind.capitalize()}Classification")
    processor, name = ("AutoImageProcessor", "image processor") if kind == "image" else ("AutoTokenizer", "tokenizer")
    return _load(source, model_class, getattr(library, processor), name, trust_remote_code, new_classes)


def _load(
    source: str, model_class: Any, processor_class: Any, name: str, trust: bool, new: Sequence[str] | None = None
) -> tuple[Any, Any]:
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if new is not None:
        id2label = dict(enumerate(new))
        labels = {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}
        options |= {"num_labels": len(new), **labels, "ignore_mismatched_sizes": True}
    check_folder(source, "model")
    processor = load_processor(source, "model", processor_class, name, trust_remote_code=trust)
    try:
        model, info = model_class.from_pretrained(source, trust_remote_code=trust, **options)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        raise cannot_load(source, "model", error) from error
    unfilled, remedy = [*info["missing_keys"], *info["mismatched_keys"]], "give a complete checkpoint of one"
    if new is not None:  # what is not in the base model belongs to the output layer
        keys = (str(key[0] if isinstance(key, tuple) else key) for key in unfilled)
        unfilled = [key for key in keys if key.startswith(f"{model.base_model_prefix}.")]
        remedy = "give one that is complete but for the output layer"
    require_filled(source, "model", model, unfilled, processor, remedy)
    return model, processor


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
    folder = local_directory(source)
    if not ((folder or hub_directory(source, "model")) / "model_index.json").is_file():
        raise qat.LoadError(f"model: {source!r} is no pipeline of diffusers, for it has no model_index.json: give one")
    try:
        if folder is None:
            folder = Path(diffusers.DiffusionPipeline.download(source, trust_remote_code=trust_remote_code))
        load: Any = diffusers.DiffusionPipeline.from_pretrained
        given = {} if transformer is None else {"transformer": transformer}
        pipeline = load(folder, dtype=dtype, trust_remote_code=trust_remote_code, **given)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        raise cannot_load(source, "model", error) from error
    if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
        parts = ", ".join(name for name, part in pipeline.components.items() if isinstance(part, nn.Module))
        raise qat.LoadError(
            f"model: {type(pipeline).__name__} in {source!r} has no transformer, only {parts}: give a pipeline whose "
            "denoiser is one"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder
