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
    with pytest.raises(CalibrationError, match=r"batches: batch 1 gives inf or NaN in the activations of layer '0'"):
        qat.calibrate(model, [torch.ones(2, 16), torch.full((2, 16), value)])
