"""`README.md`: the model card of an export, for the people who find the directory.

It says what the weights are, in which dtype they are served, how they are loaded, and which linear layers stayed
float and why. A recipe adds sections of its own (results, pictures) with `add_section`. The card and its pictures are
what a person edits afterwards, so they are not among the files whose hashes the manifest keeps and `qat.verify` checks.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from qat.errors import ExportError
from qat.files.evidence import FrozenRecord
from qat.files.manifest import Manifest
from qat.hosts import HOSTS, Target

__all__ = ["CARD_NAME", "add_section", "write_card"]

CARD_NAME = "README.md"
_MOST_NAMES = 6


def add_section(
    directory: str | PathLike[str],
    title: str,
    text: str,
    pictures: Mapping[str, str | PathLike[str]] | None = None,
) -> None:
    """Append a section to the model card of an export, and copy its pictures beside the card.

    Args:
        directory: what `qat.export` wrote.
        title: the section's heading, one line.
        text: Markdown.
        pictures: what each shows (the text that stands for it), and its PNG file.

    Raises:
        ExportError: the directory has no model card, the title is not one line, or a picture is no PNG file.

    >>> import tempfile, qat
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int8")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = qat.export(model, folder)
    ...     add_section(folder, "Results", "Loss 0.25.")
    ...     print((Path(folder) / "README.md").read_text()[-23:])
    ## Results
    <BLANKLINE>
    Loss 0.25.
    """
    folder = Path(directory)
    card = folder / CARD_NAME
    if not card.is_file():
        raise ExportError(
            f"directory: {str(folder)!r} has no {CARD_NAME} to add a section to: give a directory that qat.export wrote"
        )
    if not title.strip() or "\n" in title:
        raise ExportError(f"title: must be one line of text, got {title!r}: put more into text")
    files = {shown: Path(path) for shown, path in (pictures or {}).items()}
    for shown, path in files.items():
        if path.suffix.lower() != ".png" or not path.is_file():
            raise ExportError(f"pictures: {shown!r} must be a PNG file, got {str(path)!r}: save it as one first")
    lines = [f"## {title.strip()}", text.strip()]
    for shown, path in files.items():
        if path.parent.resolve() != folder.resolve():
            shutil.copyfile(path, folder / path.name)
        lines.append(f"![{shown}]({path.name.replace(' ', '%20')})")
    written = card.read_text(encoding="utf-8").rstrip()
    card.write_text("\n\n".join([written, *filter(None, lines)]) + "\n", encoding="utf-8")


def write_card(directory: Path, manifest: Manifest, record: FrozenRecord, target: Target) -> Path:
    """Write the model card of an export, from what it and freezing say about themselves, and return its path."""
    types = sorted({layer.weights for layer in record.layers.values()})
    module, _, name = manifest.model_class.rpartition(".")
    package = module.partition(".")[0]
    importing = package if any(host.name == package for host in HOSTS) else module
    library, loading = target.host.card(manifest, importing, name, target.format)
    layers = [
        (target.format.recorded(record, layer), kept.shape, f"{layer}.bias" in manifest.tensors)
        for layer, kept in record.layers.items()
    ]
    tags = ("qat", *target.format.tags, *types)
    parts = [
        "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"]),
        f"# {name} with {' and '.join(types)} weights",
        _description(manifest, record, types, target.format.library),
        "## Load it",
        "`directory` is this one.",
        *loading,
        *(part for title, text in target.format.card_sections(layers) for part in (f"## {title}", text)),
        "## Layers left float",
        *_left_float(record),
    ]
    if manifest.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in manifest.notes)]
    path = directory / CARD_NAME
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _description(manifest: Manifest, record: FrozenRecord, types: list[str], library: str) -> str:
    form = (
        "as float32 numbers on the quantization grid, which a stock load quantizes back into the same codes"
        if manifest.float_grid
        else f"in {library}'s format"
    )
    activations = record.spec.activation_type
    inputs = f" Inputs and outputs of these layers are quantized to {activations} too." if activations else ""
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
    families: dict[str, dict[str, int]] = defaultdict(dict)
    for name, reason in record.left_float.items():
        family = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
        families[reason][family] = families[reason].get(family, 0) + 1
    lines = ["| layers | reason |", "|---|---|"]
    for reason, names in families.items():
        shown = [f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in names.items()][:_MOST_NAMES]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        lines.append(f"| {', '.join(shown)}{more} | {reason.replace('|', '/')} |")
    return ["\n".join(lines)]
