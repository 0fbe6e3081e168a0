"""What is recorded from a pipeline, put together again, is what the pipeline itself does, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.data import DataError
from recipes.data.conditioning import Conditioner, call_arguments, calls_of, record_calls, timestep_of
from tests.pipelines import PIPELINES, SEQUENTIAL, caption_of, make, size_of

# diffusers' own conversion of tensors, with the newest numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
LENGTH = 12
STEPS = 3


def conditioner_of(name: str, pipeline: Any) -> Conditioner:
    return Conditioner(pipeline, size_of(name), LENGTH, (caption_of(name, 1), caption_of(name, 2)))


def real_call(name: str, pipeline: Any, number: int, **options: Any) -> list[tuple[dict[str, Any], Any]]:
    """Arguments and results of the transformer in an ordinary call of the pipeline, recorded by no code of ours."""
    seen: list[tuple[dict[str, Any], Any]] = []
    signature = inspect.signature(pipeline.transformer.forward)

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((signature.bind(*args, **kwargs).arguments, output))

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    if name == "dit":
        given: dict[str, Any] = {"class_labels": [caption_of(name, number)]}
    else:
        given = {"prompt": caption_of(name, number), "height": size_of(name), "width": size_of(name)}
        given["max_sequence_length"] = LENGTH
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        given["use_resolution_binning"] = False
    pipeline(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1), **given, **options)
    hook.remove()
    return seen


def tensor_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_replayed_arguments_give_exactly_the_pipelines_outputs(name: str) -> None:
    pipeline = make(name)
    conditioner = conditioner_of(name, pipeline)
    rows = conditioner.rows(caption_of(name, 3))
    seen = real_call(name, pipeline, 3)
    times = pipeline.scheduler.timesteps
    assert len(seen) == STEPS * (2 if name in SEQUENTIAL else 1)
    if name in SEQUENTIAL:
        times = times.repeat_interleave(2)
    elif conditioner.guided:
        assert conditioner.empty is not None
        both = [rows, conditioner.empty] if name == "dit" else [conditioner.empty, rows]
    else:
        both = [rows]
    for number, ((arguments, output), time) in enumerate(zip(seen, times, strict=True)):
        if name in SEQUENTIAL:
            assert conditioner.empty is not None
            both = [conditioner.empty if number % 2 else rows]
        filled = conditioner.template.fill(both, arguments["hidden_states"], time.expand(len(both)))
        assert filled["timestep"].dtype == arguments["timestep"].dtype
        assert torch.equal(filled["timestep"], arguments["timestep"])
        assert torch.equal(tensor_of(pipeline.transformer(**filled)), tensor_of(output))


def test_guidance_is_what_each_pipeline_does() -> None:
    found = {name: conditioner_of(name, make(name)) for name in PIPELINES}
    assert [name for name in found if found[name].guided] == ["sd3", "pixart", "dit", "sana", "chroma"]
    distilled = found["flux, guidance-distilled"]
    assert float(distilled.rows(caption_of("flux", 1))["guidance"]) == 3.5  # the pipeline's own default
    assert "guidance" not in found["flux"].rows(caption_of("flux", 1))
    empty = found["dit"].empty
    assert empty is not None
    assert int(empty["class_labels"]) == 1000


def test_each_caption_has_its_own_rows_and_a_batch_has_those_of_all() -> None:
    pipeline = make("flux")
    conditioner = conditioner_of("flux", pipeline)
    rows = [conditioner.rows(caption_of("flux", number)) for number in (1, 2, 3)]
    assert all("hidden_states" not in row and "img_ids" not in row for row in rows)
    filled = conditioner.template.fill(rows, torch.zeros(3, 16, 16), torch.tensor([1.0, 500.0, 1000.0]))
    assert torch.equal(filled["timestep"], torch.tensor([0.001, 0.5, 1.0]))
    together = calls_of(pipeline, [caption_of("flux", n) for n in (1, 2, 3)], 16, max_sequence_length=LENGTH, limit=1)
    for name in ("encoder_hidden_states", "pooled_projections"):
        torch.testing.assert_close(filled[name], together[0][name])
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(filled[name], together[0][name])
    assert filled["encoder_hidden_states"].shape == (3, LENGTH, 32)


def test_recording_stops_the_call_and_leaves_no_hook() -> None:
    pipeline = make("flux")
    ran: list[int] = []
    hook = pipeline.transformer.register_forward_hook(lambda *_: ran.append(1))
    calls = calls_of(pipeline, ["the digit one"], 16, limit=1, max_sequence_length=LENGTH)
    assert (len(calls), ran) == (1, [])
    assert len(calls_of(pipeline, ["the digit one"], 16, num_inference_steps=2, max_sequence_length=LENGTH)) == 2
    hook.remove()
    assert not pipeline.transformer._forward_pre_hooks


def test_recording_draws_no_global_random_numbers() -> None:
    pipeline, before = make("flux"), torch.random.get_rng_state()
    conditioner_of("flux", pipeline)
    assert torch.equal(torch.random.get_rng_state(), before)


class Varying(nn.Module):
    """A transformer as QwenImage's: captions keep their lengths, and a mask comes only where these differ."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        words: Tensor,
        mask: Any = None,
        shapes: Any = None,
        extra: Any = None,
    ) -> Any:
        return hidden_states


