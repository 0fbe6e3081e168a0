"""The tables of docs/loaders.md, from the marks ``loads`` of the tests that prove their rows.

A mark has the fields of `Row`. It stands on a test that loads an export with the loader, and compares what it holds
with what was frozen, bit for bit. The tests are imported and not run::

    python -m scripts.loaders_table
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import qat
from qat.hosts import TARGETS, Target

PAGE = Path(__file__).parents[1] / "docs" / "loaders.md"
TESTS = Path(__file__).parents[1] / "tests"
BEGIN, END = "<!-- by .venv/bin/python -m scripts.loaders_table -->\n", "<!-- end -->\n"
COLUMNS = ("loader", "layers", "weights", "activations", "it holds", "equal to the bit", "proven by")
NONE, SAME, CODES, FLOATS = "none", "same", "codes", "equal floats"
LAYERS = ("Linear", "LoRA", "Conv1D", "experts", "embedding", "Conv2d")
LOADERS = {  # the calls that users make, by the names in the marks
    "plug-in for transformers": "`import qat.integrations.transformers`; `AutoModel*.from_pretrained(directory)`",
    "QuantizedModelForCausalLM": "`optimum.quanto.QuantizedModelForCausalLM.from_pretrained(directory)`",
    "requantize": "`optimum.quanto.requantize(float_model, tensors, quantization_map)`",
    "stock diffusers": "stock `AutoModel.from_pretrained(directory, dtype=...)` of diffusers below 1.0",
    "plug-in for diffusers": "`import qat.integrations.diffusers`; `AutoModel.from_pretrained(directory, dtype=...)`",
    "plug-in for diffusers, single file": "`import qat.integrations.diffusers`; "
    "`cls.from_single_file(file, config=directory, quantization_config=QuantoConfig(...), dtype=...)`",
    "QuantoConfig": "stock `AutoModel*.from_pretrained(directory, quantization_config=QuantoConfig(...))`, "
    "if exported with `float_grid=True`",
    "stock transformers": "stock `AutoModel*.from_pretrained(directory, dtype=...)`",
    "CompressedTensorsConfig": "stock `AutoModel*.from_pretrained(directory, "
    "quantization_config=CompressedTensorsConfig(dequantize=True), dtype=...)`",
    "gguf_file": "stock `AutoModelForCausalLM.from_pretrained(directory, gguf_file=..., config=..., dtype=...)`",
    "GGUFQuantizationConfig": "stock `cls.from_single_file(file, config=directory, "
    "quantization_config=GGUFQuantizationConfig(compute_dtype=...), dtype=...)`",
    "qat.load": "`qat.load(directory)`",
    "qat.load, model": "`qat.load(directory, model=float_model)`",
}
HOLDS = {"stock transformers": "codes until the first forward", "CompressedTensorsConfig": FLOATS, "gguf_file": FLOATS}


@dataclass(frozen=True)
class Row:
    """What one test proves of one loader."""

    target: str
    loader: str
    weights: Sequence[str]
    activations: Sequence[str] = (NONE,)
    """`SAME`: those of a layer have the type of its weights."""
    layers: Sequence[str] = ("Linear",)
    mixed: bool = False
    """The types stand in one model."""
    holds: str = ""
    equal: str = ""

    def cells(self, types: Sequence[str]) -> list[str]:
        weights = "all" if set(self.weights) == set(types) else ", ".join(self.weights)
        activations = "as the weights" if self.activations == SAME else ", ".join(self.activations)
        holds = self.holds or HOLDS.get(self.loader, CODES)
        equal = self.equal or ("values, outputs" if holds == FLOATS else "codes, values, outputs")
        return [", ".join(self.layers), weights + ", mixed" * self.mixed, activations, holds, equal]


def rows() -> Iterator[tuple[Row, Any]]:
    """Each row, with the function that is its test."""
    for path in sorted(TESTS.glob("test_*.py")):
        if "pytest.mark.loads(" in path.read_text(encoding="utf-8"):
            module = import_module(f"tests.{path.stem}")
            classes = [kind for kind in vars(module).values() if inspect.isclass(kind)]
            for test in (found for owner in (module, *classes) for found in vars(owner).values()):
                if inspect.isfunction(test) and test.__module__ == module.__name__:
                    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "loads"]
                    yield from ((Row(*mark.args, **mark.kwargs), test) for mark in reversed(marks))


def types_of(target: Target) -> tuple[list[str], list[str]]:
    """The names of a target's types of weights, each once, and of activations."""
    specs = {name: {"weights": name, "activations": name} for name in target.format.activation_qtypes}
    active = [name for name in specs if not target.spec_faults(qat.QuantSpec.model_validate(specs[name]))]
    return list(dict.fromkeys(qtype.name for qtype in target.format.qtypes.values())), active


def tables() -> str:
    """What stands between the two comments of the page: a table for each target."""
    found, order, text = list(rows()), list(LOADERS), ""
    for target in TARGETS.values():
        weights, activations = types_of(target)
        types = f"Weights: {', '.join(weights)}. Activations: {', '.join(activations) or NONE}."
        text += f"\n### Target `{target.name}`\n\n{textwrap.fill(types, 120)}\n\n| {' | '.join(COLUMNS)} |\n"
        text += "|---" * len(COLUMNS) + "|\n"
        own, last = [pair for pair in found if pair[0].target == target.name], ""
        for row, test in sorted(own, key=lambda pair: (order.index(pair[0].loader), LAYERS.index(pair[0].layers[-1]))):
            file = f"{test.__module__.rpartition('.')[2]}.py"
            link = f"[{file}::{test.__qualname__.replace('.', '::')}](../tests/{file})"
            call = "" if row.loader == last else LOADERS[row.loader]
            text, last = f"{text}| {' | '.join([call, *row.cells(weights), link])} |\n", row.loader
    return text + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
