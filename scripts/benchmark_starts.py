"""Starts of learned ranges, judged without training: weights only, on the reference language model.

Every start sees the same 64 blocks. Measured on 32 held-out blocks are the divergence (KL, in nats) of the quantized
model's predictions from the float model's, its loss, and the seconds that `qat.calibrate` took::

    python -m scripts.benchmark_starts [--types int4 int2] [--starts clip best ...] [--device cuda]
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import qat
from scripts._calibration_models import language_model

Name = Literal["minmax", "clip", "hqq", "seq", "output", "gptq", "best"]
Type = Literal["int8", "float8", "int4", "int2"]


def divergence(wanted: Tensor, given: Tensor) -> float:
    """Mean KL of predictions, in nats."""
    expected, predicted = wanted.double().log_softmax(-1), given.double().log_softmax(-1)
    return float((expected.exp() * (expected - predicted)).sum(-1).mean())


def main(
    types: tuple[Type, ...] = ("int4", "int2"),
    starts: tuple[Name, ...] = ("minmax", "clip", "hqq", "seq", "output", "gptq", "best"),
    device: str = "cpu",
    seeds: int = 1,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    output: Path | None = None,
) -> None:
    """Measure every start and print a table.

    Args:
        types: Of the weights.
        starts: Which starts; seq is left out where the type has more than 2 bits.
        device: Where the model runs.
        seeds: Draws of calibration batches; starts without data have one.
        dtype: The serving dtype.
        output: A JSON file for the numbers.
    """
    case = language_model(device)
    wanted, rows = case.logits(case.model), list[dict[str, Any]]()
    print(f"float loss {case.loss(wanted):.4f}", flush=True)
    for weights in types:
        for start in starts:
            if start == "seq" and weights != "int2":
                continue
            for seed in range(seeds if start in ("output", "gptq", "best") else 1):
                model = copy.deepcopy(case.model)
                spec = qat.QuantSpec(weights=weights, dtype=dtype)
                began = time.perf_counter()
                report = qat.calibrate(
                    model,
                    case.batches(seed),
                    spec=spec,
                    algorithm=qat.LearnedAffine(start=start),
                    target="transformers",
                )
                seconds = time.perf_counter() - began
                logits = case.logits(model)
                kl, loss = divergence(wanted, logits), case.loss(logits)
                rows.append({"type": weights, "start": start, "seed": seed, "kl": kl, "loss": loss, "seconds": seconds})
                print(f"{weights:6} {start:6} seed {seed}  KL {kl:.4f}  loss {loss:.4f}  {seconds:.1f} s", flush=True)
                if start == "best" and seed == 0:
                    print(report.table(), flush=True)
    if output is not None:
        output.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