class VaryingPipeline:
    """A pipeline around it, and a guide to what is taken for granted of one."""

    def __init__(
        self,
        masked: bool = True,
        told: Callable[[float], float] = lambda time: time / 1000,
        extra: Callable[[list[int]], Any] = lambda lengths: None,
    ) -> None:
        self.transformer = Varying()
        self.scheduler = SimpleNamespace(timesteps=torch.tensor([1000.0, 500.0]))
        self._masked, self._told, self._extra = masked, told, extra

    def __call__(self, prompt: list[str], height: int, width: int) -> None:
        lengths = [len(text.split()) for text in prompt]
        words = torch.zeros(len(prompt), max(lengths), 2)
        for row, length in enumerate(lengths):
            words[row, :length] = length
        mask = torch.arange(max(lengths)).expand(len(prompt), -1) < torch.tensor(lengths)[:, None]
        shown = mask.long() if self._masked and not bool(mask.all()) else None
        shapes = [[(1, height, width)]] * len(prompt)
        for time in self.scheduler.timesteps.tolist():
            times = torch.full((len(prompt),), self._told(time))
            self.transformer(torch.zeros(len(prompt), 4), times, words, shown, shapes, self._extra(lengths))


def test_captions_of_different_lengths_get_the_pipelines_mask() -> None:
    conditioner = Conditioner(VaryingPipeline(), 8, None, ("one", "one two three"))
    rows = [conditioner.rows(text) for text in ("a b", "a b c d", "a")]
    filled = conditioner.template.fill(rows, torch.zeros(3, 4), torch.full((3,), 500.0))
    assert filled["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert filled["mask"].dtype is torch.int64
    assert filled["words"][:, :, 0].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4], [1, 0, 0, 0]]
    assert filled["shapes"] == [[(1, 8, 8)]] * 3
    assert filled["timestep"].tolist() == [0.5] * 3
    alike = conditioner.template.fill([rows[0]] * 2, torch.zeros(2, 4), torch.full((2,), 500.0))
    assert alike["mask"] is None  # as the pipeline does


