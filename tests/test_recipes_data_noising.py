from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from recipes.data import DataError
from recipes.data.noising import NoiseSchedule, stratified

# diffusers' own conversion of tensors, with the newest numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SCHEDULERS: dict[str, Any] = {
    "flow matching": FlowMatchEulerDiscreteScheduler(),
    "DDIM, epsilon": DDIMScheduler(clip_sample=False),
    "DDIM, velocity": DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "DDIM, sample": DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "DPM solver, epsilon": DPMSolverMultistepScheduler(solver_order=1),
    "DPM solver, velocity": DPMSolverMultistepScheduler(solver_order=1, prediction_type="v_prediction"),
    "DPM solver, leading, Karras": DPMSolverMultistepScheduler(
        solver_order=1, timestep_spacing="leading", use_karras_sigmas=True
    ),
}


@pytest.fixture
def sample() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8)


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_target_leads_the_sampler_from_one_timestep_to_the_next(
    name: str, sample: torch.Tensor, noise: torch.Tensor
) -> None:
    """Whoever answers with the target is led along the noised samples, by the scheduler's own step."""
    schedule, sampler = NoiseSchedule(SCHEDULERS[name]), SCHEDULERS[name]
    if "Karras" in name:  # only spaces the steps
        sampler = type(sampler).from_config(sampler.config, use_karras_sigmas=False)
    sampler.set_timesteps(10)
    assert set(sampler.timesteps.tolist()) <= set(schedule.timesteps.tolist())
    for time, following in zip(sampler.timesteps[:-1], sampler.timesteps[1:], strict=True):
        times = time.expand(3)
        answer = schedule.target(sample, noise, times)
        stepped = sampler.step(answer, time, schedule.noised(sample, noise, times)).prev_sample
        expected = schedule.noised(sample, noise, following.expand(3))
        torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)


def test_flow_matching_is_exactly_the_schedulers(sample: torch.Tensor, noise: torch.Tensor) -> None:
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    fresh = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = fresh.timesteps[torch.tensor([0, 400, 999])]
    sigma = (times / 1000).view(3, 1, 1, 1)
    torch.testing.assert_close(schedule.noised(sample, noise, times), sigma * noise + (1 - sigma) * sample)
    assert torch.equal(schedule.noised(sample, noise, times), fresh.scale_noise(sample, times, noise))
    assert torch.equal(schedule.target(sample, noise, times), noise - sample)
    assert torch.equal(schedule.timesteps, fresh.timesteps.flip(0))


def test_flow_prediction_of_another_scheduler(sample: torch.Tensor, noise: torch.Tensor) -> None:
    """Sana's: noised samples lie on the straight line from sample to noise, at the place that the timestep says."""
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    schedule = NoiseSchedule(solver)
    times = schedule.timesteps[torch.tensor([0, 500, 998])]
    target = schedule.target(sample, noise, times)
    assert torch.equal(target, noise - sample)
    places = ((schedule.noised(sample, noise, times) - sample) / target).flatten(1).median(1).values
    # Its timesteps are whole numbers; where several round to one, either is meant.
    torch.testing.assert_close(places, times / 1000, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler], ids=lambda kind: kind.__name__)
def test_velocity_is_the_schedulers_own(kind: Any, sample: torch.Tensor, noise: torch.Tensor) -> None:
    scheduler = kind(prediction_type="v_prediction")
    times = torch.tensor([0, 500, 999])
    expected = scheduler.get_velocity(sample, noise, times)
    assert torch.equal(NoiseSchedule(scheduler).target(sample, noise, times), expected)
    solver = DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_start=0.0001, beta_end=0.02)
    found = NoiseSchedule(solver).target(sample, noise, times[1:2].expand(3))
    torch.testing.assert_close(found, scheduler.get_velocity(sample, noise, times[1:2].expand(3)), rtol=1e-4, atol=1e-5)


def test_the_pipelines_scheduler_is_left_alone() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    NoiseSchedule(scheduler)
    assert torch.equal(scheduler.timesteps, before)


def test_dynamic_shifting_is_for_sampling() -> None:
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    torch.testing.assert_close(schedule.timesteps, torch.arange(1.0, 1001.0))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler scales what the model sees"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "adds noise in no known way"),
        (DDIMScheduler(prediction_type="other"), "unknown prediction_type 'other'"),
    ],
    ids=["scaled input", "inverted", "unknown prediction"],
)
def test_schedulers_that_are_not_understood(scheduler: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        NoiseSchedule(scheduler)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_stratified_numbers_have_one_in_each_part(count: int) -> None:
    for seed in range(50):
        drawn = stratified(count, torch.Generator().manual_seed(seed))
        assert sorted((drawn * count).long().tolist()) == list(range(count))
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) < 1
