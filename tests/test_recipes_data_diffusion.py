from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from recipes.data import DataError
from recipes.data.conditioning import Conditioner, calls_of
from recipes.data.diffusion import DiffusionCollate, EvaluationBatches, sampler_batches
from recipes.data.latents import Encoded, Latents
from recipes.data.noising import NoiseSchedule
from tests.pipelines import caption_of, make, size_of

FLOW = NoiseSchedule(FlowMatchEulerDiscreteScheduler())


def encoded_for(name: str, count: int = 10, pipeline: Any = None) -> Encoded:
    """Random latents for a pipeline's transformer, with real conditioning of three captions."""
    conditioner = Conditioner(pipeline or make(name), size_of(name), 12, (caption_of(name, 1), caption_of(name, 2)))
    rows = [conditioner.rows(caption_of(name, number)) for number in range(3)]
    latents = [torch.randn(conditioner.template.sample_shape) for _ in range(count)]
    examples = Latents(latents, rows, [number % 3 for number in range(count)])
    return Encoded(examples, examples, conditioner.template, conditioner.empty, conditioner.guided)


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    torch.manual_seed(0)
    return encoded_for("flux")


def examples_of(encoded: Encoded, count: int = 8) -> list[dict[str, Any]]:
    return [encoded.train[number] for number in range(count)]


def test_a_batch_is_noised_latents_and_what_the_scheduler_asks_for(encoded: Encoded) -> None:
    batch = DiffusionCollate(encoded, FLOW)(examples_of(encoded))
    latents = torch.stack([example["latents"] for example in examples_of(encoded)])
    sigma = batch["inputs"]["timestep"].view(-1, 1, 1)  # of Flux: the timestep over 1000
    noise = batch["target"] + latents
    torch.testing.assert_close(batch["inputs"]["hidden_states"], sigma * noise + (1 - sigma) * latents)
    assert batch["target"].shape == latents.shape
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert batch["inputs"]["encoder_hidden_states"].shape == (8, 12, 32)
    torch.testing.assert_close(batch["fraction"], (sigma.flatten() * 1000 - 1) / 1000)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_timesteps_are_stratified(count: int, encoded: Encoded) -> None:
    collate = DiffusionCollate(encoded, FLOW)
    for _ in range(20):
        fractions = collate(examples_of(encoded, count))["fraction"]
        # A timestep that stands on the border of two parts may be counted with the lower one.
        parts = ((fractions + 0.5 / 1000) * count).long()
        assert sorted(parts.tolist()) == list(range(count))


def test_epsilon_and_integer_timesteps(encoded: Encoded) -> None:
    made = encoded_for("dit")
    scheduler = DDIMScheduler()
    batch = DiffusionCollate(made, NoiseSchedule(scheduler), 0.0)(examples_of(made))
    latents = torch.stack([example["latents"] for example in examples_of(made)])
    times = batch["inputs"]["timestep"]
    assert times.dtype is torch.int64
    assert torch.equal(batch["inputs"]["hidden_states"], scheduler.add_noise(latents, batch["target"], times))
    assert batch["inputs"]["class_labels"].tolist() == [number % 3 for number in range(8)]
    assert torch.equal(batch["fraction"], times / 1000)


def test_noise_is_the_same_for_whoever_starts_from_the_same_seed(encoded: Encoded) -> None:
    collate = DiffusionCollate(encoded, FLOW)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        hidden: Tensor = collate(examples_of(encoded))["inputs"]["hidden_states"]
        return hidden

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_captions_are_dropped_where_a_pipeline_guides() -> None:
    guided, plain, sequential = encoded_for("dit"), encoded_for("flux"), encoded_for("chroma")
    assert DiffusionCollate(guided, FLOW).caption_dropout == 0.1
    assert DiffusionCollate(sequential, FLOW).caption_dropout == 0.1
    assert DiffusionCollate(plain, FLOW).caption_dropout == 0.0
    schedule = NoiseSchedule(DDIMScheduler())
    dropped = [
        int((DiffusionCollate(guided, schedule, 0.25)(examples_of(guided))["inputs"]["class_labels"] == 1000).sum())
        for _ in range(200)
    ]
    assert sum(dropped) / (200 * 8) == pytest.approx(0.25, abs=0.04)
    always = DiffusionCollate(plain, FLOW, 1.0)(examples_of(plain))["inputs"]
    assert plain.empty is not None
    assert all(torch.equal(row, plain.empty["pooled_projections"]) for row in always["pooled_projections"])


