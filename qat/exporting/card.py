"""`README.md`: the model card of an export, for the people who find the directory.

It says what the weights are, in which dtype they are served, how they are loaded, and which linear layers stayed
float and why. People edit the card and add pictures, so the manifest keeps no hash of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from yaml import YAMLError

from qat.errors import listed
from qat.files.evidence import FrozenRecord
from qat.files.manifest import CARD_NAME, Manifest
from qat.hosts import HOSTS, MODULE, get_target, host_of
from qat.hosts.configurations import hub_name, local_directory

__all__ = ["CARD_NAME", "write_card"]


def write_card(directory: Path, manifest: Manifest, model: nn.Module) -> Path:
    """Write the card of a model's export, from what the three say about themselves, and return its path."""
    record, target = manifest.frozen, get_target(manifest.target)
    types = sorted({layer.weights for layer in record.layers.values()})
    active = record.spec.activation_type
    module, _, name = manifest.model_class.rpartition(".")
    package = module.partition(".")[0]
    importing = package if any(host.name == package for host in HOSTS) else module
    library = target.format.library if target.host is MODULE else target.host.name
    layers = [
        (target.format.recorded(record, layer), kept.shape, f"{layer}.bias" in manifest.tensors)
        for layer, kept in record.layers.items()
    ]
    tags = ("qat", *target.format.tags, *types)
    parts = [
        f"---\n{_metadata(model, library, tags)}\n---",
        f"# {name} with {' and '.join(types)} weights" + (f" and {active} activations" if active else ""),
        _description(manifest, types, target.format.library),
        "## Load it",
        "`directory` is this one.",
        *target.host.card(manifest, importing, name, target.format),
        *(part for notice in target.format.notices(layers) for part in (f"## {notice.title}", notice.text)),
        "## Layers left float",
        *_left_float(record),
    ]
    if manifest.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in manifest.notes)]
    path = directory / CARD_NAME
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _metadata(model: nn.Module, library: str, tags: Iterable[str]) -> str:
    """YAML as the Hugging Face Hub reads it; the source is named where it has a name there, no path of this machine.

    https://huggingface.co/docs/hub/model-cards
    """
    from huggingface_hub import ModelCardData

    source = host_of(model).source(model) or ""
    found: dict[str, Any] = {"pipeline_tag": host_of(model).task(type(model)), **_license(source)}
    if name := hub_name(source):
        found |= {"base_model": name, "base_model_relation": "quantized"}
    return str(ModelCardData(library_name=library, tags=list(tags), **found).to_yaml())


def _license(source: str) -> dict[str, Any]:
    """What the card of a source on this machine says of it."""
    from huggingface_hub import ModelCard

    directory = local_directory(source) if source else None
    if directory is None or not (directory / CARD_NAME).is_file():
        return {}
    try:
        said = ModelCard.load(directory / CARD_NAME, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):  # others write their cards as they like
        return {}
    return {key: said[key] for key in ("license", "license_name", "license_link") if key in said}


def _description(manifest: Manifest, types: list[str], library: str) -> str:
    form = (
        "as float32 numbers on the quantization grid, which a stock load quantizes back into the same codes"
        if manifest.float_grid
        else f"in the format of {library}"
    )
    record = manifest.frozen
    activations = record.spec.activation_type
    active = sum(layer.activations is not None for layer in record.layers.values())
    sides = "inputs and outputs" if record.spec.outputs else "inputs"
    inputs = f" The {sides} of {active} of them are quantized to {activations} too." if activations else ""
    return (
        f"{len(record.layers)} linear layers hold {' and '.join(types)} weights, {form}. They were frozen from a model "
        f"with fake quantization (`qat` {manifest.environment.qat}, algorithm `{record.algorithm}`) and are served in "
        f"**{manifest.dtype}**.{inputs} `qat verify` on this directory checks that it holds, and loads as, what was "
        "frozen."
    )


def _left_float(record: FrozenRecord) -> list[str]:
    """A table with one line for each reason; numbered blocks are one name."""
    if not record.left_float:
        return ["None: every linear layer is quantized."]
    families: dict[str, Counter[str]] = defaultdict(Counter)
    for name, reason in record.left_float.items():
        families[reason][re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)] += 1
    lines = ["| layers | reason |", "|---|---|"]
    for reason, names in families.items():
        shown = [f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in names.items()]
        lines.append(f"| {listed(shown, 6)} | {reason.replace('|', '/')} |")
    return ["\n".join(lines)]
