"""What block-wise reconstruction gives on the reference language model: KL to the float model, before and after.

    python -m scripts.measure_reconstruction --types int4 int2 --steps 200 --lr 3e-4 --inputs quantized float

Held out are blocks of tokens that reconstruction does not see. KL is in nats a token, from the float model to the
fake-quantized one; ranges start from the clip search.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

import qat
from qat.spec import WeightType
from scripts._calibration_models import Case, language_model


@dataclass(frozen=True)
class Arguments:
    types: tuple[WeightType, ...] = ("int4", "int2")
    steps: int = 200
    lr: tuple[float, ...] = (3e-4,)
    scale_lr: tuple[float, ...] = (1e-4,)
    inputs: tuple[str, ...] = ("quantized", "float")
    vectors: tuple[bool, ...] = (True,)
    batches: int = 32
    batch: int = 2
    """Blocks of 256 tokens in a batch."""
    seed: int = 0
    device: str = "cpu"
    table: bool = False
    """Print a line for each block too."""


def divergence(logits: Tensor, target: Tensor) -> float:
    """KL from ``target`` to ``logits``, ``(tokens, vocabulary)``, in nats a token."""
    parts = zip(torch.split(logits, 1024), torch.split(target, 1024), strict=True)
    total = sum(
        torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum").item()
        for a, b in parts
    )
    return total / len(logits)


def main(arguments: Arguments) -> None:
    case: Case = language_model(arguments.device)
    order = torch.randperm(case.examples, generator=torch.Generator().manual_seed(arguments.seed + 1))
    rows = torch.split(order[: arguments.batch * arguments.batches], arguments.batch)
    batches = [case.collate(part.tolist()) for part in rows]
    target = case.logits(case.model)
    print(f"float: loss {case.loss(target):.4f}")
    for weights in arguments.types:
        start: Any = copy.deepcopy(case.model)
        qat.prepare(start, qat.QuantSpec(weights=weights), algorithm=qat.LearnedAffine(), target="transformers")
        logits = case.logits(start)
        print(f"{weights} clip start: KL {divergence(logits, target):.4f}, loss {case.loss(logits):.4f}", flush=True)
        for inputs in arguments.inputs:
            for lr in arguments.lr:
                for scale_lr in arguments.scale_lr:
                    for vectors in arguments.vectors:
                        model: Any = copy.deepcopy(start)
                        options: Any = {"inputs": inputs, "lr": lr, "scale_lr": scale_lr, "vectors": vectors}
                        began = time.process_time()
                        report = qat.reconstruct(model, batches, steps=arguments.steps, seed=arguments.seed, **options)
                        seconds = time.process_time() - began
                        logits = case.logits(model)
                        print(
                            f"{weights} {options}: KL {divergence(logits, target):.4f}, loss {case.loss(logits):.4f}, "
                            f"{seconds:.0f} s of CPU time; {report}",
                            flush=True,
                        )
                        if arguments.table:
                            print(report.table())


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