def test_captions_of_different_lengths_without_a_mask_are_an_error() -> None:
    conditioner = Conditioner(VaryingPipeline(masked=False), 8, None, ("one", "two"))
    rows = [conditioner.rows(text) for text in ("a b", "a")]
    with pytest.raises(DataError, match="captions have different lengths and the pipeline passes no mask"):
        conditioner.template.fill(rows, torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (lambda lengths: lengths, [2, 4]),
        (lambda lengths: [length / 3 for length in lengths], [2 / 3, 4 / 3]),
        (
            lambda lengths: [torch.full((length,), 7.0) for length in lengths],
            [torch.full((2,), 7.0), torch.full((4,), 7.0)],
        ),
        (lambda lengths: torch.arange(max(lengths)), torch.arange(4)),
        (lambda lengths: {"ids": torch.arange(max(lengths))}, {"ids": torch.arange(4)}),
        (lambda lengths: (torch.arange(max(lengths)), 5, [3] * len(lengths)), (torch.arange(4), 5, [3, 3])),
    ],
    ids=["numbers", "fractions", "list of tensors", "ids", "nested", "tuple"],
)
def test_what_depends_on_the_captions_is_each_batchs_own(extra: Any, expected: Any) -> None:
    conditioner = Conditioner(VaryingPipeline(extra=extra), 8, None, ("one", "one two three"))
    rows = [conditioner.rows(text) for text in ("a b", "a b c d")]
    filled = conditioner.template.fill(rows, torch.zeros(2, 4), torch.full((2,), 500.0))
    torch.testing.assert_close(filled["extra"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "extra",
    [
        lambda lengths: max(lengths),
        lambda lengths: [max(lengths)] * len(lengths),
        lambda lengths: [f"{length} words" for length in lengths],
        lambda lengths: torch.full((3,), max(lengths)),
        lambda lengths: torch.zeros(sum(lengths), 2),
        lambda lengths: torch.arange(max(lengths)).flip(0),
        lambda lengths: None if max(lengths) == 1 else 3,
    ],
    ids=["number", "list of the longest", "list of texts", "values", "joined", "no prefix", "none or not"],
)
def test_what_depends_on_the_captions_in_another_way_is_an_error(extra: Any) -> None:
    with pytest.raises(DataError, match=r"^model: the argument extra of the transformer depends on the captions in"):
        Conditioner(VaryingPipeline(extra=extra), 8, None, ("one", "one two three"))


def test_what_only_a_later_caption_changes_is_an_error() -> None:
    pipeline = VaryingPipeline(extra=lambda lengths: {"flag": max(lengths) > 3})
    conditioner = Conditioner(pipeline, 8, None, ("one", "one two three"))
    conditioner.rows("one two")
    with pytest.raises(DataError, match=r"^model: the argument extra\.flag .* caption: it is True, where it was False"):
        conditioner.rows("one two three four")


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (lambda time: 1 - time / 1000, r"\[0\.0, 0\.5\]"),
        (lambda time: 1 - (time - 1) / 1000, r"\[0\.001\d*, 0\.5\d*\]"),
        (lambda time: (time / 1000) ** 0.5, r"\[1\.0, 0\.7\d*\]"),
        (lambda time: -time, r"\[-1000\.0, -500\.0\]"),
    ],
    ids=["reversed", "reversed, not from 0", "root", "negative"],
)
def test_a_timestep_of_another_rule_is_an_error(told: Any, shown: str) -> None:
    with pytest.raises(DataError, match=rf"VaryingPipeline passes the timesteps {shown} for the scheduler's \[1000"):
        Conditioner(VaryingPipeline(told=told), 8, None, ("one", "two"))


def test_a_timestep_that_never_changes_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^model: VaryingPipeline calls its transformer at one timestep only"):
        Conditioner(VaryingPipeline(told=lambda _: 1.0), 8, None, ("one", "two"))


def test_three_calls_a_step_are_an_error() -> None:
    pipeline = VaryingPipeline()
    pipeline.scheduler.timesteps = torch.tensor([1000.0, 1000.0, 1000.0, 500.0])
    with pytest.raises(DataError, match="for one caption and 2 for two, in 3 calls a step, with its default guidance"):
        Conditioner(pipeline, 8, None, ("one", "two"))


def test_guidance_by_two_calls_has_the_uncaptioned_one_as_no_caption() -> None:
    pipeline = make("chroma")
    conditioner = conditioner_of("chroma", pipeline)
    calls = calls_of(pipeline, ["the digit two"], 16, max_sequence_length=LENGTH, num_inference_steps=2)
    times = [timestep_of(call) for call in calls]
    assert times[0] == times[1] != times[2] == times[3]
    assert conditioner.empty is not None
    for path, expected in conditioner.empty.items():
        assert torch.equal(expected, calls[1][path][0])
    assert not torch.equal(conditioner.empty["attention_mask"], calls[0]["attention_mask"][0])


