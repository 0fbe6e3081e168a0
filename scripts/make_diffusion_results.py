"""Quality of the text_to_image recipe: seeds and learning rates, judged on reloaded exports at equal noise.

Runs the recipe itself, as a user would, once per type, seed and rate, and reads the results that it writes. Without
``--rates`` each type runs at the rate of its YAML file. Writes every run as JSON and Markdown tables beside it: the
loss of each arm, the share of the gap between post-training quantization and the fine-tuned float model that
quantization-aware training closes, the distance of the outputs from that model's, and the loss per timestep bin::

    python -m scripts.make_diffusion_results docs/results/diffusion --jobs 1
    python -m scripts.make_diffusion_results sweep --types int2 --seeds 1 --rates 5e-4 1e-3 2e-3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.recipe_runs import Metrics, run_recipe

TUNED, QUANTIZED, QAT = "float, fine-tuned", "fine-tuned, then quantized", "quantization-aware training"


@dataclass(frozen=True)
class Run:
    """One run of the recipe."""

    kind: str
    seed: int
    rate: float | None
    """Of quantization-aware training; none: that of the YAML file."""


def execute(run: Run, folder: Path, jobs: int, extra: Sequence[str]) -> Metrics:
    """Metrics by arm."""
    output = folder / f"{run.kind}_{run.seed}_{run.rate}"
    rate = [] if run.rate is None else ["--optimization.learning-rate", str(run.rate)]
    metrics = run_recipe("text_to_image", run.kind, run.seed, output, jobs, [*extra, *rate])
    print(run, {name: (round(m["loss"], 4), round(m["output_mse"], 4)) for name, m in metrics.items()}, flush=True)
    return metrics


def closed(metrics: Metrics) -> float:
    """The share of the gap that quantization-aware training closes."""
    tuned, quantized, trained = (metrics[name]["loss"] for name in (TUNED, QUANTIZED, QAT))
    return (quantized - trained) / (quantized - tuned)


def shown(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and, of several values, standard error."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) / len(values) ** 0.5:{form}}"


def tables(results: dict[Run, Metrics]) -> str:
    """One line a type and rate; then the loss per timestep bin."""
    lines = [
        "| type | rate | seeds | fine-tuned | then quantized | QAT, reloaded | gap closed | MSE quantized | MSE QAT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    bins = ["", "| type | rate | model | " + " | ".join(f"{n / 10:.1f}" for n in range(10)) + " |", "|---" * 13 + "|"]
    for kind, rate in dict.fromkeys((run.kind, run.rate) for run in results):
        runs = [metrics for run, metrics in results.items() if (run.kind, run.rate) == (kind, rate)]
        name = "YAML" if rate is None else f"{rate:g}"
        cells = [kind, name, str(len(runs))]
        cells += [shown([metrics[arm]["loss"] for metrics in runs]) for arm in (TUNED, QUANTIZED, QAT)]
        cells += [shown([closed(metrics) for metrics in runs], ".1%")]
        cells += [shown([metrics[arm]["output_mse"] for metrics in runs]) for arm in (QUANTIZED, QAT)]
        lines.append(f"| {' | '.join(cells)} |")
        for arm in (TUNED, QUANTIZED, QAT):
            means = [statistics.mean(metrics[arm][f"loss_bin_{n}"] for metrics in runs) for n in range(10)]
            bins.append(f"| {kind} | {name} | {arm} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    return "\n".join(["# Text to image", "", *lines, *bins]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="stem of the .json and .md to write")
    parser.add_argument("--types", nargs="+", default=["int4", "int2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[None])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--keep", type=Path, default=None, help="keep exports and pictures here")
    parser.add_argument("extra", nargs="*", help="further arguments for the recipe, after --")
    arguments = parser.parse_args()
    runs = [Run(k, s, rate) for s in range(arguments.seeds) for k in arguments.types for rate in arguments.rates]
    results: dict[Run, Metrics] = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)

        def execute_all(chosen: list[Run]) -> None:
            found = pool.map(lambda run: execute(run, folder, arguments.jobs, arguments.extra), chosen)
            results.update(zip(chosen, found, strict=True))

        execute_all(runs[:1])  # fills the data cache before runs go in parallel
        execute_all(runs[1:])
    record: dict[str, Any] = {
        "extra": arguments.extra,
        "runs": [asdict(run) | {"metrics": metrics} for run, metrics in results.items()],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
