"""Training with quantized activations: fast paths against plain ones, learned scales against static ones, and float.

Every arm fine-tunes the reference language model on the same batches in the same order, with float32 masters under
bfloat16 autocast, as it is served. Arms: ``float``; ``values`` multiplies fake-quantized values; ``codes`` multiplies
codes, which is the default; ``float8 gradients`` multiplies gradients in float8 too; ``learned`` learns the scales of
activations, and holds them for the last fifth. Printed is the loss on held-out blocks, of the frozen model, and the
largest distance of the training losses from those of ``values``, averaged over 20 steps::

    python -m scripts.benchmark_activation_training --device cuda --output docs/results/activation_training.json
"""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import qat
from qat.layers import quantized_layers
from qat.optimizers import learned_ranges
from scripts._calibration_models import BATCH, language_model

ARMS = ("values", "codes", "float8 gradients", "learned")
WINDOW = 20  # steps over which losses are averaged


def prepared(model: nn.Module, qtype: str, arm: str, target: str, batches: list[Tensor]) -> None:
    """Prepare and calibrate ``model`` for an arm."""
    algorithm = qat.StraightThrough(float8_backward=arm == "float8 gradients", learn_activations=arm == "learned")
    spec = qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": "bfloat16"})
    qat.prepare(model, spec, target=target, algorithm=algorithm)
    with torch.autocast(batches[0].device.type, torch.bfloat16):
        qat.calibrate(model, [{"input_ids": batch} for batch in batches])
    if arm == "values":
        for _, layer in quantized_layers(model):
            layer.mode = layer.mode._replace(codes=False)


def train(model: Any, batches: list[Tensor], rate: float) -> list[float]:
    """The losses of one pass over ``batches``, with a rate that falls to zero in a line."""
    groups = qat.parameter_groups(model, lr=rate, scale_lr=10 * rate)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    losses = []
    for step, batch in enumerate(batches):
        if step == len(batches) * 4 // 5:
            own = learned_ranges(model)
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) not in own and parameter.requires_grad)
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


@torch.no_grad()
def evaluate(model: Any, blocks: Tensor) -> float:
    """The mean loss over ``blocks`` of a model in bfloat16."""
    return statistics.mean(float(model(input_ids=b, labels=b).loss) for b in torch.split(blocks, BATCH))


def distance(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves that are averaged over a window."""
    window = min(WINDOW, len(one))
    curves = [torch.tensor(losses).unfold(0, window, 1).mean(1) for losses in (one, other)]
    return float((curves[0] - curves[1]).abs().max())


def main(
    device: str = "cpu",
    seeds: int = 3,
    steps: int = 200,
    rate: float = 3e-5,
    target: str = "transformers",
    types: tuple[str, ...] = ("int8", "float8"),
    output: Path | None = None,
) -> None:
    """Train every arm and print a table.

    Args:
        device: Where the models run.
        seeds: Orders of the batches.
        steps: Steps of a run.
        rate: The learning rate at the start.
        target: Who will load the models.
        types: Types of weights and activations.
        output: A JSON file for the numbers.
    """
    case = language_model(device)
    held_out = torch.cat([batch["input_ids"] for batch in case.held_out])
    jobs = [("float", "-"), *((arm, q) for q in types for arm in ARMS if arm != "float8 gradients" or q == "float8")]
    rows: list[dict[str, Any]] = []
    for arm, qtype in jobs:
        curves, ends = [], []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            times = -(-steps * BATCH // case.examples)  # over the data
            order = torch.cat([torch.randperm(case.examples, generator=generator) for _ in range(times)])
            parts = torch.split(order[: steps * BATCH], BATCH)
            batches = [case.collate(part.tolist())["input_ids"] for part in parts]
            torch.manual_seed(seed)
            model = copy.deepcopy(case.model).train()
            if arm != "float":
                prepared(model, qtype, arm, target, batches[:8])
            curves.append(train(model, batches, rate))
            model.eval()
            if arm == "float":
                model.to(torch.bfloat16)
            else:
                qat.freeze(model)
            ends.append(evaluate(model, held_out))
        rows.append({"arm": arm, "type": qtype, "held_out": ends, "losses": curves})
        plain = next((row for row in rows if row["arm"] == "values" and row["type"] == qtype), rows[0])
        gaps = [mine - base for mine, base in zip(ends, rows[0]["held_out"], strict=True)]
        apart = max(map(distance, curves, plain["losses"]))
        mean, most = statistics.mean(ends), max(gaps, key=abs)
        print(f"{arm:17} {qtype:7} {mean:.4f}  over float {statistics.mean(gaps):+.4f} (at most {most:+.4f})", end="  ")
        print(f"curves apart by {apart:.4f}", flush=True)
    if output is not None:
        options = {"device": device, "seeds": seeds, "steps": steps, "rate": rate, "target": target}
        device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        record = {"device": device_name, "torch": torch.__version__, "options": options, "rows": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
