"""`README.md`: the model card of an export, for the people who find the directory.

It says what the weights are, in which dtype they are served, how they are loaded, and which linear layers stayed
float and why. People edit the card and add pictures, so the manifest keeps no hash of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from qat.errors import listed
from qat.files.evidence import FrozenRecord
from qat.files.manifest import CARD_NAME, Manifest
from qat.hosts import HOSTS, MODULE, get_target

__all__ = ["CARD_NAME", "write_card"]


def write_card(directory: Path, manifest: Manifest) -> Path:
    """Write the model card of an export, from what it and freezing say about themselves, and return its path."""
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
        "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"]),
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
