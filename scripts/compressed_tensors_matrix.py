"""Which transformers architectures survive the whole line to compressed-tensors, and what of each is quantized.

The tiny random models of `tests.architectures` meet each case below: prepare, two optimizer steps, freeze, export,
verify with the live model (the stock loader's codes, values and outputs bit for bit), a stock ``from_pretrained`` that
may invent or drop no tensor, and `qat.load`. Writes ``compressed_tensors.md``::

    python -m scripts.compressed_tensors_matrix [--only Llama Bert] [--output docs/results]

With ``--by-rules``, the models of `tests.tiny_transformers` in their place: one for each model type and task.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

import qat
from qat.errors import SpecError, TargetError
from scripts.architecture_matrix import output_faults, outputs_of, train
from tests.architectures import ARCHITECTURES, Architecture
from tests.tiny_transformers import LEFT_OUT, TinyTransformer, tiny_transformers

CASES: dict[str, dict[str, Any]] = {
    "int8 bfloat16": {"weights": "int8"},
    "float8 float32": {"weights": "float8", "dtype": "float32"},
    "int4_g32 bfloat16": {"weights": "int4_g32"},
    "int2_g32 float32": {"weights": "int2_g32", "dtype": "float32"},
    "int4_g32_zp bfloat16": {"weights": "int4_g32_zp"},
    "int8 W8A8 bfloat16": {"weights": "int8", "activations": "int8"},
    "float8 W8A8 float32": {"weights": "float8", "activations": "float8", "dtype": "float32"},
}
TARGET = "compressed-tensors"


def run_case(architecture: Architecture | TinyTransformer, spec: qat.QuantSpec, directory: Path) -> tuple[str, float]:
    """How one case went, and the share of all parameters that is quantized."""
    example = architecture.example(spec.torch_dtype)
    model, report = train(architecture, spec, TARGET)
    qat.freeze(model, allow_unreached=True)
    frozen = outputs_of(model, example)
    qat.export(model, directory, example_inputs=example)
    qat.verify(directory, reference=model)
    kind: Any = type(model)
    stock, info = kind.from_pretrained(
        directory, dtype=spec.torch_dtype, output_loading_info=True, trust_remote_code=False
    )
    strays = {key: sorted(names) for key, names in info.items() if names}
    if strays:
        return f"strays: {strays}", report.quantized_share
    faults = output_faults(frozen, outputs_of(stock, example))
    loaded = qat.load(directory)
    for parameter in loaded.parameters():  # torch.matmul folds batches, or not, by whether a weight has a gradient
        parameter.requires_grad_(parameter.is_floating_point())
    faults += [f"qat.load: {fault}" for fault in output_faults(frozen, outputs_of(loaded, example))]
    return faults[0] if faults else "equal", report.quantized_share


def run(architecture: Architecture | TinyTransformer, cases: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Some cases of one architecture."""
    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[case] = run_case(architecture, qat.QuantSpec(**CASES[case]), Path(folder) / "out")
            except SpecError as error:
                none = "no layer of the model would be quantized" in str(error)
                found[case] = ("float" if none else f"SpecError: {error}", 0.0)
            except TargetError as error:
                found[case] = (f"refused: {error}", 0.0)
            except Exception as error:  # whatever a model, or a loader, raises is a result
                found[case] = (f"{type(error).__name__}: {error}", 0.0)
    return found


def table(results: Mapping[str, Mapping[str, tuple[str, float]]]) -> str:
    """The results as Markdown."""
    every = [result for row in results.values() for result, _ in row.values()]
    whole = sum(all(result == "equal" for result, _ in row.values()) for row in results.values())
    lines = [
        "# Architectures with target `compressed-tensors`",
        "",
        "`python -m scripts.compressed_tensors_matrix`",
        "",
        f"Tiny random models of {len(results)} classes: transformers {version('transformers')}, compressed-tensors "
        f"{version('compressed-tensors')}, torch {version('torch')} on a CPU.",
        "**equal**: `qat.verify` holds, stock `from_pretrained` and `qat.load` give the frozen model's outputs, bit",
        "for bit, and no tensor was invented or dropped. **float**: no layer can be quantized, as where the group",
        "divides no row. **refused**: `qat.prepare` says why. The share is that of all parameters, with int8.",
        f"Of {len(every)} cases {every.count('equal')} are equal and {every.count('float')} float. {whole} classes are",
        "equal in all.",
        "",
        f"| class | share | {' | '.join(CASES)} |",
        f"|---|---|{'---|' * len(CASES)}",
    ]
    notes: dict[str, list[str]] = {}
    known = ("equal", "float", "refused")
    for name, row in results.items():
        cells = [r.split(":")[0] if r.split(":")[0] in known else "**fails**" for r, _ in row.values()]
        lines.append(f"| {name} | {row['int8 bfloat16'][1]:.0%} | {' | '.join(cells)} |")
        for case, (result, _) in row.items():
            if result not in ("equal", "float"):
                notes.setdefault(f"{name}: {' '.join(result.split())[:300]}", []).append(case)
    told = [
        line
        for note, cases in notes.items()
        for line in wrap(f"- {note} ({len(cases)} cases)", 118, subsequent_indent="  ")
    ]
    return "\n".join([*lines, "", *(["## What is not equal", "", *told, ""] if told else [])]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of class names; default all")
    parser.add_argument("--by-rules", action="store_true", help="models made by rules, of every class of transformers")
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of cases' names; default all")
    parser.add_argument("--output", type=Path, default=None, help="a folder; default: print only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {}
    known: Mapping[str, Architecture | TinyTransformer] = tiny_transformers() if arguments.by_rules else ARCHITECTURES
    for name, architecture in known.items():
        if name not in LEFT_OUT and any(word.lower() in name.lower() for word in arguments.only):
            results[name] = run(architecture, [case for case in CASES if any(word in case for word in arguments.cases)])
            print(f"{name:40}", *(result[:200] for result, _ in results[name].values()), flush=True)
    if arguments.output is not None:
        (arguments.output / "compressed_tensors.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
