"""What quantized activations cost each layer, measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layers import Mode, quantized_layers
from qat.output_errors import OutputErrors, SideError


def prepared(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    spec = qat.QuantSpec(activations=kind, dtype="float32")
    qat.prepare(model, spec, observer=qat.Percentile(percentile=95))
    qat.calibrate(model, [torch.randn(64, 16)])
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).square().sum() / wanted.double().square().sum())


@pytest.mark.parametrize("kind", ["int8", "float8"])
@torch.no_grad()
def test_errors_are_those_of_the_layers_outputs(kind: str) -> None:
    model, x = prepared(kind), torch.randn(50, 16)
    layers = dict(quantized_layers(model))
    for layer in layers.values():
        layer.mode = Mode(activations=False)
    with OutputErrors(layers) as errors:
        plain = [model(part) for part in (x[:20], x[20:20], x[20:])]
    for layer in layers.values():
        assert layer.mode == Mode(activations=False)
        assert not layer._forward_hooks
    assert torch.equal(torch.cat(plain), model(x))

    h = x
    for name, module in model.named_children():
        if name not in layers:
            h = module(h)
            continue
        layer, found = layers[name], errors.found(name)
        given, output = layer.input_quantizer, layer.output_quantizer
        quantized = given.qtype.fake_quantize_activation(h, given.scale, torch.float32)
        wanted = layer(h)
        assert found[0].error == pytest.approx(relative(layer(quantized), wanted), rel=1e-4)
        assert found[0].saturated == float((h.abs() > given.scale * given.qtype.steps).double().mean())
        y = output.qtype.fake_quantize_activation(wanted, output.scale, torch.float32)
        assert found[1].error == pytest.approx(relative(y, wanted), rel=1e-4)
        assert found[1].saturated == float((wanted.abs() > output.scale * output.qtype.steps).double().mean())
        assert found[1].saturated > 0.02
        h = wanted


def test_a_layer_that_nothing_reached_has_no_errors() -> None:
    layers = dict(quantized_layers(prepared("int8")))
    with OutputErrors(layers) as errors:
        pass
    assert errors.found("0") == (SideError(0.0, 0.0), SideError(0.0, 0.0))


def test_an_offset_that_weights_cancel_is_no_small_error() -> None:
    """A rule that takes channels for independent of each other sees 8e-5 here."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight -= layer.weight.mean(1, keepdim=True)
    model, x = nn.Sequential(layer), 30 + torch.randn(256, 64)
    report = qat.calibrate(model, [x], spec=qat.QuantSpec(activations="int8", dtype="float32"))
    with torch.no_grad():
        prepared_layer = dict(quantized_layers(model))["0"]
        prepared_layer.output_quantizer = None
        served = model(x)
        prepared_layer.mode = Mode(activations=False)
        assert report.layers["0"][0].error == pytest.approx(relative(served, model(x)), rel=1e-3)
    assert report.layers["0"][0].error > 1e-3
