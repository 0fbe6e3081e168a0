"""A model as it will be served: the same objects meanwhile, and exactly what they were afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.freezing import frozen_copy
from qat.layers import QLinear, quantized_layers
from qat.serving import as_served, snapshot
from qat.spec import QuantSpec


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.part = nn.LayerNorm(16), Part()
        self.offset = nn.Buffer(torch.full((16,), 0.1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(self.norm(x)) + self.offset
        return y


def calibrated(dtype: str) -> tuple[Whole, Tensor]:
    model, x = Whole(), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    qat.calibrate(model, [x], spec=QuantSpec(activations="int8", dtype=dtype))
    return model.eval(), x


def state(model: nn.Module) -> dict[int, Any]:
    """Class, attributes and the contents of containers, of every module."""
    return {
        id(m): (
            type(m),
            {key: (id(v), list(v.items()) if isinstance(v, dict) else None) for key, v in vars(m).items()},
        )
        for m in model.modules()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_own_modules_compute_what_is_served(dtype: str) -> None:
    model, x = calibrated(dtype)
    part, trained = model.part, model(x)
    frozen, before = frozen_copy(model), state(model)
    with torch.no_grad(), as_served(model):
        assert model.part is part
        assert not isinstance(part.first, QLinear)
        assert model.norm.weight.dtype == getattr(torch, dtype)
        assert torch.equal(model(x), frozen(x.to(getattr(torch, dtype))))  # inputs are cast
        assert part(torch.ones(2, 16, dtype=getattr(torch, dtype))).shape == (2, 16)
    assert state(model) == before
    assert torch.equal(model(x), trained)
    assert [name for name, _ in quantized_layers(model)] == ["part.first", "part.second"]


def test_an_error_meanwhile_leaves_the_model_as_it_was() -> None:
    model, _ = calibrated("bfloat16")
    before = state(model)
    with pytest.raises(ZeroDivisionError), as_served(model):
        1 / 0  # noqa: B018
    assert state(model) == before


def test_a_snapshot_restores_classes_attributes_and_hooks() -> None:
    model = Whole()
    kept = model.register_forward_hook(lambda *_: None)
    before, restore = state(model), snapshot(model)
    qat.prepare(model, QuantSpec(activations="int8"))
    model.norm.register_forward_pre_hook(lambda *_: None)
    del model.offset
    model.extra = 1
    assert state(model) != before
    restore()
    assert state(model) == before
    kept.remove()  # which finds its hook in the dictionary of before
    assert not model._forward_hooks
