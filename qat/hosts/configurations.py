"""Models built from their configuration alone: of a directory, of a name on the hub, or given as it is.

``configurations.yaml`` beside this file holds the configurations of much used public models, so that these need no
network. They were written by hand, from published numbers; a test compares their counts of parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from qat.errors import LoadError, SpecError, meant, shown
from qat.hosts.diffusers import DIFFUSERS
from qat.hosts.remote_code import refuse_remote_code

__all__ = ["build_on_meta", "published"]

_PARTS = ("transformer", "unet")
"""The part of a pipeline of diffusers that is built: the first of these that it has."""


@cache
def published() -> dict[str, dict[str, Any]]:
    """The configurations that come with qat, by the model's name on the hub.

    Each has ``config``, the fields of its config.json, and ``parameters``, their published count, or None.
    """
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: {"parameters": None} | entry for name, entry in entries.items()}


def build_on_meta(source: Any) -> nn.Module:
    """Build a model without memory for its weights: names, shapes and ties.

    Of transformers the first architecture in the configuration is built, else the base model; of a pipeline of
    diffusers its transformer or UNet.

    Args:
        source: a directory; a name on the hub, which is looked for in the hub's cache, in `published` and on the hub;
            the fields of a config.json; or a configuration of transformers.

    Raises:
        SpecError: it is none of these.
        LoadError: there is no such configuration, its library cannot build it, or only code in the directory can.

    >>> model = build_on_meta({"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 1})
    >>> model.encoder.layer[0].attention.self.query.weight.device
    device(type='meta')
    """
    directory, what = None, "of the given configuration"
    if isinstance(source, str | PathLike):
        directory = _directory(str(source))
        what = f"of {str(source if directory is None else directory / 'config.json')!r}"
        source = published()[str(source)]["config"] if directory is None else _fields(directory)
    elif isinstance(source, type) or not (isinstance(source, Mapping) or hasattr(source, "sub_configs")):
        raise SpecError(
            "model: must be an nn.Module, a directory, a name on the hub, or a configuration of transformers or "
            f"diffusers, got {shown(source)}: load the model first"
        )
    of_diffusers = isinstance(source, Mapping) and "_class_name" in source
    try:
        return _of_diffusers(source) if of_diffusers else _of_transformers(source, directory)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        library, message = "diffusers" if of_diffusers else "transformers", " ".join(str(error).split())
        message = message or type(error).__name__
        raise LoadError(f"model: {library} cannot build the model {what}: {message}") from error


def _of_diffusers(fields: Mapping[str, Any]) -> nn.Module:
    import diffusers

    return DIFFUSERS.build(getattr(diffusers, fields["_class_name"]), dict(fields), torch.float32, empty=True)


def _of_transformers(config: Any, directory: Path | None) -> nn.Module:
    import transformers

    if directory is not None:  # of whose files transformers takes those for its version
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    elif isinstance(config, Mapping):
        config = transformers.AutoConfig.for_model(**config)
    architectures = getattr(config, "architectures", None)
    chosen: Any = getattr(transformers, architectures[0], None) if architectures else None
    base: Any = transformers.AutoModel
    with torch.device("meta"):
        return base.from_config(config, trust_remote_code=False) if chosen is None else chosen(config)  # type: ignore[no-any-return]


def _directory(source: str) -> Path | None:
    """The directory that holds the configuration of ``source``; None: it is one of `published`."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        cached = _of_hub(source, cached=True)
        if isinstance(cached, str) and source in published():
            return None
        found = _of_hub(source, cached=False) if isinstance(cached, str) else cached
        if isinstance(found, str):
            owned = {name.rpartition("/")[2]: name for name in published()}  # as users call them
            hint = f"; did you mean {owned[source]!r}?" if source in owned else meant(source, published())
            raise LoadError(
                f"model: {source!r} is no directory here, and as a name on the hub it cannot be read ({found}): give a "
                f"directory with a config.json, or a name that comes with qat: {', '.join(published())}{hint}"
            )
        directory = found
    if (directory / "model_index.json").is_file():
        directory /= next((part for part in _PARTS if (directory / part).is_dir()), _PARTS[0])
    return directory


def _of_hub(name: str, *, cached: bool) -> Path | str:
    """The directory of the hub's cache that holds a model's configuration, or why there is none."""
    from huggingface_hub import snapshot_download

    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        return "names there have the form owner/model"
    files = ["config.json", "model_index.json", *(f"{part}/config.json" for part in _PARTS)]
    try:
        directory = Path(snapshot_download(name, allow_patterns=files, local_files_only=cached))
    except Exception as error:  # what can be wrong with a download has no common base
        return " ".join(str(error).split())
    return directory if any((directory / file).is_file() for file in files[:2]) else "it has no config.json"


def _fields(directory: Path) -> Mapping[str, Any]:
    """The fields of a directory's config.json, as they stand there; no code of the directory runs for it."""
    path = directory / "config.json"
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        fields.get("_class_name")
    except FileNotFoundError:
        raise LoadError(f"model: {str(directory)!r} has no config.json; give a model's directory") from None
    except (OSError, ValueError, AttributeError) as error:
        raise LoadError(f"model: {str(path)!r} is not a model's configuration: {error}") from error
    refuse_remote_code(directory, "model")
    return fields  # type: ignore[no-any-return]
