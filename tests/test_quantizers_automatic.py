"""The default algorithm: which one it chooses for a type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qat
from qat.quantizers.learned_affine import LearnedRange
from qat.quantizers.straight_through import DynamicRange


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("int8", DynamicRange), ("float8", DynamicRange), ("int4", LearnedRange), ("int2", LearnedRange)],
)
def test_each_type_has_its_own(weights: str, expected: type) -> None:
    model = nn.Sequential(nn.Linear(128, 128))
    qat.prepare(model, qat.QuantSpec.model_validate({"weights": weights}))
    assert type(model[0].weight_quantizer) is expected


def test_a_spec_may_mix_them() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    qat.prepare(model, qat.QuantSpec(weights="int4", overrides={"1": "int8"}))
    assert [type(layer.weight_quantizer) for layer in model] == [LearnedRange, DynamicRange]  # type: ignore[union-attr]
    assert [group["name"] for group in qat.parameter_groups(model, lr=1e-4)] == ["weights", "vectors", "scales"]


def test_a_float_checkpoint_gets_new_ranges() -> None:
    torch.manual_seed(0)
    model, fresh = (nn.Sequential(nn.Linear(128, 128)) for _ in range(2))
    state = model.state_dict()
    qat.prepare(model, qat.QuantSpec(weights="int2"))
    qat.prepare(fresh, qat.QuantSpec(weights="int2"))
    fresh.load_state_dict(state)
    assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))
