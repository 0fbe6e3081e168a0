"""Inputs that are awkward or wrong: nothing, zeros, constants, layers that few batches reach, inf and NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError
from qat.spec import QuantSpec

KINDS = ("int8", "float8")


def spec(kind: str = "int8") -> QuantSpec:
    return QuantSpec.model_validate({"activations": kind, "dtype": "float32"})


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def test_empty_batches_among_others_change_nothing() -> None:
    expected = qat.calibrate(mlp(), [X], spec=spec())
    report = qat.calibrate(mlp(), [X[:0], X, X[:0]], spec=spec())
    assert report.layers == expected.layers
    assert report.batches == 3
    assert {side.calls for sides in report.layers.values() for side in sides} == {1}


def test_empty_batches_alone_are_refused_and_set_nothing() -> None:
    model = mlp()
    with pytest.raises(CalibrationError, match=r"2 layers were never reached in 2 batches \(first: \['0', '2'\]\)"):
        qat.calibrate(model, [X[:0], X[:0]], spec=spec())
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_say_nothing_of_a_scale_so_the_layer_keeps_float_activations(kind: str) -> None:
    model, plain = mlp(), mlp()
    report = qat.calibrate(model, [torch.zeros(4, 16)], spec=spec(kind))
    # The biases give the others their values.
    assert report.kept_float == {"0": "their inputs were zero in all batches, which says nothing of a scale"}
    assert all(scale is not None and scale > 0 for pair in report.scales.values() for scale in pair)
    for layer in (model, plain):
        layer[2].weight.data.zero_()  # which leaves its bias, in one code of an output
    trained = model(X).detach()
    qat.freeze(model)
    with torch.no_grad():
        served, wanted = model(X).dequantize(), plain(X)
    assert torch.equal(served, trained)
    # Half a step: 1/254 of the largest (int8), 1/16 of itself (float8).
    assert float((served - wanted).abs().max()) <= 0.07 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [3.0, -1e-4, 1e4], ids=str)
def test_a_constant_input_is_kept_almost_exactly(value: float, kind: str) -> None:
    model = mlp()
    report = qat.calibrate(model, [torch.full((4, 16), value)], spec=spec(kind))
    (scale, _), steps = report.scales["0"], {"int8": 127, "float8": 448}[kind]
    code = value / scale
    assert abs(code) <= steps * 1.01
    assert report.layers["0"][0].saturated == 0
    assert report.layers["0"][0].error <= {"int8": 1e-4, "float8": 2**-8}[kind]
    found = dict(model.named_modules())["0"].input_quantizer
    rounded = found.qtype.fake_quantize_activation(torch.tensor([value]), found.scale, torch.float32)
    assert float(rounded) == pytest.approx(value, rel={"int8": 1e-2, "float8": 1 / 16}[kind])


class Branches(nn.Module):
    """One layer runs for every batch, one for those that ask for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.seldom = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, seldom: bool) -> Tensor:
        y: Tensor = self.always(x)
        return self.seldom(torch.tanh(y)) if seldom else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", [0, 2, 4], ids=["first", "middle", "last"])
def test_a_layer_that_one_batch_reaches_has_its_scale_and_the_report_says_so(place: int) -> None:
    report = qat.calibrate(Branches(), [(X, number == place) for number in range(5)], spec=spec())
    assert [side.calls for side in report.layers["always"]] == [5, 5]
    assert [side.calls for side in report.layers["seldom"]] == [1, 1]
    rows = {line.split()[0]: line for line in report.table().splitlines()[1:]}
    assert rows["seldom"].split()[-1] == "1"
    assert report.layers["seldom"] == qat.calibrate(Branches(), [(X, True)], spec=spec()).layers["seldom"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_one_number_that_is_not_finite_names_layer_and_batch_and_poisons_nothing(value: float) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Any:
            h = torch.tanh(self.body[0](x))
            return self.body[2](torch.where(x[:, :1] > 50, value, h))

    model, bad = Inner(), X.clone()
    bad[1, 0] = 100.0
    qat.prepare(model, spec())
    expected = qat.calibrate(model, [X])
    before = {key: number.clone() for key, number in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"batch 2 gives inf or NaN, .* of layer 'body.2': check"):
        qat.calibrate(model, [X, X, bad, X])
    assert all(torch.equal(number, before[key]) for key, number in model.state_dict().items())
    assert qat.calibrate(model, [X]) == expected


def test_an_output_that_overflows_names_its_layer() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    with pytest.raises(CalibrationError, match=r"batch 1 gives inf or NaN, .* of layer '0'"):
        qat.calibrate(model, [X * 0, X.abs() * 1e10], spec=spec())


def test_numbers_that_no_bin_holds_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(CalibrationError, match=r"batch 1 gives inf or NaN, or numbers beyond 2\^24, in .* layer '0'"):
        qat.calibrate(model, [torch.randn(4, 32), torch.randn(4, 32) * 1e9], spec=qat.QuantSpec(activations="int8"))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("batches", [None, 3, "texts"])
def test_what_is_no_batches_is_refused(batches: object) -> None:
    with pytest.raises(CalibrationError, match="batches: must be several batches, got one"):
        qat.calibrate(nn.Sequential(nn.Linear(4, 4)), batches, spec=qat.QuantSpec(activations="int8"))  # type: ignore[arg-type]


def test_scales_with_a_product_that_float16_cannot_hold_leave_the_layer_float() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-2)
    spec = qat.QuantSpec(activations="int8", dtype="float16")
    x = torch.randn(64, 32) * 1e-2
    report = qat.calibrate(model, [x], spec=spec)
    assert report.kept_float == {"0": "float16 cannot hold the product of their scales"}
    wanted = model.eval()(x)
    qat.freeze(model)
    gap = (model(x.half()).float() - wanted).norm() / wanted.norm()
    assert gap < 0.01


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_scales_with_a_product_that_float16_rounds_coarsely_leave_the_layer_float(weights: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    spec = qat.QuantSpec(weights=weights, activations="float8", dtype="float16")
    x = torch.randn(64, 32) * 2e-2  # the product of scales is a denormal number, a few per cent off
    assert qat.calibrate(model, [x], spec=spec).kept_float == ("0",)
    trained = model.eval()(x)
    qat.freeze(model)
    assert (model(x.half()).float() - trained).norm() / trained.norm() < 2**-8


class Called(nn.Module):
    """A layer that is called in a way of its own."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.call = nn.Linear(16, 16), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda layer, x: layer(input=x), "cannot quantize an input passed by keyword"),
        (lambda layer, x: layer(x[0]), "cannot quantize an input of 1 dimensions"),
        (lambda layer, x: layer(x[None, None]), "cannot quantize an input of 4 dimensions"),
    ],
    ids=["keyword", "one dimension", "four dimensions"],
)
def test_layers_that_loaders_cannot_call_with_quantized_inputs_keep_float_activations(
    call: Callable[[nn.Module, Tensor], Tensor], reason: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Called(call)
    for batches in ([X], [X, X]):
        report = qat.calibrate(model, batches, spec=None if hasattr(model.layer, "mode") else spec(kind))
        assert report.kept_float == ("layer",)
    assert f"layer keeps float activations: optimum-quanto {reason}" in caplog.text
    assert "too far off" not in caplog.text
    trained = model.eval()(X).detach()
    qat.freeze(model)
    served = model(X)
    assert served.shape == trained.shape
    torch.testing.assert_close(served, trained)
