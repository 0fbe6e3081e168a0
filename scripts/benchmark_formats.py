"""Quality in each format: trained for its grid, and quantized without training, on the reference language model.

``minmax`` and ``mse`` are what other tools do without data: a range from the weights' ends, and the clipped one with
the smallest squared error. ``best`` also reads calibration batches. ``QAT`` begins with ``best`` and is distilled from
the fine-tuned float model for some steps. All are exported, reloaded by `qat.load`, and judged on held-out text::

    python -m scripts.benchmark_formats --formats transformers:int4 compressed-tensors:int4_g32 gguf:q4_1 --device cuda

Prints a row of JSON for each run; perplexity is ``exp(loss)``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from typing import Any

import torch

from scripts import _quality_problems
from scripts._quality import ARMS, Run, evaluate, fine_tune, post_training, train
from scripts._quality_problems import problem

UNTRAINED = {"minmax": "PTQ minmax", "mse": "PTQ clip", "best": "PTQ best"}
FORMATS = [
    "transformers:int4",
    "compressed-tensors:int4_g32",
    "compressed-tensors:int4_g32_zp",
    "compressed-tensors:int4",
    "gguf:q4_0",
    "gguf:q4_1",
    "gguf:q8_0",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="target:type")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-5, 1e-4], help="of the trained runs")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=64, help="blocks of 256 tokens to judge by")
    parser.add_argument("--batch", type=int, default=8, help="blocks a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    _quality_problems.BATCH = arguments.batch
    data: Any = problem("language", arguments.device, arguments.held_out)
    tuned = copy.deepcopy(data.model)
    fine_tune(tuned, data, arguments.steps, arguments.seed, 1e-4, "cosine")

    def note(form: str, how: str, found: dict[str, Any], **more: Any) -> None:
        row = {"format": form, "how": how, "perplexity": math.exp(found["loss"])}
        row |= {key: found[key] for key in ("loss", "kl", "changed") if key in found}
        print(json.dumps(row | more), flush=True)

    note("float", "bfloat16", evaluate(copy.deepcopy(tuned).to(torch.bfloat16), data, tuned))
    for form in arguments.formats:
        data.target, weights = form.split(":")
        for how, arm in (*UNTRAINED.items(), ("QAT", "best")):
            for rate in arguments.rates if arm in ARMS else (0.0,):
                start = time.monotonic()
                run = Run(arm, weights, None, arguments.steps, arguments.seed, rate)
                found = (train if arm in ARMS else post_training)(run, data, tuned)
                note(form, how, found, rate=rate, seconds=round(time.monotonic() - start, 1))


if __name__ == "__main__":
    main()
