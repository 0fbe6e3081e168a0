"""Starts from data in a model: what is chosen, that it holds, and that what was trained is left alone."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError, SpecError, StateError
from qat.layers import quantized_layers
from qat.starting import awaiting
from qat.training.annealing import begin_with, end_first_type
from tests.helpers import same_bits, tiny_model, tokens
from tests.training_modules import UserModule, layers_of, loader, quantization, quiet_trainer

INT2 = qat.QuantSpec(weights="int2", dtype="float32")


class Sparse(nn.Module):
    """Only `used` is used, and only if it is asked for both are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.after, self.other = nn.Linear(256, 64), nn.Linear(64, 32), nn.Linear(256, 64)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y = self.used(x) + (self.other(x) if both else 0)
        return self.after(y.relu())


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(16, 256, generator=generator)
    return [torch.randn(40, 16, generator=generator) @ mixing for _ in range(count)]


def started(start: str = "best", spec: qat.QuantSpec = INT2, **options: Any) -> tuple[nn.Module, Any]:
    model = Sparse()
    report = qat.calibrate(model, batches(), spec=spec, algorithm=qat.LearnedAffine(start=start), **options)  # type: ignore[arg-type]
    return model, report


def output_errors(model: nn.Module) -> list[float]:
    """Of `used` and of the whole model, against the float model."""
    x, wanted = torch.cat(batches()).double(), Sparse()
    with torch.no_grad():
        value = model.used.weight_quantizer.quantize(model.used.weight, torch.float32).value.double()  # type: ignore[union-attr, operator]
        error = (x @ (value - wanted.used.weight.double()).t()).square().sum(1).mean()
        return [float(error), float((model(x.float()) - wanted(x.float())).square().mean())]


@pytest.mark.parametrize("start", ["output", "gptq", "best"])
@pytest.mark.parametrize("weights", ["int8", "float8", "int4", "int2"])
def test_outputs_are_closer_to_float_than_with_clip(weights: str, start: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = qat.QuantSpec.model_validate({"weights": weights, "dtype": "float32"})
    model, report = started(start, spec)
    before = Sparse()
    qat.prepare(before, spec, algorithm=qat.LearnedAffine())
    assert all(found < other for found, other in zip(output_errors(model), output_errors(before), strict=True))
    assert list(report.starts) == ["used", "after", "other"]
    for name in ("used", "after"):
        found = report.starts[name]
        assert found.after < found.before
        assert found.start == start or start == "best"
    x = torch.cat(batches())
    share = output_errors(model)[0] / float((x @ Sparse().used.weight.detach().t()).square().sum(1).mean())
    assert report.starts["used"].after == pytest.approx(share, rel=1e-3)
    assert report.starts["other"].start == "clip"
    assert math.isnan(report.starts["other"].after)
    assert "no batch reached 1 layers, which keep the start 'clip': other" in caplog.text
    assert model.other.weight_quantizer.awaited_start() == start  # type: ignore[union-attr, operator]
    lines = report.table().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[name, report.starts[name].start] for name in report.starts]
    assert str(report).startswith("starts of weights: 1 clip, ")


def test_a_second_calibration_and_a_trained_model_are_left_alone() -> None:
    model, _ = started("gptq")
    kept = copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    report = qat.calibrate(model, batches(1))
    assert list(report.starts) == ["other"]  # which was not reached before
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in kept.items())
    report = qat.calibrate(model, [{"x": batches(1)[0], "both": True}])
    assert report.starts["other"].start == "gptq"
    nothing = "nothing to calibrate: no layer has quantized activations, and no weight waits for its start"
    assert str(qat.calibrate(model, batches())) == nothing
    assert [id(p) for p in model.parameters()] == parameters
    trained = Sparse()
    qat.prepare(trained, INT2, algorithm=qat.LearnedAffine(start="best"))
    assert [*awaiting(trained)] == ["used", "after", "other"]
    with torch.no_grad():
        trained.after.weight_quantizer.high_move.add_(0.01)  # type: ignore[union-attr, operator]
    kept = copy.deepcopy(trained.state_dict())
    assert not qat.calibrate(trained, batches()).starts
    assert all(same_bits(tensor, trained.state_dict()[name]) for name, tensor in kept.items())


