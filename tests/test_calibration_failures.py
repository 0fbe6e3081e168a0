"""A calibration that fails leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat import QuantSpec
from qat.errors import CalibrationError


@pytest.mark.parametrize("fault", [float("nan"), OSError("disk")], ids=["nan", "reading"])
def test_a_calibration_that_fails_leaves_the_scales_of_before(fault: Any) -> None:
    def batches(fault: Any = None) -> Iterator[Tensor]:
        yield torch.ones(2, 16)
        if isinstance(fault, Exception):
            raise fault
        yield torch.full((2, 16), 100.0 if fault is None else fault)

    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    qat.prepare(model, QuantSpec(activations="int8", dtype="float32"))
    for calibrated in (False, True):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises((CalibrationError, OSError)):
            qat.calibrate(model, batches(fault))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        if not calibrated:
            qat.calibrate(model, batches())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_the_layer_and_the_batch_that_are_not_finite_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    qat.prepare(model, QuantSpec(activations="int8", dtype="float32"))
    with pytest.raises(CalibrationError, match=r"batches: batch 1 gives inf or NaN, .* of layer '0'"):
        qat.calibrate(model, [torch.ones(2, 16), torch.full((2, 16), value)])


class Between(nn.Module):
    """Two layers, and an operation between them."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.operation = nn.Linear(32, 64), nn.Linear(64, 32), operation

    def forward(self, x: Tensor) -> Any:
        return self.second(self.operation(self.first(x)))


OPERATIONS: dict[str, tuple[Any, bool]] = {
    "relu": (torch.relu, True),
    "tanh": (torch.tanh, True),
    "relu in place": (nn.ReLU(inplace=True), False),
    "clamp in place": (lambda h: h.clamp_(min=0.2), False),
    "where": (lambda h: torch.where(h > 0, h, 20.0), False),
}


@pytest.mark.parametrize(("operation", "served"), OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_that_is_lost_when_served_is_refused(operation: Any, served: bool) -> None:
    model, x = Between(operation), torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    qat.prepare(model, QuantSpec(activations="int8", dtype="float32"))
    if served:
        qat.calibrate(model, [x])
        return
    with pytest.raises(CalibrationError, match=r"served, its outputs differ from those of training by \d+%.*in place"):
        qat.calibrate(model, [x])
    assert not any(layer.mode.observe for layer in (model.first, model.second))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"x": torch.ones(2, 32)}, r"must be several batches, got one dict: pass \[batch\]"),
        (torch.ones(2, 32), "must be several batches, got one Tensor"),
        ([{"y": torch.ones(2, 32)}], r"the model cannot run batch 0 \(TypeError: .*mapping of keyword arguments"),
        ([torch.ones(2, 32), torch.ones(2, 3)], r"the model cannot run batch 1 \(RuntimeError"),
    ],
    ids=["mapping", "tensor", "name", "shape"],
)
def test_batches_that_the_model_cannot_run_are_told(batches: Any, message: str) -> None:
    model = Between(torch.relu)
    qat.prepare(model, QuantSpec(activations="int8", dtype="float32"))
    with pytest.raises(CalibrationError, match=message):
        qat.calibrate(model, batches)
