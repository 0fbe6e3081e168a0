"""Models built from their configuration alone: of a directory, of a name on the hub, or given as it is.

``configurations.yaml`` beside this file holds the configurations of much used public models, so that these need no
network. They were written by hand, from published numbers; a test compares their counts of parameters.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml
from torch import nn

from qat.errors import LoadError, SpecError, meant, shown, told
from qat.files.places import like_folder
from qat.files.trusted import MOST_TEXT
from qat.hosts.diffusers import DIFFUSERS
from qat.hosts.remote_code import refuse_remote_code

__all__ = [
    "MOST_DEEP",
    "PATIENCE",
    "build_on_meta",
    "config_fields",
    "depths",
    "hub_directory",
    "hub_name",
    "local_directory",
    "published",
    "source_directory",
    "source_fault",
]

PATIENCE = 10.0
"""Seconds that the hub has to answer whether it has a model: what asks it later tries again, and again."""
MOST_DEEP = 10_000
"""The most layers that a configuration may name: no model has as many, and all are built one by one."""
_PARTS = ("transformer", "unet")
"""The part of a pipeline of diffusers that is built: the first of these that it has."""
_NAME = r"[A-Za-z0-9][\w.-]{,95}"  # of an owner or a model on the hub


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
        directory = source_directory(str(source))
        what = f"of {str(source if directory is None else directory / 'config.json')!r}"
        source = published()[str(source)]["config"] if directory is None else config_fields(directory, "model")
        if directory is not None:
            refuse_remote_code(directory, "model")
    elif isinstance(source, type) or not (isinstance(source, Mapping) or hasattr(source, "sub_configs")):
        raise SpecError(
            "model: must be an nn.Module, a directory, a name on the hub, or a configuration of transformers or "
            f"diffusers, got {shown(source)}: load the model first"
        )
    of_diffusers = isinstance(source, Mapping) and "_class_name" in source
    try:
        return _of_diffusers(source) if of_diffusers else _of_transformers(source, directory)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        library = "diffusers" if of_diffusers else "transformers"
        raise LoadError(f"model: {library} cannot build the model {what}: {told(error)}") from error


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


def source_directory(source: str) -> Path | None:
    """The directory that holds the configuration of a model or pipeline; None: it is one of `published`.

    Raises:
        LoadError: there is no such model.
    """
    if (directory := local_directory(source)) is None:
        if source in published() and isinstance(_of_hub(source, cached=True), str):
            return None
        directory = hub_directory(source, "model")
    if (directory / "model_index.json").is_file():
        directory /= next((part for part in _PARTS if (directory / part).is_dir()), _PARTS[0])
    return directory


def hub_directory(name: str, argument: str) -> Path:
    """The directory of the hub's cache that holds a model's configuration, which is fetched where it is not there.

    Args:
        name: what a user gave for a model, and no directory here has.
        argument: what the user calls it, for the message.

    Raises:
        LoadError: it is a misspelt path or no name on the hub, or the hub has no answer in `PATIENCE` seconds.
    """
    found = source_fault(name)
    if found is None and isinstance(cached := _of_hub(name, cached=True), Path):
        return cached
    if found is None:
        answers: list[Path | str] = []
        asking = Thread(target=lambda: answers.append(_of_hub(name, cached=False)), daemon=True)
        asking.start()
        asking.join(PATIENCE)
        answer = next(iter(answers), f"no answer in {PATIENCE:g} s")
        if isinstance(answer, Path):
            return answer
        found = f"is no directory here, and as a name on the hub it cannot be read: {answer}{_like(name)}"
    raise LoadError(f"{argument}: {shown(name)} {found}: correct the path, or the name")


def source_fault(source: str) -> str | None:
    """Why what should name a model is neither a directory nor a name on the hub; None: it is one, or may be.

    Nothing is asked of the hub: a name has the form owner/model, save old ones that its cache holds.

    >>> source_fault("owner/model")
    >>> source_fault("./model")
    "is no directory here, and no name on the hub, which has the form 'owner/model'"
    """
    if local_directory(source) is not None:
        return None
    if os.path.lexists(os.path.expanduser(source)):
        return "is no directory, but a file or the like"
    if re.fullmatch(f"{_NAME}/{_NAME}", source):
        return None
    if re.fullmatch(_NAME, source) and isinstance(_of_hub(source, cached=True), Path):
        return None
    return f"is no directory here, and no name on the hub, which has the form 'owner/model'{_like(source)}"


def hub_name(source: str) -> str | None:
    """The name on the hub that a model was loaded by, from its cache too; None: it came from elsewhere.

    >>> hub_name("owner/model"), hub_name("./model"), hub_name("recipes/reference")
    ('owner/model', None, None)
    """
    if local_directory(source) is None:
        return source if re.fullmatch(f"{_NAME}/{_NAME}", source) else None
    cached = re.search(r"(?:^|/)models--([^/]+)--([^/]+)/snapshots/", source)
    return "/".join(cached.groups()) if cached else None


def _like(source: str) -> str:
    """The end of an error: the folder that a path is a misspelling of, or such a name that comes with qat."""
    owned = {full.rpartition("/")[2]: full for full in published()}  # as users call them
    named = f" (did you mean {owned[source]!r}?)" if source in owned else meant(source, published())
    return like_folder(os.path.expanduser(source)) or named


def _of_hub(name: str, *, cached: bool) -> Path | str:
    """The directory of the hub's cache that holds a model's configuration, or why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ["config.json", "model_index.json", *(f"{part}/config.json" for part in _PARTS)]
    try:
        directory = Path(snapshot_download(name, allow_patterns=files, local_files_only=cached))
    except Exception as error:  # what can be wrong with a download has no common base
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        return told(cause if isinstance(cause, Exception) else error)
    return directory if any((directory / file).is_file() for file in files[:2]) else "it has no config.json"


def config_fields(directory: Path, argument: str) -> dict[str, Any]:
    """The fields of a directory's config.json, as they stand there; no code of the directory runs for it.

    Args:
        directory: a model's.
        argument: what the user calls it, for the message.

    Raises:
        LoadError: there is no such file, it holds no mapping in JSON, or it names more layers than a model has.
    """
    path = directory / "config.json"
    try:
        if not path.exists():
            raise LoadError(f"{argument}: {str(directory)!r} has no config.json; give a model's directory")
        if not path.is_file() or path.stat().st_size > MOST_TEXT:
            raise ValueError(f"no regular file of at most {MOST_TEXT} bytes")
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{argument}: {str(path)!r} is not a model's configuration: {told(error)}") from error
    if not isinstance(fields, dict):
        raise LoadError(f"{argument}: {str(path)!r} is not a model's configuration: no mapping, got {shown(fields)}")
    if deep := [f"{key} is {value}" for key, value in depths(fields) if value > MOST_DEEP]:
        raise LoadError(f"{argument}: {str(path)!r} describes no model that can be built: {deep[0]}: correct it")
    return fields


def depths(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The numbers of a configuration that count layers, by their names: a list of so many may be made before them."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from depths(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from depths(item, key)
    elif isinstance(value, int) and re.search("layer|block|depth", key) and not re.search("size|dim|length", key):
        yield key, value


def local_directory(source: str) -> Path | None:
    """The directory that a user names, in which ~ is a home; None: there is none of that name."""
    path = os.path.expanduser(source)  # of os, to whom no name is an exception
    return Path(path) if os.path.isdir(path) else None
