"""The learning rate of a step, the fields of the schedule that exclude each other, and the strength of CAGE."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

import qat
from qat.training.schedule import Decay, rate_factor


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(40, 8), (7, 0), (1, 0), (100, None)], ids=str)
def test_a_rate_rises_to_its_peak_and_falls_to_zero(steps: int, warmup: int | None, decay: Decay) -> None:
    rises = steps // 20 if warmup is None else warmup
    rates = [rate_factor(step, steps, warmup, decay) for step in range(steps)]
    assert rates[:rises] == pytest.approx([(step + 1) / rises for step in range(rises)])
    assert all(rate > 0 for rate in rates)
    assert rates[rises] == max(rates) == 1.0
    fall, rest = rates[rises:], steps - rises
    expected = {
        "cosine": [math.cos(math.pi / 2 * step / rest) ** 2 for step in range(rest)],
        "linear": [(rest - step) / rest for step in range(rest)],
        "constant": [1.0] * rest,
    }
    assert fall == pytest.approx(expected[decay])
    after = 1.0 if decay == "constant" else 0.0
    assert [rate_factor(steps + more, steps, warmup, decay) for more in (0, 5)] == [after, after]


def test_a_warm_up_that_is_longer_than_the_training_only_rises() -> None:
    assert [rate_factor(step, 2, 4) for step in range(2)] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((0, math.inf), r"decay: 'cosine' with warmup=None needs the number of steps, got inf: set max_steps"),
        ((0, math.inf, 3, "linear"), "needs the number of steps"),
        ((0, math.inf, None, "constant"), "'constant' with warmup=None needs the number of steps"),
        ((0, 0), "needs the number of steps, got 0"),
        ((0, 10, 2, "exponential"), "decay: must be one of cosine, linear, constant, got 'exponential': choose one"),
    ],
    ids=["unlimited", "unlimited, linear", "a share of unlimited steps", "no step", "unknown"],
)
def test_a_rate_without_what_it_needs_is_refused(arguments: Any, rule: str) -> None:
    with pytest.raises(qat.TrainingError, match=rule):
        rate_factor(*arguments)
    assert rate_factor(5, math.inf, 3, "constant") == 1.0


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"first_weights": "int4"}, "first_weights and first_weights_until need each other"),
        ({"first_weights_until": 4}, "first_weights and first_weights_until need each other"),
        ({"first_weights": "int3", "first_weights_until": 4}, "first_weights: .*'int4'.* got 'int3'"),
        ({"first_weights": "int4", "first_weights_until": 0}, "greater than or equal to 1"),
        (
            {"first_weights": "int4", "first_weights_until": 4, "start_step": 4},
            r"first_weights_until \(4\) must come after start_step \(4\)",
        ),
        (
            {"first_weights": "int4", "first_weights_until": 4, "hold_scales_from": 4},
            r"hold_scales_from \(4\) must come after first_weights_until \(4\)",
        ),
        ({"cage": -1}, "cage: .*greater than or equal to 0"),
        ({"cage_from": 1.0}, "cage_from: .*less than 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_excludes_each_other_is_refused(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(qat.SpecError, match=rule):
        qat.QuantizationSchedule(**fields)


def test_first_weights_last_until_their_step() -> None:
    schedule = qat.QuantizationSchedule(first_weights="int4", first_weights_until=3, start_step=1)
    assert [schedule.begins_with_first_weights(step) for step in range(5)] == [True, True, True, False, False]
    assert schedule.settled_from == 3
    assert not qat.QuantizationSchedule().begins_with_first_weights(0)


@pytest.mark.parametrize("steps", [5, 10, 33])
def test_the_pull_of_cage_rises_from_nothing_to_its_full_strength(steps: int) -> None:
    schedule = qat.QuantizationSchedule(cage=8.0, cage_from=0.8)
    pulls = [schedule.cage_at(step, steps) for step in range(steps)]
    assert pulls[-1] == pytest.approx(8.0)
    assert all(pull == 0 for step, pull in enumerate(pulls) if step + 1 <= 0.8 * steps)
    rising = [pull for pull in pulls if pull]
    assert len(rising) == math.ceil(steps - 0.8 * steps - 1e-9)
    steps_up = [after - before for before, after in itertools.pairwise(rising)]
    assert steps_up == pytest.approx([8.0 / (0.2 * steps)] * len(steps_up))
    assert qat.QuantizationSchedule().cage_at(steps - 1, steps) == 0


@pytest.mark.parametrize("name", ["start_step", "hold_scales_from", "observe_from"])
def test_what_begins_after_the_fit_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    schedule = qat.QuantizationSchedule(**{name: 8})
    for steps in (None, 9):
        schedule.require_within(steps)
    assert not caplog.records
    schedule.require_within(8)
    assert f"schedule: {name}=8 comes after the fit's end, at step 8: no" in caplog.text