def test_a_start_is_independent_of_rounds_and_of_shared_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for budget in (4 << 30, 1):
        monkeypatch.setattr("qat.calibration.BUDGET", budget)
        model = tiny_model("llama")
        inputs = [{"input_ids": tokens(4, 16, seed=seed)} for seed in range(3)]
        qat.calibrate(model, inputs, spec=INT2, algorithm=qat.LearnedAffine(start="best"), target="transformers")
        found.append(model.state_dict())
    assert all(same_bits(tensor, found[1][name]) for name, tensor in found[0].items())


def test_before_data_ranges_are_those_of_clip_and_a_checkpoint_holds_what_came() -> None:
    clip, waiting = Sparse(), Sparse()
    qat.prepare(clip, INT2, algorithm=qat.LearnedAffine())
    qat.prepare(waiting, INT2, algorithm=qat.LearnedAffine(start="best"))
    assert all(same_bits(tensor, waiting.state_dict()[name]) for name, tensor in clip.state_dict().items())
    model, _ = started()
    waiting.load_state_dict(model.state_dict())
    assert [*awaiting(waiting)] == ["other"]
    assert same_bits(waiting(batches()[0]), model(batches()[0]))
    model.load_state_dict(Sparse().state_dict())  # a float checkpoint starts afresh
    assert [*awaiting(model)] == ["used", "after", "other"]


def test_activations_get_their_scales_after_the_weights_their_start() -> None:
    model, report = started(spec=qat.QuantSpec(weights="int4", activations="int8", exclude=("other",)))
    assert report.starts.keys() == report.layers.keys() == {"used", "after"}
    assert report.batches == 3
    assert "calibrated 2 layers on 3 batches" in str(report)
    qat.freeze(model)


@pytest.mark.parametrize("spec", [INT2, qat.QuantSpec(weights="int4", activations="int8")], ids=["weights", "both"])
def test_a_calibration_that_fails_changes_nothing(spec: qat.QuantSpec) -> None:
    model = Sparse()
    qat.prepare(model, spec, algorithm=qat.LearnedAffine(start="gptq"))
    kept, training = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    faults: list[tuple[list[Any], str]] = [
        ([], "at least one batch"),
        ([*batches(), torch.ones(2, 3)], "cannot run batch 3"),
        ([torch.full((2, 256), math.nan)], "inf or NaN"),
    ]
    if spec.activations:  # found only after the weights have their start
        faults.append((batches(), "1 layers were never reached"))
    for given, message in faults:
        with pytest.raises(CalibrationError, match=message):
            qat.calibrate(model, given)
        assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in kept.items())
        assert [module.training for module in model.modules()] == training
        assert all(layer.mode.weights for _, layer in quantized_layers(model))


def test_seq_is_refused_before_anything_changes() -> None:
    model = Sparse()
    with pytest.raises(SpecError, match="start='seq'"):
        qat.prepare(model, qat.QuantSpec(weights="int2", overrides={"after": "int4"}), algorithm=_seq())
    assert not [*quantized_layers(model)]
    assert qat.prepare(model, INT2, algorithm=_seq()).layers == ("used", "after", "other")


def _seq() -> qat.LearnedAffine:
    return qat.LearnedAffine(start="seq")


@pytest.mark.parametrize("count", [2, 0])
def test_a_fit_gives_weights_their_start_from_its_own_batches(
    count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = qat.QuantSpec(weights="int4")
    algorithm = qat.LearnedAffine(start="output")
    module, wanted = UserModule(), UserModule()
    wanted.load_state_dict(module.state_dict())
    callback = quantization(spec, algorithm, calibration_batches=count)
    with caplog.at_level(logging.INFO, "qat"):
        quiet_trainer(tmp_path, callback, max_steps=1).fit(module, loader())
    assert ("begin with the start 'clip'" in caplog.text) == (count == 0)
    qat.prepare(wanted.model, spec, algorithm=algorithm)
    if count:
        qat.calibrate(wanted.model, [x for x, _ in [*loader()][:count]])
    starts = [
        [layer.weight_quantizer.high_start for layer in layers_of(one)]  # type: ignore[attr-defined]
        for one in (module, wanted)
    ]
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))
    assert any(bool(layer.weight_quantizer.high_move.any()) for layer in layers_of(module))  # type: ignore[attr-defined]


