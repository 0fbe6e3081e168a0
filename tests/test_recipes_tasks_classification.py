from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.tasks import Classification, evaluate


class Table(nn.Module):
    """Answers with the logits of a row."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, rows: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits[rows])


def by_hand(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The definitions, example by example, in double precision."""
    scores = [row.double().softmax(-1) for row in logits]
    chosen = [int(row.argmax()) for row in scores]
    right = [c == int(label) for c, label in zip(chosen, labels, strict=True)]
    f1 = []
    for name in range(logits.shape[1]):
        true = sum(r and c == name for r, c in zip(right, chosen, strict=True))
        wrong = sum(c == name for c in chosen) + sum(int(label) == name for label in labels) - 2 * true
        if true or wrong:
            f1.append(2 * true / (2 * true + wrong))
    bins: dict[int, list[float]] = {}
    for row, r in zip(scores, right, strict=True):
        bins.setdefault(math.floor(float(row.max()) * 15), []).append(float(row.max()) - r)
    return {
        "loss": sum(-float(row[label].log()) for row, label in zip(scores, labels, strict=True)) / len(labels),
        "accuracy": sum(right) / len(right),
        "macro_f1": sum(f1) / len(f1),
        "calibration_error": sum(abs(sum(found)) for found in bins.values()) / len(labels),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_their_definitions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, 4, generator=generator) * 2
    labels = torch.randint(0, 4, (50,), generator=generator)
    rows = torch.arange(50)
    batches = [{"rows": rows[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 50, 8)]
    found = evaluate(Classification(classes=4), Table(logits), batches)
    assert list(found) == ["accuracy", "calibration_error", "loss", "macro_f1"]
    assert found == pytest.approx(by_hand(logits, labels), rel=1e-5)  # float32 over fifty examples


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_float32_for_narrow_logits(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(6, 3).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = Classification(classes=3).loss(logits, {"labels": labels})
    assert loss.dtype is torch.float32
    assert float(loss) == pytest.approx(by_hand(logits, labels)["loss"], rel=1e-6)


def test_labels_stay_out_of_the_forward() -> None:
    batch = {"pixel_values": torch.zeros(1), "labels": torch.zeros(1)}
    assert set(Classification(classes=2).inputs(batch)) == {"pixel_values"}


def test_a_distillation_compares_all_examples() -> None:
    logits = torch.randn(6, 3)
    found, counted = Classification(classes=3).predictions(logits, {"labels": torch.zeros(6)})
    assert found is logits
    assert counted is None


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="classes: must be at least 2, got 1"):
        Classification(classes=1)
