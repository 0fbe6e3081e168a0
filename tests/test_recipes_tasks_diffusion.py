from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.tasks import Diffusion, evaluate
from recipes.tasks.diffusion import prediction

SHAPE = (6, 4, 3, 3)


@pytest.fixture
def batch() -> dict[str, Any]:
    return {
        "inputs": {"hidden_states": torch.randn(SHAPE), "extra": {"ids": torch.arange(6), "none": None}, "flag": False},
        "target": torch.randn(SHAPE),
        "fraction": torch.tensor([0.0, 0.05, 0.3, 0.35, 0.74, 0.999]),
    }


class Scale(nn.Module):
    """Returns its latents times a number, with a variance that must not count."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([[factor]]))
        self.dropout = nn.Dropout(0.9)
        self.kept = nn.Dropout(0.9).eval()
        self.dtypes: list[torch.dtype] = []

    def forward(self, hidden_states: Tensor, extra: Any, flag: bool) -> Any:
        assert not flag
        assert extra["none"] is None
        self.dtypes.append(hidden_states.dtype)
        found = self.kept(self.dropout(hidden_states)) * self.factor[0, 0]
        return SimpleNamespace(sample=torch.cat([found, torch.full_like(found, 9.0)], 1))


def test_the_loss_is_the_mean_squared_error(batch: dict[str, Any]) -> None:
    outputs = torch.randn(SHAPE)
    expected = ((outputs.double() - batch["target"].double()) ** 2).mean()
    assert float(Diffusion().loss((outputs,), batch)) == pytest.approx(float(expected), rel=1e-6)


def test_the_loss_is_float32_for_narrow_outputs(batch: dict[str, Any]) -> None:
    outputs = torch.randn(SHAPE).bfloat16()
    loss = Diffusion().loss(outputs, batch)
    assert loss.dtype is torch.float32
    expected = ((outputs.double() - batch["target"].double()) ** 2).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_distillation_compares_the_prediction_without_variances(batch: dict[str, Any]) -> None:
    outputs = torch.randn(6, 8, 3, 3)
    found, counted = Diffusion().predictions((outputs,), batch)
    assert torch.equal(found, outputs[:, :4])
    assert counted is None


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="bins: must be at least 1, got 0"):
        Diffusion(bins=0)


def test_metrics_are_the_loss_and_that_of_each_part_of_the_timesteps(batch: dict[str, Any]) -> None:
    task, model = Diffusion(bins=4), Scale()
    parts = [
        {
            "inputs": {**batch["inputs"], "hidden_states": batch["inputs"]["hidden_states"][rows]},
            "target": batch["target"][rows],
            "fraction": batch["fraction"][rows],
        }
        for rows in (slice(0, 4), slice(4, 6))  # of different sizes: every example counts alike
    ]
    found = evaluate(task, model, parts)
    errors = ((batch["inputs"]["hidden_states"] / 2 - batch["target"]) ** 2).flatten(1).mean(1)
    expected = {"loss": errors.mean(), "loss_bin_0": errors[:2].mean(), "loss_bin_1": errors[2:4].mean()}
    expected |= {"loss_bin_2": errors[4], "loss_bin_3": errors[5]}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_a_part_without_timesteps_has_no_loss(batch: dict[str, Any]) -> None:
    found = evaluate(Diffusion(bins=10), Scale(), [batch])
    assert math.isnan(found["loss_bin_1"])
    assert not math.isnan(found["loss_bin_0"])


def test_a_loss_that_is_not_finite_is_shown_where_it_is(batch: dict[str, Any]) -> None:
    batch["target"][5] = math.nan
    found = evaluate(Diffusion(bins=4), Scale(), [batch])
    assert math.isnan(found["loss"])
    assert [math.isnan(found[f"loss_bin_{number}"]) for number in range(4)] == [False, False, False, True]


def test_models_are_compared_with_a_reference(batch: dict[str, Any]) -> None:
    reference = Scale(0.25).eval()(**batch["inputs"]).sample
    found = evaluate(Diffusion(compares=True), Scale(0.5), [{**batch, "reference": reference}])
    expected = (batch["inputs"]["hidden_states"] / 4).square().mean()
    assert found["output_mse"] == pytest.approx(float(expected), rel=1e-5)
    alike = evaluate(Diffusion(compares=True), Scale(0.25), [{**batch, "reference": reference}])
    assert alike["output_mse"] == 0.0


def test_the_prediction_is_found_in_every_kind_of_output() -> None:
    wanted, target = torch.randn(SHAPE), torch.zeros(SHAPE)
    both = torch.cat([wanted, torch.zeros(SHAPE)], 1)
    for outputs in (wanted, (wanted,), SimpleNamespace(sample=wanted), both, (both,), SimpleNamespace(sample=both)):
        assert torch.equal(prediction(outputs, target), wanted)
    with pytest.raises(ValueError, match=r"expected the target's shape \(6, 4, 3, 3\), got \(6, 4, 3, 2\)"):
        prediction(wanted[..., :2], target)
    with pytest.raises(TypeError, match="an object with a sample, got SimpleNamespace"):
        prediction(SimpleNamespace(), target)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_evaluation_restores_the_mode_of_every_module(training: bool, batch: dict[str, Any]) -> None:
    model = Scale().train(training)
    model.kept.eval()
    evaluate(Diffusion(), model, [batch])
    assert [module.training for module in (model, model.dropout, model.kept)] == [training, training, False]


def test_evaluation_brings_inputs_in_the_serving_dtype(batch: dict[str, Any]) -> None:
    model = Scale()
    evaluate(Diffusion(), model, [batch], torch.bfloat16)
    evaluate(Diffusion(), model, [batch])
    assert model.dtypes == [torch.bfloat16, torch.float32]
