"""Quantization-aware training of LoRA adapters: its quality beside training of all weights, and its memory and time.

The quality is measured on the reference language model as in `benchmark_quality`. All arms begin with one fine-tuned
float model. ``gain_from_best`` is the share of full training's gain over the start `best` without training, and
``gain_from_clip`` that over `clip`. The memory is measured as in `benchmark_speed`; `qat` and
`learned` train all weights::

    python -m scripts.benchmark_lora quality --types int4 int2 --steps 80
    python -m scripts.benchmark_lora memory --shape 8b --device cuda --dtype bfloat16

Both print JSON. In ``memory``, ``lora`` is peft's plain LoRA. ``lora_learned`` and ``lora_qat`` are ours, with learned
ranges and without. ``lora_packed`` holds the base as int4 codes. In ``lora_torchao`` torchao fake-quantizes the base
alone, beside a float adapter.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts import _quality_problems, benchmark_speed
from scripts._quality import ARMS, RATES, Run, evaluate, fine_tune, post_training, train
from scripts._quality_problems import Problem, problem

FULL = "best"
QUALITY_ARMS = ("PTQ clip", "PTQ best", FULL, "lora 16", "lora 64", "lora 64, base kept", "lora 16, then quantized")
MEMORY_ARMS = ("qat", "learned", "lora", "lora_qat", "lora_learned", "lora_packed", "lora_torchao")


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of all runs, and for each type the share of full training's gain that each arm has at its best rate."""
    rows: list[dict[str, Any]] = []
    _quality_problems.BATCH = arguments.batch
    data: Problem = problem("language", arguments.device, arguments.held_out)
    for seed in arguments.seeds:
        tuned = copy.deepcopy(data.model)
        if arguments.float_rate:
            fine_tune(tuned, data, arguments.steps, seed, arguments.float_rate, "cosine")
        floats = evaluate(copy.deepcopy(tuned).to(getattr(torch, arguments.serving)), data)
        rows.append({"arm": "FT", "seed": seed, "loss": floats["loss"]})
        for weights in arguments.types:
            for arm in arguments.arms:
                rates = (0.0,) if arm.startswith("PTQ") else ARMS[arm].rates.get(weights, RATES[weights])
                for rate in rates if arguments.sweep or len(rates) == 1 else rates[1:2]:
                    start = time.monotonic()
                    run = Run(arm, weights, None, arguments.steps, seed, rate, arguments.serving)
                    found = (post_training if arm.startswith("PTQ") else train)(run, data, tuned)
                    found.pop("losses")
                    rows.append(asdict(run) | found | {"seconds": round(time.monotonic() - start, 1)})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"rows": rows, "gains": {weights: gains(rows, weights) for weights in arguments.types}}


def gains(rows: list[dict[str, Any]], weights: str) -> dict[str, dict[str, float]]:
    """What each arm wins of what full training wins, at the rate with the smallest mean loss over the seeds."""
    losses: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.get("weights") == weights:
            losses.setdefault(row["arm"], {}).setdefault(row["rate"], []).append(row["loss"])
    best = {
        arm: min((sum(found) / len(found), rate) for rate, found in by_rate.items()) for arm, by_rate in losses.items()
    }
    if FULL not in best:
        return {}
    full = best[FULL][0]
    told = {}
    for arm, (loss, rate) in best.items():
        starts = {start: best[f"PTQ {start}"][0] for start in ("clip", "best") if f"PTQ {start}" in best}
        shares = {f"gain_from_{start}": (before - loss) / (before - full) for start, before in starts.items()}
        told[arm] = {"loss": loss, "rate": rate} | shares
    return told


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time of a step and peak memory of all arms."""
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    return {
        "device": device,
        "torch": torch.__version__,
        "shape": benchmark_speed.SHAPES[arguments.shape],
        "rows": benchmark_speed.run(arguments),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("what", choices=("quality", "memory", "gains"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--types", nargs="+", default=["int4", "int2"])
    parser.add_argument(
        "--steps", type=int, default=None, help="of a run (default 80), or of an arm a round (default 6)"
    )
    parser.add_argument("--arms", nargs="+", default=None)
    parser.add_argument("--output", type=Path, default=None, help="write the JSON here too")
    of_quality = parser.add_argument_group("quality")
    of_quality.add_argument("--seeds", type=int, nargs="+", default=[0])
    of_quality.add_argument("--held-out", type=int, default=64, help="blocks to judge by")
    of_quality.add_argument("--batch", type=int, default=8, help="blocks of 256 tokens a step")
    of_quality.add_argument("--float-rate", type=float, default=1e-4, help="of the fine-tuning before; 0: none")
    of_quality.add_argument("--serving", default="bfloat16", help="dtype in which models are served and judged")
    of_quality.add_argument("--sweep", action="store_true", help="all rates of an arm, not its second one alone")
    of_quality.add_argument("--rows", type=Path, default=None, help="for gains: rows of quality, one a line")
    of_memory = parser.add_argument_group("memory")
    of_memory.add_argument("--shape", choices=sorted(benchmark_speed.SHAPES), default="8b" if cuda else "cpu")
    of_memory.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="dtype of the weights")
    of_memory.add_argument("--autocast", action="store_true", help="bfloat16 autocast around the forward")
    of_memory.add_argument("--rounds", type=int, default=2)
    of_memory.add_argument("--warmup", type=int, default=2)
    arguments = parser.parse_args()
    judges = arguments.what == "quality"
    arguments.steps = arguments.steps or (80 if judges else 6)
    arguments.arms = arguments.arms or list(QUALITY_ARMS if judges else MEMORY_ARMS)
    arguments.serving = arguments.serving if judges else arguments.dtype
    arguments.compile, arguments.clock = False, "wall"
    if arguments.what == "gains":
        rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
        print(json.dumps({weights: gains(rows, weights) for weights in arguments.types}, indent=1))
        return
    found = (quality if judges else memory)(arguments)
    options = {key: value for key, value in vars(arguments).items() if key not in ("output", "rows")}
    text = json.dumps({"options": options} | found, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
