"""A prepared model against itself in float, on batches held out."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.agreement import agreement, held_out
from qat.layers import quantized_layers


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
    qat.prepare(model, qat.QuantSpec(weights="int4", dtype="float32"))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": torch.randn(2, 3, 128), "attention_mask": mask} for _ in range(3)]
    found = agreement(model, batches)
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


def test_the_model_is_left_as_it_was() -> None:
    model = Classifier("logits").train()
    qat.prepare(model, qat.QuantSpec())
    agreement(model, [{"x": torch.randn(2, 128)}])
    assert model.training
    for _, layer in quantized_layers(model):
        assert layer.mode.weights
        assert not layer.reached


@pytest.mark.parametrize(
    ("total", "wanted", "held"), [(0, 4, 0), (1, 4, 0), (2, 4, 1), (5, 4, 1), (4, 4, 1), (20, 16, 4)]
)
def test_batches_are_held_out_evenly(total: int, wanted: int, held: int) -> None:
    used, others = held_out(list(range(total)), wanted)
    assert sorted(used + others) == list(range(total))
    assert len(others) == held
