"""Quantized activations after calibration alone: ours as reloaded, stock optimum-quanto in memory and as reloaded.

The same batches for every arm, three draws of them. The models are those of the recipes, and two of them with outliers:
some channels are scaled up and the weights after them down, which changes nothing in float. Measured on held-out
examples are the divergence (KL, in nats) of the quantized model's predictions from the float model's, the squared error
of its logits relative to their squares, and its loss::

    python -m scripts.benchmark_calibration [--device cuda] [--models encoder ...] [--output docs/results/x.json]
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from torch import nn

import qat
from scripts._calibration_models import Batch, Case, encoder, language_model, vision_transformer, with_outliers

Arm = Callable[[nn.Module, str, list[Batch]], nn.Module]


def stock_in_memory(model: nn.Module, activations: str, batches: list[Batch]) -> nn.Module:
    """optimum-quanto's own ``Calibration``, with what it decides about outputs, on the layers that ours quantizes.

    It would quantize convolutions and layer norms too, which costs it more.
    """
    from optimum.quanto import Calibration, freeze, qfloat8_e4m3fn, qint8, quantize

    qtype = {"int8": qint8, "float8": qfloat8_e4m3fn}[activations]
    others = [name for name, part in model.named_modules() if name and not isinstance(part, nn.Linear)]
    quantize(model, weights=qint8, activations=qtype, exclude=[*others, "lm_head"])
    with torch.no_grad(), Calibration():
        for batch in batches:
            model(**batch)
    freeze(model)
    return model


def stock_reloaded(model: nn.Module, activations: str, batches: list[Batch]) -> nn.Module:
    """The same after optimum-quanto wrote it and read it again."""
    from optimum.quanto import quantization_map, requantize

    plain = copy.deepcopy(model)
    made = stock_in_memory(model, activations, batches)
    device = next(plain.parameters()).device
    requantize(plain, made.state_dict(), quantization_map(made), device=device)
    return plain


@dataclass(frozen=True)
class Ours:
    """`qat.calibrate`, exported, and loaded again by the target's own loader; outliers may be folded before."""

    target: str
    fold: bool = False

    def __call__(self, model: nn.Module, activations: str, batches: list[Batch]) -> nn.Module:
        device = next(model.parameters()).device
        spec = qat.QuantSpec(weights="int8", activations=activations, dtype="float32")  # type: ignore[arg-type]
        if self.fold:
            qat.fold_outliers(model, batches, spec=spec, target=self.target)
        qat.calibrate(model, batches, spec=spec, target=self.target)
        qat.freeze(model)
        with TemporaryDirectory() as folder:
            qat.export(model, folder)
            qat.verify(folder)
            return qat.load(folder, device=device)


ARMS: dict[str, Arm] = {
    "stock, in memory": stock_in_memory,
    "stock, reloaded": stock_reloaded,
    "qat, target quanto, reloaded": Ours("quanto"),
    "qat, target transformers, reloaded": Ours("transformers"),
    "the same, folded, target quanto": Ours("quanto", fold=True),
    "the same, folded, target transformers": Ours("transformers", fold=True),
}
MODELS: dict[str, Callable[[str], Case]] = {
    "language model": language_model,
    "vision transformer": vision_transformer,
    "encoder": encoder,
}
OUTLIERS = ", with outliers"
Name = Literal[
    "language model", "language model, with outliers", "vision transformer", "encoder", "encoder, with outliers"
]


def make(name: str, device: str) -> Case:
    """A model by its name, as that of ``--models``."""
    case = MODELS[name.removesuffix(OUTLIERS)](device)
    if not name.endswith(OUTLIERS):
        return case
    changed = replace(case, model=with_outliers(case.model))
    gap = (changed.logits(changed.model) - case.logits(case.model)).abs().max()
    assert gap < 1e-2, f"{name}: not equal in float, by {gap}"
    return changed


def measure(case: Case, arm: Arm, activations: str, seeds: int) -> dict[str, list[float]]:
    """KL, relative error of the logits and loss, one of each for a draw of batches."""
    wanted = case.logits(case.model)
    found: dict[str, list[float]] = {"kl": [], "error": [], "loss": []}
    for seed in range(seeds):
        given = case.logits(arm(copy.deepcopy(case.model), activations, case.batches(seed)))
        expected, predicted = wanted.double().log_softmax(-1), given.double().log_softmax(-1)
        found["kl"].append(float((expected.exp() * (expected - predicted)).sum(-1).mean()))
        found["error"].append(float((given - wanted).double().square().sum() / wanted.double().square().sum()))
        found["loss"].append(case.loss(given))
    return found


def main(
    device: str = "cpu",
    seeds: int = 3,
    output: Path | None = None,
    arms: Literal["all", "ours"] = "all",
    models: tuple[Name, ...] = (
        "language model",
        "language model, with outliers",
        "vision transformer",
        "encoder",
        "encoder, with outliers",
    ),
) -> None:
    """Measure every arm and print a table.

    Args:
        device: Where the models run.
        seeds: Draws of calibration batches.
        output: A JSON file for the numbers.
        arms: All, or only those of this package.
        models: Which models.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        case = make(name, device)
        print(f"{name}: float loss {case.loss(case.logits(case.model)):.4f}", flush=True)
        for activations in ("int8", "float8"):
            for arm, run in ARMS.items():
                if arms == "ours" and arm.startswith("stock"):
                    continue
                found = measure(case, run, activations, seeds)
                rows.append({"model": name, "activations": activations, "arm": arm, **found})
                means = {key: statistics.mean(values) for key, values in found.items()}
                print(
                    f"{name:29} {activations:6} {arm:36} KL {means['kl']:.6f} ({min(found['kl']):.6f} to "
                    f"{max(found['kl']):.6f})  error {means['error']:.6f}  loss {means['loss']:.4f}",
                    flush=True,
                )
    if output is not None:
        output.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
