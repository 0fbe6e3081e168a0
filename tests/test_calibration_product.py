"""`qat.calibrate` by itself: a float model in, a quantized one out, however the model is run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BatchFeature

import qat
from qat.errors import CalibrationError, SpecError, StateError
from qat.layers import QLinear
from qat.spec import QuantSpec
from tests.helpers import tiny_model, tokens
from tests.pipelines import flux

INT8 = QuantSpec(activations="int8", dtype="float32")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 32, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("target", ["quanto", "transformers"])
def test_a_float_model_becomes_a_verified_export(target: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    spec = QuantSpec.model_validate({"activations": kind, "dtype": "float32"})
    inputs = [{"input_ids": tokens(seed=seed)} for seed in range(2)]
    by_hand = copy.deepcopy(model)
    qat.prepare(by_hand, spec, target=target)
    expected = qat.calibrate(by_hand, inputs)
    assert qat.calibrate(model, inputs, spec=spec, target=target) == expected
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=inputs[0])
    assert qat.verify(tmp_path / "out", model).ok


def attributes(model: nn.Module) -> list[Any]:
    return [
        (id(m), type(m), {k: (id(v), list(v) if isinstance(v, dict) else None) for k, v in vars(m).items()})
        for m in model.modules()
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": [{"input_ids": tokens()}, {"wrong": 1}]},
        {"batches": []},
        {"algorithm": "best"},
        {"spec": QuantSpec(exclude="*.nothing")},
        {"forward": lambda *_: 1 / 0},
    ],
    ids=["batch", "no batches", "algorithm", "pattern", "forward"],
)
def test_a_failure_leaves_a_float_model_as_it_was(wrong: dict[str, Any]) -> None:
    model = tiny_model("opt").train()
    spec = INT8.model_copy(update={"include": ("*",)})  # the tied head too
    before, config, numbers = attributes(model), copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
    arguments: dict[str, Any] = {"batches": [{"input_ids": tokens()}], "spec": spec, **wrong}
    with pytest.raises((CalibrationError, SpecError, StateError)):
        qat.calibrate(model, **arguments)
    assert attributes(model) == before
    assert model.config.to_dict() == config.to_dict()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert all(torch.equal(value, numbers[key]) for key, value in model.state_dict().items())
    assert qat.calibrate(model, [{"input_ids": tokens()}], spec=spec).batches == 1
    assert model.lm_head.weight is not model.model.decoder.embed_tokens.weight


class Program:
    """Holds a model, as a pipeline does, and calls it in its own way."""

    def __init__(self, model: nn.Module) -> None:
        self.first, self.rest = model[0], model[1:]  # type: ignore[index]
        self.model = model

    def __call__(self, rows: list[list[float]]) -> list[float]:
        return self.model(torch.tensor(rows)).sum(1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_that_holds_the_model_calibrates_it(dtype: str) -> None:
    model, spec = mlp(), QuantSpec(activations="int8", dtype=dtype)
    expected = qat.calibrate(mlp(), batches(), spec=spec)
    assert expected.arriving == ("2",)
    program = Program(model)
    rows = [x.tolist() for x in batches()]
    assert qat.calibrate(model, rows, spec=spec, forward=lambda _, batch: program(batch)) == expected
    assert isinstance(model[0], QLinear)


@pytest.mark.parametrize(("target", "calls"), [("quanto", 4), ("transformers", 2)])
def test_a_generate_loop_calibrates(target: str, calls: int) -> None:
    model, made = tiny_model("llama"), []

    def generate(model: Any, batch: dict[str, Tensor]) -> None:
        made.append(model.generate(batch.pop("ids"), max_new_tokens=4, do_sample=False, pad_token_id=0))
        assert not batch  # a copy, so that the next pass has it again

    report = qat.calibrate(model, [{"ids": tokens()}], spec=INT8, target=target, forward=generate)
    assert report.batches == 1
    assert len(made) == calls  # as it is served twice: rotary embeddings need float outputs of queries and keys
    assert made[0].shape == (2, 12)
    assert {side.calls for sides in report.layers.values() for side in sides} == {4}  # the prompt, and three tokens
    qat.freeze(model)


def test_a_diffusion_pipeline_calibrates_its_transformer() -> None:
    pipeline, steps = flux(), []
    spec = QuantSpec(activations="int8", dtype="float32")

    def draw(model: nn.Module, prompt: str) -> None:
        assert pipeline.transformer is model
        generator = torch.Generator().manual_seed(0)
        options = {"height": 16, "width": 16, "max_sequence_length": 8, "num_inference_steps": 2}
        steps.append(pipeline(prompt, generator=generator, output_type="pt", **options).images)

    report = qat.calibrate(pipeline.transformer, ["a", "the digit two"], spec=spec, forward=draw)
    assert report.batches == 2
    assert len(steps) == 6
    found = report.layers["transformer_blocks.0.attn.to_q"]
    assert [side.calls for side in found] == [4, 4]  # two steps for each prompt
    qat.freeze(pipeline.transformer)
    pipeline("a", height=16, width=16, max_sequence_length=8, num_inference_steps=1)


@pytest.mark.parametrize("kind", [dict, BatchEncoding, BatchFeature], ids=lambda kind: kind.__name__)
def test_what_processors_of_transformers_return_is_a_batch(kind: Callable[[Any], Any]) -> None:
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 8, dtype=torch.int64), "labels": tokens()}
    model = tiny_model("llama")
    report = qat.calibrate(model, [kind(inputs)], spec=INT8, target="transformers")
    assert report.batches == 1
    with pytest.raises(CalibrationError, match=rf"several batches, got one {kind.__name__}: pass \[batch\]"):
        qat.calibrate(model, kind(inputs))


def test_a_data_loader_brings_lists() -> None:
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=8)
    assert isinstance(next(iter(loader)), list)
    assert qat.calibrate(mlp(), loader, spec=INT8) == qat.calibrate(mlp(), batches(), spec=INT8)
    labelled = DataLoader(TensorDataset(torch.cat(batches()), torch.zeros(24)), batch_size=8)
    with pytest.raises(CalibrationError, match=r"cannot run batch 0 \(TypeError.*say how to run it by forward="):
        qat.calibrate(mlp(), labelled, spec=INT8)
    report = qat.calibrate(mlp(), labelled, spec=INT8, forward=lambda model, batch: model(batch[0]))
    assert report == qat.calibrate(mlp(), batches(), spec=INT8)


def test_progress_counts_both_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "120", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    qat.calibrate(mlp(), iter(batches()), spec=INT8, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrating" in err
    assert "as it is served" in err
    assert "3/3" in err
    qat.calibrate(mlp(), batches(), spec=INT8)
    assert capsys.readouterr() == ("", "")


def test_wrong_arguments_are_told() -> None:
    model = mlp()
    with pytest.raises(StateError, match=r"target: belongs to a spec, got 'quanto' without one: pass spec="):
        qat.calibrate(model, batches(), target="quanto")
    with pytest.raises(CalibrationError, match=r"several batches, got one str: pass \[batch\]"):
        qat.calibrate(model, "text", spec=INT8)
    with pytest.raises(CalibrationError, match=r"batch 0 \(ZeroDivisionError: .*\): mend the function forward"):
        qat.calibrate(model, batches(), spec=INT8, forward=lambda *_: 1 / 0)
    qat.calibrate(model, batches(), spec=INT8)
    with pytest.raises(StateError, match="prepared"):
        qat.calibrate(model, batches(), spec=INT8)
    assert qat.calibrate(model, batches()).batches == 3


@pytest.mark.parametrize("target", ["quanto", "transformers"])
def test_a_calibration_in_inference_mode_leaves_a_model_that_trains(target: str) -> None:
    batch = {"input_ids": tokens()}
    spec, learned = qat.QuantSpec(activations="int8", dtype="float32"), qat.StraightThrough(learn_activations=True)
    for algorithm in (None, learned):
        model = tiny_model("llama")
        with torch.inference_mode():
            qat.calibrate(model, [batch], spec=spec, target=target, algorithm=algorithm)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(p.grad is not None for group in qat.parameter_groups(model, lr=1.0) for p in group["params"])


def test_a_function_may_call_the_compiled_model() -> None:
    batch = {"input_ids": tokens()}
    reports = []
    for compiles in (False, True):
        model = tiny_model("llama")
        called = torch.compile(model, backend="eager") if compiles else model
        called(**batch)
        spec = qat.QuantSpec(activations="int8", dtype="float32")
        run: Callable[[Any, Any], object] = lambda _, b, called=called: called(**b)  # noqa: E731
        reports.append(qat.calibrate(model, [batch], spec=spec, forward=run))
    assert reports[0] == reports[1]
