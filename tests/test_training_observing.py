"""Scales from observers while a model trains: what spoils them, what they say, and how a fit ends."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import qat
from qat.errors import TrainingError
from qat.layers import Mode, quantized_layers
from qat.training.observing import activation_use, end_observing, take_scales, uncalibrated


def observing(rule: qat.ObserverChoice | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    qat.prepare(model, spec, observer=rule or qat.Absmax())
    for _, layer in quantized_layers(model):
        layer.mode = Mode(observe=True)
    return model


def test_scales_follow_what_was_seen() -> None:
    model = observing()
    x = torch.randn(8, 32)
    model(x)
    first = model[0].input_quantizer.scale.clone()  # type: ignore[union-attr]
    assert first == x.abs().max() / 127
    model(3 * x)
    assert model[0].input_quantizer.scale == first  # type: ignore[union-attr]
    take_scales(model, 1)
    assert model[0].input_quantizer.scale == (3 * x).abs().max() / 127  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_inf_and_nan_are_named_and_change_no_scale(bad: float) -> None:
    model = observing(qat.Best())
    x = torch.randn(8, 32)
    model(x)
    scales = [q.scale.clone() for _, layer in quantized_layers(model) for q in layer.activation_quantizers()]
    x[3, 4] = bad
    model(x)
    with pytest.raises(TrainingError, match="activations: inf or NaN reached 0"):
        take_scales(model, 1)
    now = [q.scale for _, layer in quantized_layers(model) for q in layer.activation_quantizers()]
    assert all(map(torch.equal, scales, now))


def test_use_is_told_without_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = observing(qat.Percentile(percentile=50))
    model(torch.cat([torch.full((3, 32), 0.5), torch.full((1, 32), 2.0)]))
    assert activation_use(model)["0"] == (0.25, 1.0)
    with caplog.at_level(logging.INFO, logger="qat"):
        end_observing(model, 1)
    assert "activations of 2 layers were observed: at most" in caplog.text


def test_layers_that_saw_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = observing()
    model[0](torch.randn(4, 32))
    end_observing(model, 1)
    assert uncalibrated(model[1])
    assert "1 layers saw no activations while observers recorded, and go on with float ones: 1" in caplog.text
    assert set(activation_use(model)) == {"0"}