def test_flux_with_true_guidance_is_guided_only_where_it_is_asked_for() -> None:
    pipeline = make("flux")
    plain = type(pipeline).__call__

    class Guiding(type(pipeline)):  # type: ignore[misc]
        @torch.no_grad()
        def __call__(
            self,
            prompt: Any,
            true_cfg_scale: float = 4.0,
            guidance_scale: float = 3.5,
            height: int = 16,
            **options: Any,
        ) -> Any:
            return plain(
                self,
                prompt=prompt,
                negative_prompt=[""] * len(prompt),
                true_cfg_scale=true_cfg_scale,
                guidance_scale=guidance_scale,
                height=height,
                width=height,
                num_inference_steps=2,
                max_sequence_length=LENGTH,
                output_type="latent",
                **options,
            )

    pipeline.__class__ = Guiding
    guided = conditioner_of("flux", pipeline)
    pipeline.__class__ = type(make("flux"))
    assert (guided.guided, conditioner_of("flux", pipeline).guided) == (True, False)
    assert guided.empty is not None
    expected = conditioner_of("flux", pipeline).rows("")
    assert all(torch.equal(guided.empty[path], expected[path]) for path in expected)


def test_the_transformer_runs_where_it_lies() -> None:
    pipeline, seen = VaryingPipeline(), []

    class Elsewhere(Varying):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, hidden_states: Tensor, timestep: Tensor, words: Tensor, *rest: Any) -> Any:
            seen.extend([hidden_states.device.type, timestep.device.type, words.device.type])

    pipeline.transformer = Elsewhere()
    assert [timestep_of(call) for call in calls_of(pipeline, ["one"], 8)] == [1.0, 0.5]
    assert seen == ["meta"] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["flux", "dit", "chroma"])
def test_encoders_may_run_on_a_gpu_without_the_transformer(name: str) -> None:
    pipeline = make(name)
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and part != "transformer":
            module.cuda()
    found, expected = conditioner_of(name, pipeline), conditioner_of(name, make(name))
    assert found.guided == expected.guided
    assert found.rows(caption_of(name, 1)).keys() == expected.rows(caption_of(name, 1)).keys()


def test_a_number_that_no_embedding_stands_for_is_an_error() -> None:
    pipeline = make("dit")
    with pytest.raises(DataError, match=r"^data\.caption_field: the transformer has embeddings .* given 1001: name"):
        calls_of(pipeline, [1001], 16, num_inference_steps=1)
    assert not any(module._forward_pre_hooks for module in pipeline.transformer.modules())


def test_a_size_that_the_pipeline_refuses_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^model: FluxPipeline cannot make an image of size 16 \(ValueError"):
        Conditioner(make("flux"), 16, 10_000, ("the digit one", "the digit two"))


def test_captions_that_are_no_labels_are_an_error() -> None:
    pipeline = make("dit")
    with pytest.raises(DataError, match=r"^data\.caption_field: DiTPipeline takes class labels, and 'a cat' is none"):
        call_arguments(pipeline, ["a cat"], 16)
    pipeline.labels = {"a cat": 7}
    assert call_arguments(pipeline, ["a cat", 3, "5"], 16)["class_labels"] == [7, 3, 5]


def test_a_pipeline_without_prompts_is_an_error() -> None:
    class Other:
        def __call__(self, sound: str) -> None: ...

    with pytest.raises(DataError, match="Other takes neither prompts nor class labels"):
        call_arguments(Other(), ["x"], 16)


def test_calls_are_recorded_by_name() -> None:
    layer = nn.Bilinear(2, 3, 1)
    with record_calls(layer) as calls:
        layer(torch.ones(1, 2), input2=torch.ones(1, 3))
    assert list(calls[0]) == ["input1", "input2"]
