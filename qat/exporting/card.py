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
from typing import Any

from qat.errors import ExportError
from qat.evidence import FrozenRecord
from qat.exporting.manifest import QMAP_NAME, Manifest
from qat.targets import loses_bias_on_cuda

__all__ = ["CARD_NAME", "add_section", "write_card"]

CARD_NAME = "README.md"
_MOST_NAMES = 6
_LIBRARY = {"diffusers": "diffusers", "transformers": "transformers", "quanto": "optimum-quanto"}


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


def write_card(directory: Path, manifest: Manifest, record: FrozenRecord) -> Path:
    """Write the model card of an export, from what it and freezing say about themselves, and return its path."""
    kinds = sorted({layer.weights for layer in record.layers.values()})
    module, _, name = manifest.model_class.rpartition(".")
    library = _LIBRARY.get(manifest.target, manifest.target)
    parts = [
        "\n".join(["---", f"library_name: {library}", "tags:", "- qat", "- quanto", *(f"- {k}" for k in kinds), "---"]),
        f"# {name} with {' and '.join(kinds)} weights",
        _description(manifest, record, kinds),
        "## Load it",
        "`directory` is this one.",
        *_loading(manifest, module, name),
        *_biases_on_cuda(manifest, record),
        "## Layers left float",
        *_left_float(record),
    ]
    if manifest.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in manifest.notes)]
    path = directory / CARD_NAME
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _description(manifest: Manifest, record: FrozenRecord, kinds: list[str]) -> str:
    form = (
        "as float32 numbers on the quantization grid, which a stock load quantizes back into the same codes"
        if manifest.float_grid
        else "in optimum-quanto's format"
    )
    activations = record.spec.activation_type
    inputs = f" Inputs and outputs of these layers are quantized to {activations} too." if activations else ""
    return (
        f"{len(record.layers)} linear layers hold {' and '.join(kinds)} weights, {form}. They were frozen from a model "
        f"with fake quantization (`qat` {manifest.environment.qat}, algorithm `{record.algorithm}`) and are served in "
        f"**{manifest.dtype}**.{inputs} `qat verify` on this directory checks that it holds, and loads as, what was "
        "frozen."
    )


def _biases_on_cuda(manifest: Manifest, record: FrozenRecord) -> list[str]:
    losing = [
        name
        for name, layer in record.layers.items()
        if f"{name}.bias" in manifest.tensors
        and loses_bias_on_cuda(layer.weights, layer.activations, manifest.dtype, layer.shape)
    ]
    if not losing:
        return []
    code = [
        "from optimum.quanto import qfloat8_e4m3fn",
        "",
        "for module in model.modules():",
        '    if hasattr(module, "weight_qtype"):',
        "        module.weight.activation_qtype = qfloat8_e4m3fn  # rules that kernel out",
        'model.to("cuda")',
    ]
    text = (
        "optimum-quanto 0.2.7 multiplies float8 weights by a kernel that **leaves out the bias** "
        f"({len(losing)} layers here) on GPUs of compute capability 8.0 or later. `qat.load` goes round it. Loaded "
        "otherwise, mark the weights before the model goes to the GPU:"
    )
    return ["## On a CUDA GPU", text, _python(code)]


def _loading(manifest: Manifest, module: str, name: str) -> list[str]:
    dtype, package = f"torch.{manifest.dtype}", module.partition(".")[0]
    importing = package if package in ("diffusers", "transformers") else module
    if manifest.target == "diffusers":
        return _loading_diffusers(manifest, importing, name, dtype)
    if manifest.target == "transformers" and manifest.float_grid:
        code = [
            "import torch",
            f"from {importing} import {name}",
            "from transformers import QuantoConfig",
            "",
            f"quantization = QuantoConfig({_arguments(manifest)})",
            f"model = {name}.from_pretrained(directory, dtype={dtype}, quantization_config=quantization)",
        ]
        return [_python(code), "No package but transformers and optimum-quanto is needed."]
    if manifest.target == "transformers":
        code = [
            "import torch",
            f"from {importing} import {name}",
            "import qat.integrations.transformers  # stock transformers cannot read packed weights",
            "",
            f"model = {name}.from_pretrained(directory, dtype={dtype})",
        ]
        return [_python(code)]
    code = ["import qat", ""]
    if any("no config.json" in note for note in manifest.notes):
        code.append("model = qat.load(directory, model=float_model)  # the float model, to be filled")
    else:
        code.append("model = qat.load(directory)")
    text = f"Without `qat`: `optimum.quanto.requantize` with `{QMAP_NAME}` fills a float model built on the CPU."
    return [_python(code), text]


def _loading_diffusers(manifest: Manifest, importing: str, name: str, dtype: str) -> list[str]:
    code = ["import torch", f"from {importing} import {name}"]
    if manifest.float_grid:
        code += [
            "from diffusers import QuantoConfig",
            "",
            f"quantization = QuantoConfig({_arguments(manifest)})",
            f"model = {name}.from_pretrained(directory, torch_dtype={dtype}, quantization_config=quantization)",
        ]
        text = "Without `quantization_config` the same file loads as a float model that computes the same."
        return [_python(code), text]
    code += ["", f"model = {name}.from_pretrained(directory, torch_dtype={dtype})"]
    text = (
        "Stock diffusers with optimum-quanto and accelerate, no other package. "
        f"**Give `torch_dtype={dtype}`:** it is the dtype that the model was trained to be served in, and without one "
        "diffusers loads float32, which keeps the codes but widens scales, so that outputs are no longer those of "
        "training."
        if manifest.dtype != "float32"
        else "Stock diffusers with optimum-quanto and accelerate, no other package. Any other `torch_dtype` keeps the "
        "codes but rounds scales, so that outputs are no longer those of training."
    )
    use = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained(base_model, transformer=model, torch_dtype={dtype})",
    ]
    moved = (
        'In a pipeline, whose other parts need the same dtype; `pipeline.to("cuda")` moves them all. Where something '
        "takes the model to be on the meta device, as stock diffusers says of it until it is moved, "
        '`model.to("cpu")` helps; '
        "int4 in groups of 128 then goes over to another kernel, whose last bits differ."
    )
    return [_python(code), text, moved, _python(use)]


def _arguments(manifest: Manifest) -> str:
    arguments: dict[str, Any] = manifest.stock_arguments or {}
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


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
