"""A recipe's YAML files as a user runs them, over several seeds: means of all metrics, and how far QAT is from float.

All models of one seed see the same batches in the same order. Quantized models are judged as reloaded. The last column
is the paired difference to the fine-tuned float model, in the recipe's first metric, with its standard error::

    python -m scripts.recipe_table image_classification --kinds int8_int8 float8_float8 --output digits.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro

from scripts.recipe_runs import Metrics, run_recipe

TUNED = "float, fine-tuned"


def main(
    recipe: tyro.conf.Positional[str],
    kinds: tuple[str, ...],
    seeds: int = 3,
    jobs: int = 1,
    output: Path | None = None,
) -> None:
    """Run every file on every seed and print a table.

    Args:
        recipe: its module's name.
        kinds: names of its YAML files.
        seeds: of the batches, from 0.
        jobs: runs at a time.
        output: a JSON file for the metrics of every run.
    """
    runs = [(kind, seed) for kind in kinds for seed in range(seeds)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def metrics(run: tuple[str, int]) -> Metrics:
            kind, seed = run
            found = run_recipe(recipe, kind, seed, Path(folder) / f"{kind}_{seed}", jobs, ())
            print(kind, seed, {name: next(iter(values.values())) for name, values in found.items()}, flush=True)
            return found

        results = dict(zip(runs, pool.map(metrics, runs), strict=True))
    if output is not None:
        rows = [{"kind": kind, "seed": seed, "metrics": found} for (kind, seed), found in results.items()]
        output.write_text(json.dumps({"recipe": recipe, "runs": rows}, indent=1) + "\n")
    print(table(kinds, seeds, results))


def table(kinds: tuple[str, ...], seeds: int, results: dict[tuple[str, int], Metrics]) -> str:
    """Markdown, a row for each file and model."""
    first = results[kinds[0], 0]
    names = list(first[TUNED])
    lines = [f"| file | model | {' | '.join(names)} | {names[0]}, above float |", "|---" * (len(names) + 3) + "|"]
    for kind in kinds:
        for model in first:
            found = [results[kind, seed] for seed in range(seeds)]
            means = (statistics.mean(one[model][name] for one in found) for name in names)
            above = [one[model][names[0]] - one[TUNED][names[0]] for one in found]
            error = statistics.stdev(above) / seeds**0.5 if seeds > 1 else 0.0
            cells = [f"{kind}.yaml", model, *(f"{mean:.4f}" for mean in means)]
            lines.append(f"| {' | '.join(cells)} | {statistics.mean(above):+.4f} ± {error:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
