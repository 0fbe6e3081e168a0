"""Which transformers architectures survive the whole line to compressed-tensors, and what of each is quantized.

The tiny random models of `tests.architectures` meet each case below: prepare, two optimizer steps, freeze, export,
verify with the live model (the stock loader's codes, values and outputs bit for bit), a stock ``from_pretrained`` that
may invent or drop no tensor, and `qat.load`. Writes ``compressed_tensors.md`` and ``compressed_tensors.json``; a run of
some classes replaces their rows and keeps the rest::

    python -m scripts.compressed_tensors_matrix [--only Llama Bert] [--jobs 2] [--output docs/results]

With ``--by-rules`` the classes are all others that `tests.tiny_transformers` makes models of; name some: ``--only``.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import qat
from qat.errors import SpecError, TargetError
from scripts._architecture_course import Course, Outcome, chosen, outcomes_of, parser
from scripts._architecture_table import Row, faults, wrapped
from scripts.architecture_matrix import output_faults, outputs_of, train
from scripts.json_workers import Ask, serve
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


def run_case(architecture: Architecture | TinyTransformer, case: str, directory: Path) -> Outcome:
    """Take one tiny model through the whole line; raises whatever the library or the model raises after prepare."""
    spec = qat.QuantSpec(**CASES[case])
    outcome = Outcome(case, "equal", torch=version("torch").partition("+")[0])
    example = architecture.example(spec.torch_dtype)
    try:
        model, report = train(architecture, spec, TARGET)
    except (SpecError, TargetError) as error:
        if isinstance(error, SpecError) and "no layer of the model would be quantized" not in str(error):
            raise
        outcome.result, outcome.detail = "float" if isinstance(error, SpecError) else "refused", str(error)
        return outcome
    outcome.share, outcome.left_float = report.quantized_share, report.left_float
    qat.freeze(model, allow_unreached=True)
    frozen = outputs_of(model, example)
    qat.export(model, directory, example_inputs=example)
    qat.verify(directory, reference=model)
    kind: Any = type(model)
    stock, info = kind.from_pretrained(
        directory, dtype=spec.torch_dtype, output_loading_info=True, trust_remote_code=False
    )
    found = [f"from_pretrained reports {key}: {sorted(names)}" for key, names in info.items() if names]
    found += output_faults(frozen, outputs_of(stock, example))
    loaded = qat.load(directory)
    for parameter in loaded.parameters():  # torch.matmul folds batches, or not, by whether a weight has a gradient
        parameter.requires_grad_(parameter.is_floating_point())
    found += [f"qat.load: {fault}" for fault in output_faults(frozen, outputs_of(loaded, example))]
    if found:
        outcome.result, outcome.detail = "difference", found[0]
    return outcome


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One case of one class."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        case = list(CASES)[request["case"]]
        name = request["name"]
        model = ARCHITECTURES.get(name) or tiny_transformers()[name]
        return asdict(run_case(model, case, Path("out")))


def run_architecture(name: str, ask: Ask) -> Row:
    """All cases of one class."""
    return Row.of("by hand" if name in ARCHITECTURES else "by rules", outcomes_of(name, list(CASES), ask))


def table(rows: Mapping[str, Row]) -> str:
    """The results as Markdown; columns are the cases that ran."""
    counts = Counter(outcome["result"] for row in rows.values() for outcome in row.outcomes)
    cases = list(dict.fromkeys(outcome["case"] for row in rows.values() for outcome in row.outcomes))
    whole = sum(all(outcome["result"] == "equal" for outcome in row.outcomes) for row in rows.values())
    torches = Counter(next((o["torch"] for o in row.outcomes if o["torch"]), "unknown") for row in rows.values())
    lines = [
        "# Architectures with target `compressed-tensors`",
        "",
        f"`{COMMAND}`",
        "",
        f"Tiny random models of {len(rows)} classes: transformers {version('transformers')}, compressed-tensors "
        f"{version('compressed-tensors')}, on a CPU, with torch "
        + ", ".join(f"{torch} ({count} classes)" for torch, count in torches.items())
        + ". *equal*: `qat.verify` holds, stock `from_pretrained` and `qat.load` give the frozen model's outputs, bit "
        "for bit, and no tensor was invented or dropped. *float*: no layer can be quantized, as where the group "
        "divides no row. *refused*: `qat.prepare` says why. The share is that of all parameters, the largest over the "
        "cases.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + f", of {counts.total()} cases. "
        f"{whole} classes are equal in all.",
        "",
        f"| class | share | {' | '.join(cases)} |",
        f"|---|---|{'---|' * len(cases)}",
    ]
    for name, row in rows.items():
        found = {outcome["case"]: outcome["result"] for outcome in row.outcomes}
        cells = " | ".join(found.get(case, "–") for case in cases)
        lines.append(f"| {name} | {row.largest('share'):.0%} | {cells} |")
    lines += ["", "## What is not equal", "", *(faults(rows, ("equal", "float")) or ["None."])]
    return "".join(f"{line if line.startswith('|') else wrapped(line)}\n" for line in lines)


COMMAND = ".venv/bin/python -m scripts.compressed_tensors_matrix"
COURSE = Course("scripts.compressed_tensors_matrix", "compressed_tensors", table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--by-rules", action="store_true", help="all other classes, by models that rules make")
    arguments = options.parse_args()
    if arguments.work:
        serve(answer)
        return
    others = [name for name in tiny_transformers() if name not in (*ARCHITECTURES, *LEFT_OUT)]
    names = chosen(others if arguments.by_rules else list(ARCHITECTURES), arguments)
    COURSE.write(COURSE.run(names, arguments.jobs, run_architecture), [*ARCHITECTURES, *others], arguments.output)


if __name__ == "__main__":
    main()
