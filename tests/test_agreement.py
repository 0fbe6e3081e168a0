"""The frozen model against the float one, on batches held out."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.agreement import agreement, answers, held_out


class Classifier(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.body = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 5))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(**{self.name: self.body(x)})


@torch.no_grad()
@pytest.mark.parametrize("name", ["logits", "last_hidden_state"])
def test_it_is_what_a_float_copy_says(name: str) -> None:
    torch.manual_seed(0)
    model = Classifier(name)
    floating = copy.deepcopy(model).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": torch.randn(2, 3, 128), "attention_mask": mask} for _ in range(3)]
    wanted = list(answers(model, batches))
    qat.prepare(model, qat.QuantSpec(weights="int4", dtype="float32"))
    qat.freeze(model)
    found = agreement(model, batches, wanted)
    kl, same, gap, size, total = 0.0, 0, 0.0, 0.0, 0
    for batch in batches:
        for row, counts in zip(batch["x"].reshape(-1, 128), mask.flatten(), strict=True):
            if counts:
                p = getattr(floating(row.double()), name)
                q = getattr(model(row), name).double()
                total += 1
                kl += float((p.softmax(0) * (p.softmax(0) / q.softmax(0)).log()).sum())
                same += int(p.argmax() == q.argmax())
                gap += float((p - q).square().sum())
                size += float(p.square().sum())
    assert found.batches == 3
    assert found.error == pytest.approx(gap / size, rel=1e-3)
    if name == "logits":
        assert found.predictions == total == 9
        assert found.kl == pytest.approx(kl / total, rel=1e-2)  # float32 and a difference of near numbers
        assert found.top1 == same / total
        assert "nats, top-1 agreement" in str(found)
    else:
        assert found.predictions == 0
        assert str(found).startswith("against the float model on 3 held-out batches: relative error of outputs ")


def test_outputs_that_are_served_quantized_count_as_they_are_served() -> None:
    torch.manual_seed(0)
    model, batch = Classifier("logits"), {"x": torch.randn(64, 128)}
    wanted = list(answers(model, [batch]))
    qat.calibrate(model, [batch], spec=qat.QuantSpec(activations="float8", dtype="float32"))
    qat.freeze(model)
    with torch.no_grad():
        served = model(**batch).logits
    assert type(served) is not Tensor
    gap = (served.dequantize() - wanted[0].values).square().sum() / wanted[0].values.square().sum()
    assert agreement(model, [batch], wanted).error == pytest.approx(float(gap), rel=1e-5)


def test_the_model_is_left_in_its_mode() -> None:
    model = Classifier("logits").train()
    list(answers(model, [{"x": torch.randn(2, 128)}]))
    assert model.training


@pytest.mark.parametrize(
    ("total", "wanted", "held"), [(0, 4, 0), (1, 4, 0), (2, 4, 1), (5, 4, 1), (4, 4, 1), (20, 16, 4)]
)
def test_batches_are_held_out_evenly(total: int, wanted: int, held: int) -> None:
    used, others = held_out(list(range(total)), wanted)
    assert sorted(used + others) == list(range(total))
    assert len(others) == held
