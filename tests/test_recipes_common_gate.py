"""Paired comparisons of losses, and what a recipe says of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scipy import stats

import qat
from recipes.common.gate import Gate, compare_losses
from recipes.common.settings import OptimizationSettings


def noisy(count: int, gap: float, noise: float, seed: int) -> tuple[list[float], list[float]]:
    """Losses that vary much from batch to batch, and those of a model that is worse by a gap and some noise."""
    draw = random.Random(seed)
    reference = [draw.uniform(1.0, 5.0) for _ in range(count)]
    return [loss + gap + draw.gauss(0, noise) for loss in reference], reference


@pytest.mark.parametrize("seed", range(20))
def test_the_two_numbers_are_those_of_a_paired_t_test(seed: int) -> None:
    losses, reference = noisy(5 + seed, 0.01, 0.02, seed)
    found = compare_losses(losses, "float", reference)
    assert found is not None
    test = stats.ttest_rel(losses, reference)
    assert found.difference / found.standard_error == pytest.approx(test.statistic)
    assert (found.reference, found.batches) == ("float", 5 + seed)
    assert found.worse == (test.statistic > 2)


def test_a_gap_far_below_the_spread_of_the_batches_is_seen() -> None:
    losses, reference = noisy(64, 0.01, 0.005, 1)
    found, reverse = compare_losses(losses, "float", reference), compare_losses(reference, "float", losses)
    assert found is not None
    assert reverse is not None
    assert (found.worse, reverse.worse) == (True, False)
    assert found.standard_error < 0.01 / 5


def test_what_cannot_be_compared_is_not() -> None:
    assert compare_losses([1.0], "float", [2.0]) is None
    assert compare_losses([1.0, float("nan")], "float", [2.0, 2.0]) is None
    assert compare_losses([1.0, float("inf")], "float", [2.0, 2.0]) is None
    with pytest.raises(ValueError, match="losses: 2 batches cannot be paired with 1: use the same"):
        compare_losses([1.0, 2.0], "float", [1.0])


def gate(losses: dict[str, list[float]], **settings: Any) -> Gate:
    spec, algorithm = qat.QuantSpec(weights="int4"), qat.StraightThrough()
    return Gate(losses, "tuned", "quantized", "trained", OptimizationSettings(**settings), spec, algorithm)


def test_it_says_early_that_there_is_nothing_to_gain(capsys: pytest.CaptureFixture[str]) -> None:
    quantized, tuned = noisy(16, 0.0, 0.05, 3)
    said = gate({"tuned": tuned, "quantized": quantized})
    said.before_training()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: post-training quantization is within noise of the fine-tuned float model (loss ")
    assert "over 16 batches): training can gain nothing" in line
    assert "quantize to fewer bits" in line
    assert said.found["quantized"].remark == line


def test_it_says_what_to_change_when_training_ended_worse(capsys: pytest.CaptureFixture[str]) -> None:
    trained, quantized = noisy(16, 0.2, 0.05, 4)
    losses = {"tuned": [loss - 1 for loss in quantized], "quantized": quantized}
    said = gate(losses, learning_rate=3e-4, steps=80, distillation={"weight": 0.5})
    said.before_training()
    assert capsys.readouterr().out == ""
    losses["trained"] = trained
    said.after_training()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: quantization-aware training ended worse than post-training quantization (loss +0.")
    for change in (
        "learning_rate (now 0.0003",
        "algorithm (now straight_through: try learned_affine with start best)",
        "distillation.weight (now 0.5: try 1)",
        "80: try four",
    ):
        assert change in line
    assert said.found["trained"].remark == line
    assert said.found["quantized"].remark is None
    full = gate(losses)
    full.after_training()
    assert "distillation.weight" not in capsys.readouterr().out


def test_it_says_nothing_of_a_gain_or_of_models_that_were_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    quantized, trained = noisy(16, 0.2, 0.05, 6)
    said = gate({"quantized": quantized, "trained": trained})
    said.before_training()
    said.after_training()
    assert capsys.readouterr().out == ""
    assert said.found.keys() == {"trained"}
    gate({"trained": trained}).after_training()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("weights", "algorithm", "advice"),
    [
        ("int4", qat.Automatic(), "algorithm.start (now output: try best), "),
        ("int2", qat.LearnedAffine(start="clip", mask_margin=0.5), "algorithm.start (now clip: try best), "),
        ("int2", qat.StretchedElastic(), "algorithm (now stretched_elastic: try learned_affine with start best), "),
        ("int4", qat.Automatic(start="best"), ""),
        ("int4", qat.LearnedAffine(start="best"), ""),
        ("int8", qat.Automatic(), ""),
        ("float8", qat.StraightThrough(), ""),
        ("int8", qat.LearnedAffine(start="best"), "algorithm (now learned_affine: try straight_through), "),
    ],
    ids=str,
)
def test_its_advice_fits_the_type_and_differs_from_what_is_set(
    weights: Any, algorithm: Any, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, quantized = noisy(16, 0.2, 0.05, 4)
    losses, settings = {"quantized": quantized, "trained": trained}, OptimizationSettings()
    spec = qat.QuantSpec(weights=weights)
    Gate(losses, "tuned", "quantized", "trained", settings, spec, algorithm).after_training()
    said = capsys.readouterr().out
    assert f"three times as much), {advice}optimization.steps (now " in said
