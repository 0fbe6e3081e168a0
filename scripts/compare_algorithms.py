"""Train the reference language model with each algorithm from the float one, for a few steps, on a CPU or a GPU.

The loss is the KL divergence to the float model, the rate falls to zero by a cosine, and scales have three times the
weights' rate. Every run sees the same batches. The fake-quantized model is judged on held-out blocks, in float32:
KL to the float model and cross entropy, in nats, before the first step and after the last one.

    python -m scripts.compare_algorithms --types int2 --rates 3e-4 1e-3
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

import qat
from scripts._calibration_models import Case, language_model

ALGORITHMS: dict[str, dict[str, Any]] = {
    "straight-through": {"kind": "straight_through"},
    "learned affine": {"kind": "learned_affine"},
    "learned affine, LSQ start": {"kind": "learned_affine", "start": "lsq"},
    "learned affine, mask of QuEST": {"kind": "learned_affine", "mask_margin": 0.5},
    "learned affine, StableQAT": {"kind": "learned_affine", "gradient": "stable"},
    "SEQ": {"kind": "stretched_elastic"},
    "Dual-LSQ": {"kind": "dual_lsq"},
    "learned clipping": {"kind": "learned_clipping"},
}


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL of the predictions to those of the float model, ``(..., classes)``."""
    ours, theirs = (part.float().flatten(0, -2).log_softmax(-1) for part in (logits, wanted))
    return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def judge(case: Case, model: Any, wanted: Tensor) -> tuple[float, float]:
    logits = case.logits(model)
    return float(divergence(logits, wanted)), case.loss(logits)


def run(
    case: Case, weights: str, options: dict[str, Any], rate: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    model, wanted = copy.deepcopy(case.model), case.logits(case.model)
    algorithm: qat.Algorithm = TypeAdapter(qat.AnyAlgorithm).validate_python(options)
    spec = qat.QuantSpec.model_validate({"weights": weights, "dtype": "bfloat16", "exclude": ("lm_head",)})
    qat.prepare(model, spec, algorithm=algorithm, target="transformers")
    before = judge(case, model, wanted)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=rate, scale_lr=3 * rate))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    generator, started = torch.Generator().manual_seed(arguments.seed), time.perf_counter()
    for _ in range(arguments.steps):
        batch = case.collate(torch.randint(case.examples, (arguments.batch,), generator=generator).tolist())
        with torch.no_grad():
            target = case.model(**batch).logits
        optimizer.zero_grad()
        divergence(model(**batch).logits, target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - started
    after = judge(case, model, wanted)
    return {"before": before, "after": after, "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["int2", "int4"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8, help="blocks of 256 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    case = language_model(arguments.device)
    print(f"float: loss {case.loss(case.logits(case.model)):.4f}", flush=True)
    for weights, name, rate in _runs(arguments):
        found = run(case, weights, ALGORITHMS[name], rate, arguments)
        print(json.dumps({"type": weights, "algorithm": name, "rate": rate} | found), flush=True)


def _runs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    for weights in arguments.types:
        for name in arguments.algorithms:
            for rate in arguments.rates:
                yield weights, name, rate


if __name__ == "__main__":
    main()
