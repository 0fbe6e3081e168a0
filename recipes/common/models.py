"""Float models to start from, and the optional packages that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import qat
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
    cached = (Path(config.teacher) / INDEX).is_file()
    return qat.CachedLogits(config.teacher) if cached else load(config.teacher)


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
    local = Path(source).expanduser().is_dir()
    try:
        processor = processor_class.from_pretrained(source, trust_remote_code=trust)
        # For a folder without one, transformers makes tokenizers of some classes with an empty vocabulary.
        files = set(getattr(processor, "vocab_files_names", {}).values())
        known = sorted(files | {"tokenizer.json"}) if files else []
        if local and known and not any((Path(source).expanduser() / file).is_file() for file in known):
            raise FileNotFoundError(f"none of {', '.join(known)} is there")
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        if not local:
            raise _load_error(source, error) from error
        raise qat.LoadError(
            f"model: {source!r} has no {name} that can be loaded ({' '.join(str(error).split())}): put the files of "
            f"the model's {name} there"
        ) from error
    try:
        model, info = model_class.from_pretrained(source, trust_remote_code=trust, **options)
    except Exception as error:  # likewise
        raise _load_error(source, error) from error
    unfilled = sorted(
        {str(key[0] if isinstance(key, tuple) else key) for key in (*info["missing_keys"], *info["mismatched_keys"])}
    )
    if new is not None:  # what is not in the base model belongs to the output layer
        unfilled = [key for key in unfilled if key.startswith(f"{model.base_model_prefix}.")]
    if unfilled:
        remedy = "give a complete checkpoint" if new is None else "give one that is complete but for the output layer"
        raise qat.LoadError(f"model: the weights in {source!r} do not fill {unfilled[:5]}: {remedy}")
    return model, processor


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
