"""What calibration decides: scales by the layer's output, layers that keep float activations, outputs by target."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.calibration import calibrate
from qat.files.evidence import frozen_record
from qat.hosts import get_target
from qat.layers import quantized_layers
from qat.spec import QuantSpec
from tests.helpers import tiny_model, tokens

F32 = {"weights": "int8", "activations": "int8", "dtype": "float32"}


def with_outliers() -> tuple[nn.Sequential, Tensor]:
    """A model with one channel of outliers that small weights follow; equal in float to one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    x = torch.randn(256, 64)
    with torch.no_grad():
        model[0].weight[:, 0] /= 200
    x[:, 0] *= 200
    return model, x


def output_error(model: nn.Module, wanted: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - wanted).square().sum() / wanted.square().sum())


def test_the_default_bears_outliers_that_a_maximum_does_not() -> None:
    errors = {}
    for name, rule in (("best", qat.Best(largest_error=1.0)), ("absmax", qat.Absmax()), ("mse", qat.Mse())):
        model, x = with_outliers()
        with torch.no_grad():
            wanted = model(x)
        qat.prepare(model, QuantSpec(**F32), observer=rule)
        calibrate(model, x.split(64))
        errors[name] = output_error(model, wanted, x)
    assert errors["best"] * 3 < min(errors["absmax"], errors["mse"])
    assert errors["best"] < 0.02


class Spiky(nn.Module):
    """Two layers; of the first one's outputs a few are huge, all are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 16)
        with torch.no_grad():
            self.first.weight[0] *= 300

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        scaled = h / torch.where(torch.arange(64) == 0, 300.0, 1.0)
        y: Tensor = self.second(scaled.tanh())
        return y


def calibrated(**options: Any) -> tuple[Spiky, qat.CalibrationReport]:
    model = Spiky()
    qat.prepare(model, QuantSpec(**F32), observer=qat.Best(**options))
    return model, calibrate(model, [torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)])


def test_a_layer_whose_output_would_be_too_far_off_keeps_float_activations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, report = calibrated(largest_error=1e-6)
    assert list(report.kept_float) == ["first", "second"]
    assert "2 layers keep float activations" in caplog.text
    model, report = calibrated(largest_error=(report.layers["first"][1].error + report.layers["second"][1].error) / 2)
    (kept,) = report.kept_float
    assert str(report).endswith("; 1 layers keep float activations")
    layers = dict(quantized_layers(model))
    assert layers[kept].activation_qtype is None
    x, architecture = torch.randn(8, 64), Spiky()
    trained = model(x).detach()
    copied = copy.deepcopy(model)
    qat.freeze(model)
    evidence = frozen_record(model).layers
    assert [name for name, layer in evidence.items() if layer.activations is None] == [kept]
    assert f"calibration left the activations of 1 layers float: {kept}" in frozen_record(model).notes
    assert float((model(x) - trained).abs().max()) <= 0.02 * float(trained.abs().max())
    qat.export(model, tmp_path / "out", example_inputs=x)
    assert qat.verify(tmp_path / "out", model, model=architecture).ok
    # A second calibration, after training, leaves the choice as it was trained.
    assert list(calibrate(copied, [torch.randn(32, 64)]).kept_float) == [kept]


def test_the_choice_survives_a_checkpoint() -> None:
    model, report = calibrated(largest_error=1e-6)
    again = Spiky()
    qat.prepare(again, QuantSpec(**F32))
    again.load_state_dict(model.state_dict())
    assert [layer.activation_qtype for _, layer in quantized_layers(again)] == [None, None]
    assert list(report.kept_float) == ["first", "second"]


def test_other_rules_leave_no_layer_out() -> None:
    model, x = with_outliers()
    qat.prepare(model, QuantSpec(**F32), observer=qat.Absmax())
    assert not calibrate(model, [x]).kept_float


def test_the_table_has_a_line_for_each_input_and_output() -> None:
    model, report = calibrated(largest_error=1.0)
    lines = report.table().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, side] for name in ("first", "second") for side in ("input", "output")
    ]
    found = report.layers["first"][0]
    scale = dict(quantized_layers(model))["first"].input_quantizer.scale
    assert found.scale == float(scale)
    assert found.calls == 3
    assert 0 <= found.saturated < 0.05
    assert 0.5 < found.utilization <= 1
    assert 0 < found.error < 0.01


@pytest.mark.parametrize(
    ("target", "asked", "outputs"),
    [
        ("quanto", None, True),
        ("quanto", True, True),
        ("transformers", None, False),
        ("transformers", True, True),
        ("transformers", False, False),
    ],
)
def test_outputs_stay_float_where_the_loader_can_leave_them_so(target: str, asked: bool | None, outputs: bool) -> None:
    spec = QuantSpec(**F32, quantize_outputs=asked)
    assert get_target(target).resolved(spec).outputs is outputs
    model = tiny_model("llama")
    report = qat.prepare(model, spec, target=target)
    assert report.inspection.spec.quantize_outputs is outputs
    assert all((layer.output_quantizer is not None) is outputs for _, layer in quantized_layers(model))
    calibrate(model, [{"input_ids": tokens()}])
    qat.freeze(model)
    assert frozen_record(model).spec.quantize_outputs is outputs


def test_a_spec_without_activations_is_left_as_it_is() -> None:
    spec = QuantSpec(weights="int4")
    assert get_target("transformers").resolved(spec) is spec
