"""Mixed precision against one type at equal bytes, after post-training quantization alone.

`qat.search` scores the layers of the reference language model on batches of its text, three draws of them, by each of
its scores. Measured is the divergence (KL, in nats) of the quantized model's predictions from the float model's, on
held-out text. Budgets are those of a type, or bits a quantized weight; the rest of a budget is what stays float::

    python -m scripts.benchmark_search [--device cuda] [--budgets int4 3.0] [--output docs/results/x.json]
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro

import qat
from qat.allocation.damage import Score
from scripts._calibration_models import BATCHES, Case, language_model

UNIFORM = ("int2", "int4", "int8")


def divergence(case: Case, wanted: torch.Tensor, spec: qat.QuantSpec) -> float:
    """KL of the held-out predictions after post-training quantization with clipped ranges."""
    model = copy.deepcopy(case.model)
    qat.prepare(model, spec, algorithm=qat.LearnedAffine())
    expected, given = wanted.double().log_softmax(-1), case.logits(model).double().log_softmax(-1)
    return float((expected.exp() * (expected - given)).sum(-1).mean())


def main(
    device: str = "cpu",
    budgets: tuple[str, ...] = ("int4", "3.0", "5.0"),
    seeds: int = 3,
    scores: tuple[Score, ...] = ("output", "gradient", "kl"),
    batches: int = BATCHES,
    output: Path | None = None,
) -> None:
    """Search for every budget by every score, and print a table.

    Args:
        device: Where the model runs.
        budgets: Names of types, or bits a weight.
        seeds: Draws of batches to score on.
        scores: By what layers are scored.
        batches: How many batches of 2,048 tokens, of each draw.
        output: A JSON file for the numbers.
    """
    case = language_model(device)
    wanted = case.logits(case.model)
    rows: list[dict[str, Any]] = []
    uniform = {}
    for name in UNIFORM:
        spec = qat.QuantSpec(weights=name)  # type: ignore[arg-type]
        report = qat.inspect(case.model, spec)
        uniform[name] = (report.bytes_after, divergence(case, wanted, spec))
        print(f"{name}: {report.bytes_after:,} bytes, KL {uniform[name][1]:.5f}", flush=True)
    quantized = sum(prod(layer.shape) for layer in report.layers if layer.weights)
    left = sum(layer.bytes_after for layer in report.layers if not layer.weights)
    print(f"{quantized:,} weights can be quantized; {left:,} bytes stay float", flush=True)
    for score, seed in itertools.product(scores, range(seeds)):
        with TemporaryDirectory() as folder:  # one scoring for all budgets
            for budget in budgets:
                most: Any = budget if budget in uniform else left + int(float(budget) * quantized / 8)
                options: dict[str, Any] = {"budget": most, "score": score, "state": Path(folder, "state.json")}
                start = time.perf_counter()
                found = qat.search(case.model, qat.QuantSpec(), case.batches(seed)[:batches], **options)
                seconds, kl = time.perf_counter() - start, divergence(case, wanted, found.spec)
                best = min(kl for size, kl in uniform.values() if size <= found.budget)
                rows.append({"score": score, "seed": seed, "budget": budget, "bytes": found.nbytes, "kl": kl})
                rows[-1] |= {"uniform": best, "seconds": seconds, "predicted": found.damage}
                print(f"{budget:5} {seed} {found}; KL {kl:.5f}, uniform {best:.5f}, {seconds:.0f} s", flush=True)
    for budget in budgets:
        for score in scores:
            same = [row["kl"] for row in rows if (row["score"], row["budget"]) == (score, budget)]
            print(f"{budget:5} {score:8} KL {statistics.mean(same):.5f} ({min(same):.5f} to {max(same):.5f})")
    if output is not None:
        output.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
