"""Quality of the causal_lm recipe: learning-rate sweep, three seeds, judged on reloaded exports.

Runs the recipe itself, as a user would, once per type, seed and learning rate, and reads the results that it writes.
Seed 0 sweeps the rates of both arms (float fine-tuning and quantization-aware training, each its own); the other seeds
run at the best. All arms of a seed see the same batches in the same order. Writes a JSON file with every run, and a
Markdown table with paired differences over the seeds::

    python -m scripts.make_quality_results docs/results/quality --jobs 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.recipe_runs import run_recipe

FLOAT_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
QAT_RATES = {
    "int8": FLOAT_RATES,
    "float8": FLOAT_RATES,
    "int4": (1e-5, 2e-5, 5e-5, 1e-4),
    "int2": (2e-4, 5e-4, 1e-3, 2e-3),
    "int8_int8": FLOAT_RATES,
}
FLOAT, TUNED, QUANTIZED, QAT = "float", "float, fine-tuned", "fine-tuned, then quantized", "quantization-aware training"


@dataclass(frozen=True)
class Run:
    """One run of the recipe."""

    kind: str
    seed: int
    float_rate: float
    qat_rate: float


def execute(run: Run, folder: Path, blocks: int, jobs: int, extra: list[str]) -> dict[str, float]:
    """Losses by arm."""
    output = folder / f"{run.kind}_{run.seed}_{run.float_rate}_{run.qat_rate}"
    options = [
        *("--data.evaluation-blocks", str(blocks)),
        *("--optimization.float-learning-rate", str(run.float_rate)),
        *("--optimization.learning-rate", str(run.qat_rate)),
        *extra,
    ]
    metrics = run_recipe("causal_lm", run.kind, run.seed, output, jobs, options)
    losses = {name: values["loss"] for name, values in metrics.items()}
    print(run, {name: round(loss, 4) for name, loss in losses.items()}, flush=True)
    return losses


def paired(differences: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error."""
    values = list(differences)
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="stem of the .json and .md to write")
    parser.add_argument("--types", nargs="+", default=list(QAT_RATES), choices=list(QAT_RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=512, help="evaluation blocks of 256 tokens")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="no sweep: fine-tuning's learning rate, then one for each of --types"
    )
    parser.add_argument("extra", nargs="*", help="further arguments for the recipe, after --")
    arguments = parser.parse_args()

    results: dict[Run, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:

        def execute_all(runs: list[Run]) -> None:
            folder = Path(name)
            results.update(
                zip(
                    runs,
                    pool.map(lambda r: execute(r, folder, arguments.blocks, arguments.jobs, arguments.extra), runs),
                    strict=True,
                )
            )

        if arguments.rates:
            float_rate, best = arguments.rates[0], dict(zip(arguments.types, arguments.rates[1:], strict=True))
        else:
            sweep = [
                Run(kind, 0, float_rate, qat_rate)
                for kind in arguments.types
                for float_rate, qat_rate in zip(FLOAT_RATES, QAT_RATES[kind], strict=True)
            ]
            execute_all(sweep[:1])  # fills the data cache before runs go in parallel
            execute_all(sweep[1:])
            float_rate = min(sweep, key=lambda run: results[run][TUNED]).float_rate
            best = {
                kind: min((r for r in sweep if r.kind == kind), key=lambda r: results[r][QAT]).qat_rate
                for kind in arguments.types
            }
        chosen = [Run(k, s, float_rate, best[k]) for s in range(arguments.seeds) for k in arguments.types]
        done = {(r.kind, r.seed) for r in results}
        execute_all([run for run in chosen if (run.kind, run.seed) not in done])

    lines = [
        "| type | QAT rate | float | fine-tuned | then quantized | QAT, reloaded | quantized - QAT | QAT - tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in arguments.types:
        baseline = [
            next(v for r, v in results.items() if (r.kind, r.seed, r.float_rate) == (kind, s, float_rate))
            for s in range(arguments.seeds)
        ]
        trained = [
            next(v for r, v in results.items() if (r.kind, r.seed, r.qat_rate) == (kind, s, best[kind]))
            for s in range(arguments.seeds)
        ]
        gain = paired(b[QUANTIZED] - t[QAT] for b, t in zip(baseline, trained, strict=True))
        gap = paired(t[QAT] - b[TUNED] for b, t in zip(baseline, trained, strict=True))
        means = [
            statistics.mean(row[n] for row in rows)
            for rows, n in ((baseline, FLOAT), (baseline, TUNED), (baseline, QUANTIZED), (trained, QAT))
        ]
        cells = [kind, f"{best[kind]:g}", *(f"{mean:.4f}" for mean in means)]
        cells += [f"{value:+.4f} ± {error:.4f}" for value, error in (gain, gap)]
        lines.append(f"| {' | '.join(cells)} |")
    record = {
        "float_learning_rate": float_rate,
        "blocks": arguments.blocks,
        "runs": [asdict(run) | {"loss": losses} for run, losses in results.items()],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    table = (
        "\n".join(lines) + f"\n\nFine-tuning's best learning rate: {float_rate:g}. ± is the paired standard error.\n"
    )
    arguments.output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