def test_captions_cannot_be_dropped_where_there_is_no_such_thing(encoded: Encoded) -> None:
    without = Encoded(encoded.train, encoded.evaluation, encoded.template, None, False)
    DiffusionCollate(without, FLOW)
    with pytest.raises(DataError, match=r"^caption_dropout: 0\.1 needs a pipeline that can do without"):
        DiffusionCollate(without, FLOW, 0.1)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return bool(a == b)


def test_evaluation_batches_are_the_same_at_every_pass(encoded: Encoded) -> None:
    batches = EvaluationBatches(encoded.evaluation, encoded, FLOW, 4, seed=1)
    torch.manual_seed(0)
    first = list(batches)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    second = list(batches)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(batch["fraction"]) for batch in first] == [4, 4, 2]
    assert len(batches) == 3
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    other = next(iter(EvaluationBatches(encoded.evaluation, encoded, FLOW, 4, seed=2)))
    assert not torch.equal(other["target"], first[0]["target"])


def test_evaluation_keeps_every_caption() -> None:
    made = encoded_for("dit")
    batches = list(EvaluationBatches(made.evaluation, made, NoiseSchedule(DDIMScheduler()), 10))
    assert batches[0]["inputs"]["class_labels"].tolist() == [number % 3 for number in range(10)]


class Half(nn.Module):
    """Returns half of the latents, as a tuple or as an object."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, hidden_states: Tensor, **_: Any) -> Sequence[Tensor]:
        return (hidden_states * self.factor,)


def test_a_reference_is_what_the_model_returned(encoded: Encoded) -> None:
    batches = EvaluationBatches(encoded.evaluation, encoded, FLOW, 4)
    assert all("reference" not in batch for batch in batches)
    model = Half()
    batches.compare_with(model)
    for batch in batches:
        assert torch.equal(batch["reference"], batch["inputs"]["hidden_states"] / 2)
        assert not batch["reference"].requires_grad


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_sampler_batches_are_the_real_samplers(name: str) -> None:
    pipeline = make(name)
    captions = [caption_of(name, number) for number in range(4)]
    found = sampler_batches(pipeline, captions, 6, 16, max_sequence_length=12, steps=5, batch_size=2, seed=3)
    assert len(found) == 6
    runs = [
        calls_of(pipeline, captions[start : start + 2], 16, max_sequence_length=12, seed=seed, num_inference_steps=5)
        for start, seed in ((0, 3), (2, 4))
    ]
    rows = 2 if name == "flux" else 4  # with both branches of guidance
    assert all(len(batch["hidden_states"]) == rows for batch in found)
    for number, batch in enumerate(found):
        assert sum(equal(batch, call) for call in runs[number // 3]) == 1
    with torch.no_grad():
        assert torch.isfinite(pipeline.transformer(**found[0])[0]).all()


@pytest.mark.parametrize("count", [4, 5])
def test_sampler_batches_have_both_calls_of_a_guided_step(count: int) -> None:
    pipeline = make("chroma")
    found = sampler_batches(pipeline, ["the digit one"] * 4, count, 16, max_sequence_length=12, steps=6, batch_size=2)
    assert len(found) == count + count % 2
    for captioned, empty in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(captioned["timestep"], empty["timestep"])
        assert torch.equal(captioned["hidden_states"], empty["hidden_states"])
        assert not torch.equal(captioned["encoder_hidden_states"], empty["encoder_hidden_states"])
    assert len({float(batch["timestep"][0]) for batch in found}) >= 2


def test_evaluation_timesteps_are_spread_over_all_examples(encoded: Encoded) -> None:
    for size in (1, 4, 10):  # also where no batch has one of each part
        batches = list(EvaluationBatches(encoded.evaluation, encoded, FLOW, size))
        parts = (torch.cat([batch["fraction"] for batch in batches]) + 0.5 / 1000) * 10
        assert sorted(parts.long().tolist()) == list(range(10))


def test_sampler_batches_cover_all_timesteps() -> None:
    pipeline = make("flux")
    found = sampler_batches(pipeline, ["the digit one"] * 8, 10, 16, max_sequence_length=12, steps=10, batch_size=4)
    times = sorted(float(batch["timestep"][0]) for batch in found)
    assert len(found) == 10
    assert len(set(times)) >= 7
    assert times[0] <= 0.2
    assert times[-1] >= 0.9
    few = sampler_batches(pipeline, ["the digit one"], 3, 16, max_sequence_length=12, steps=10, batch_size=4)
    assert len({float(batch["timestep"][0]) for batch in few}) == 3  # a single run's calls are spread too