def test_blocks_are_not_reconstructed_towards_compensated_weights() -> None:
    model, _ = started("gptq")
    with pytest.raises(StateError, match="its start \\(gptq or best\\) has changed the float weights"):
        qat.reconstruct(model, batches(), steps=1, blocks=["used"])
    reloaded = Sparse()
    masters = {name: tensor.clone() for name, tensor in reloaded.state_dict().items()}
    qat.prepare(reloaded, INT2, algorithm=qat.LearnedAffine(start="gptq"))
    reloaded.load_state_dict(model.state_dict())
    begin_with(reloaded, "int4")
    with pytest.raises(StateError, match="has changed the float weights"):
        qat.reconstruct(reloaded, batches(), steps=1, blocks=["used"])
    reloaded.load_state_dict(masters)  # the float ones
    qat.reconstruct(reloaded, batches(), steps=1, blocks=["used"])


def trained_without_data(kind: str) -> nn.Module:
    """A model whose masters one step has moved, and whose ranges none."""
    model = Sparse()
    qat.prepare(model, INT2, algorithm=qat.LearnedAffine(start="gptq"))
    if kind == "frozen ranges":
        for _, layer in quantized_layers(model):
            layer.weight_quantizer.requires_grad_(False)
    groups = qat.parameter_groups(model, lr=1e-3, scale_lr=0.0)
    optimizer = torch.optim.SGD(groups[:1] if kind == "ranges that no optimizer holds" else groups)
    model(batches(1)[0], both=True).sum().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("kind", ["rate 0", "frozen ranges", "ranges that no optimizer holds"])
def test_what_was_trained_never_starts_again(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = trained_without_data(kind)
    assert "3 layers train from the start 'clip', for theirs needs data: call qat.calibrate" in caplog.text
    assert not any(bool(p.any()) for _, layer in quantized_layers(model) for p in layer.weight_quantizer.parameters())
    loaded = Sparse()
    qat.prepare(loaded, INT2, algorithm=qat.LearnedAffine(start="gptq"))
    loaded.load_state_dict(model.state_dict())
    for one in (model, loaded):
        kept = copy.deepcopy(one.state_dict())
        assert str(qat.calibrate(one, batches())).startswith("nothing to calibrate: ")
        assert all(same_bits(tensor, one.state_dict()[name]) for name, tensor in kept.items())


def test_a_fit_with_held_ranges_is_training_too(tmp_path: Path) -> None:
    module = UserModule()
    callback = quantization(INT2, qat.LearnedAffine(start="best"), hold_scales_from=0, calibration_batches=0)
    quiet_trainer(tmp_path, callback, max_steps=1).fit(module, loader())
    assert not awaiting(module.model)


def test_a_change_of_type_in_a_loop_of_ones_own_takes_new_data() -> None:
    model = Sparse()
    qat.prepare(model, INT2, algorithm=qat.LearnedAffine(start="best"))
    begin_with(model, "int4")
    inputs = [{"x": batch, "both": True} for batch in batches()]
    assert len(qat.calibrate(model, inputs).starts) == 3
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))

    def step() -> None:
        model(**inputs[0]).sum().backward()
        optimizer.step()

    step()
    assert not awaiting(model)
    end_first_type(model, [optimizer])
    waiting = copy.deepcopy(model)
    assert len(qat.calibrate(waiting, inputs).starts) == 3
    step()  # without data, by an optimizer that has stepped before
    assert not awaiting(model)
    assert not qat.calibrate(model, inputs).starts


def test_freezing_says_which_layers_lack_the_data_of_their_start(caplog: pytest.LogCaptureFixture) -> None:
    model = Sparse()
    qat.prepare(model, INT2, algorithm=qat.LearnedAffine(start="best"))
    model(torch.ones(1, 256), both=True)
    with caplog.at_level(logging.WARNING):
        qat.freeze(model)
    assert "3 layers are frozen as they start with 'clip'" in caplog.text


def test_weights_that_were_tied_after_prepare_are_refused() -> None:
    model = Sparse()
    qat.prepare(model, INT2, algorithm=qat.LearnedAffine(start="gptq"))
    model.other.weight = model.used.weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"layers 'used' and 'other' have one weight, tied after qat\.prepare"):
        qat.calibrate(model, [(x, True) for x in batches()])
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
