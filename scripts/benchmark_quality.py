"""How much of the cost of quantization training wins back: ours, stock optimum-quanto QAT and torchao QAT.

R* = (L[PTQ(FT)] - L[QAT]) / (L[PTQ(FT)] - L[FT]). FT is the float model after fine-tuning for as many steps on the
same batches, with a sweep of rates of its own; PTQ(FT) is its best post-training quantization among min-max, clipping
and HQQ. Every arm has a sweep on seed 0; its best rate then runs on all seeds. Judged on held-out data, in bfloat16:
of ours the reloaded export, of stock quanto the frozen model in memory, of torchao the fake-quantized model. A row goes
to ``--rows`` as soon as it is there, and a second call goes on from the rows of
the same model and number of held-out blocks. Without ``--arms`` all 44 run, which takes
longer than half an hour on one GPU. `show_quality` makes the table and a plot of such a file::

    python -m scripts.benchmark_quality --device cuda --types int4 int2 --steps 80 400 --rows rows.jsonl
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
import tyro
from torch import nn

from scripts._quality import ARMS, FLOAT_RATES, RATES, Run, evaluate, fine_tune, post_training, train
from scripts._quality_problems import problem
from scripts.show_quality import HELD_OUT, PTQ, Subject, draw, subject_of, table

Key = tuple[Any, ...]
_problem: Any = None
_subject = Subject("language", HELD_OUT)
_folder = Path()


def key_of(row: dict[str, Any]) -> Key:
    """What tells apart the rows of one model."""
    return tuple(row[name] for name in ("arm", "weights", "activations", "steps", "seed", "rate"))


def begin(subject: Subject, device: str, folder: Path) -> None:
    """Load the problem, once in each process."""
    global _problem, _subject, _folder
    torch.set_num_threads(1)
    _problem, _subject, _folder = problem(subject.model, device, subject.held_out), subject, folder


def tuned_model(steps: int, seed: int, rate: float, judge: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The fine-tuned float model, made once and kept in a file."""
    import copy

    from safetensors.torch import load_model, save_model

    path = _folder / f"ft_{_subject.model}_{steps}_{seed}_{rate}.safetensors"
    model = copy.deepcopy(_problem.model)
    if path.is_file():
        load_model(model, path)
    else:
        fine_tune(model, _problem, steps, seed, rate, "cosine")
        save_model(model, str(path.with_suffix(f".{time.monotonic_ns()}")))
        next(iter(path.parent.glob(f"{path.stem}.[0-9]*[0-9]"))).rename(path)
    return model, evaluate(copy.deepcopy(model).to(torch.bfloat16), _problem) if judge else {}


def work(run: Run, float_rate: float) -> dict[str, Any]:
    """One row."""
    start = time.monotonic()
    try:
        if run.arm == "FT":
            _, found = tuned_model(run.steps, run.seed, run.rate, True)
        else:
            tuned, _ = tuned_model(run.steps, run.seed, float_rate, False)
            found = (post_training if run.arm.startswith("PTQ") else train)(run, _problem, tuned)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return _subject._asdict() | asdict(run) | found | {"seconds": round(time.monotonic() - start, 1)}


class Runs:
    """Rows of one model that are there, and a pool that makes the others."""

    def __init__(self, pool: Any, path: Path, subject: Subject) -> None:
        self._pool, self._path = pool, path
        found = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
        self.rows = {key_of(row): row for row in found if "error" not in row and subject_of(row) == subject}

    def make(self, runs: Iterable[Run], float_rates: dict[int, float]) -> None:
        """Add what is missing."""
        missing = [run for run in dict.fromkeys(runs) if key_of(asdict(run)) not in self.rows]
        missing.sort(key=lambda run: -run.steps)
        jobs = [self._pool.apply_async(work, (run, float_rates.get(run.steps, 0.0))) for run in missing]
        for job in jobs:
            row = job.get()
            shown = row.get("error") or f"{row['loss']:.4f}"
            print(*(row[n] for n in ("arm", "weights", "activations", "steps", "seed", "rate")), shown, flush=True)
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if "error" not in row:
                self.rows[key_of(row)] = row

    def best(self, arm: str, weights: str, activations: str | None, steps: int) -> float | None:
        """The rate with the smallest loss on seed 0."""
        rows = [r for r in self.rows.values() if key_of(r)[:5] == (arm, weights, activations, steps, 0)]
        return min(rows, key=lambda row: row["loss"])["rate"] if rows else None


def main(
    model: str = "language",
    device: str = "cpu",
    types: tuple[str, ...] = ("int4", "int2"),
    steps: tuple[int, ...] = (80,),
    seeds: int = 3,
    arms: tuple[str, ...] = tuple(ARMS),
    jobs: int = 1,
    held_out: int = HELD_OUT,
    rows: Path = Path("quality.jsonl"),
    sweep: bool = True,
    plot: Path | None = None,
) -> None:
    """Train every arm and print a table.

    Args:
        model: ``language``, ``vit``, ``encoder`` or ``flux``.
        device: Where the models run.
        types: Of weights, or of weights and activations with an underscore between: int8_int8.
        steps: Lengths of a run.
        seeds: Orders of the batches.
        arms: Names of arms.
        jobs: Processes at a time.
        held_out: Blocks to judge by.
        rows: A file of lines of JSON, one a run.
        sweep: Try all rates on seed 0; else each arm's middle one.
        plot: A PNG of R* against steps.
    """
    rows.parent.mkdir(parents=True, exist_ok=True)
    folder = rows.with_suffix(".models")
    folder.mkdir(exist_ok=True)
    pairs: list[tuple[str, str | None]] = []
    for name in types:
        weights, _, activations = name.partition("_")
        pairs.append((weights, activations or None))
    context = multiprocessing.get_context("spawn")
    subject = Subject(model, held_out)
    with context.Pool(jobs, begin, (subject, device, folder)) as pool:
        runs = Runs(pool, rows, subject)
        runs.make([Run("FT", "float", None, n, 0, rate) for n in steps for rate in FLOAT_RATES], {})
        rates = {n: runs.best("FT", "float", None, n) or FLOAT_RATES[1] for n in steps}
        runs.make([Run("FT", "float", None, n, seed, rates[n]) for n in steps for seed in range(seeds)], rates)
        if missing := [n for n in steps if ("FT", "float", None, n, 0, rates[n]) not in runs.rows]:
            raise RuntimeError(f"fine-tuning of {missing} steps failed, so nothing can be measured: see {rows}")
        first = [Run(ptq, *pair, n, s, 0.0) for pair in pairs for n in steps for s in range(seeds) for ptq in PTQ]
        for arm in arms:
            for pair in pairs:
                tried = ARMS[arm].rates.get(pair[0], RATES[pair[0]])
                tried = tried if sweep else tried[len(tried) // 2 :][:1]
                first += [Run(arm, *pair, n, 0, rate) for n in steps for rate in tried]
        runs.make(first, rates)
        again = [
            Run(arm, *pair, n, seed, rate)
            for arm in arms
            for pair in pairs
            for n in steps
            for seed in range(seeds)
            if (rate := runs.best(arm, *pair, n)) is not None
        ]
        runs.make(again, rates)
    print(table(runs.rows.values()))
    if plot is not None:
        draw(runs.rows.values(), plot)


if __name__ == "__main__":
    tyro.cli(main)
