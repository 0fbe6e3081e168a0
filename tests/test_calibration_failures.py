"""A calibration that fails leaves everything as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat import QuantSpec
from qat.errors import CalibrationError
from qat.layers import quantized_layers


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


OPERATIONS: dict[str, tuple[Any, str]] = {
    "relu": (torch.relu, ""),
    "tanh": (torch.tanh, ""),
    "views": (lambda h: h.view(4, -1, 64).transpose(0, 1).reshape(-1, 64)[:, torch.arange(64)], ""),
    "masked": (lambda h: h.masked_fill(h > 1, -3.0), ""),
    "relu in place": (nn.ReLU(inplace=True), "relu_"),
    "clamp in place": (lambda h: h.clamp_(min=0.2), "clamp_"),
    "sum in place": (lambda h: h.add_(1.0), "add_"),
    "minus": (lambda h: -h, "neg"),
    "minus in a view": (lambda h: torch.cat([-h[:, 32:], h[:, :32]], 1), "neg"),
    "softmax": (lambda h: (10 * h).softmax(-1), "_softmax"),
}


@pytest.mark.parametrize("share", [1.0, 0.1], ids=["all", "small branch"])
@pytest.mark.parametrize(("operation", "lost"), OPERATIONS.values(), ids=OPERATIONS)
def test_a_layer_before_an_operation_that_is_lost_when_served_keeps_float_activations(
    operation: Any, lost: str, share: float
) -> None:
    class Model(Between):
        def forward(self, x: Tensor) -> Any:
            return x + share * super().forward(x)

    model, x = Model(operation), torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    report = qat.calibrate(model, [x], spec=QuantSpec(activations="int8", dtype="float32"))
    assert {name: reason.split("'")[1] for name, reason in report.kept_float.items()} == (
        {"first": lost} if lost else {}
    )
    assert not any(layer.mode.observe for layer in (model.first, model.second))
    trained = model(x).detach()
    qat.freeze(model)
    with torch.no_grad():
        served = model(x)
    torch.testing.assert_close(served, trained, rtol=0, atol=1e-6 * float(trained.abs().max()))


def test_an_operation_that_is_lost_only_since_training_is_refused() -> None:
    model, x = Between(torch.relu), torch.randn(16, 32)
    qat.calibrate(model, [x], spec=QuantSpec(activations="int8", dtype="float32"))
    before = {name: layer.input_quantizer.scale.clone() for name, layer in quantized_layers(model)}
    model.operation = nn.ReLU(inplace=True)
    with pytest.raises(CalibrationError, match=r"layer 'first' meets the operation 'relu_', .*or exclude it"):
        qat.calibrate(model, [2 * x])
    assert all(torch.equal(layer.input_quantizer.scale, before[name]) for name, layer in quantized_layers(model))


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


SEVERAL = """
import sys
import torch
from torch import nn

import qat
from qat.errors import CalibrationError

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
good = torch.ones(2, 16)
for batches in ([good, torch.full((2, 16), float("nan"))], [good, torch.ones(2, 3)], [], [good]):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    spec = qat.QuantSpec(activations="int8", dtype="float32")
    try:
        print(qat.calibrate(model, batches if rank else [good], spec=spec))
    except CalibrationError as error:
        print(error)
        assert type(model[0]) is nn.Linear
for batches in ([good, torch.full((2, 16), float("nan"))], [good, torch.ones(2, 3)], [], [good]):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    qat.prepare(model, qat.QuantSpec(weights="int4", dtype="float32"), algorithm=qat.LearnedAffine(start="gptq"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        print(qat.calibrate(model, batches if rank else [good]))
    except CalibrationError as error:
        print(error)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
try:
    qat.search(nn.Sequential(nn.Linear(16, 16)), qat.QuantSpec(), [good], budget="int4")
except qat.StateError as error:
    print(error)
"""
TOLD = (
    "rank 1: batches: batch 1 gives inf or NaN, or numbers beyond 2^24, in the activations of layer '0'",
    "rank 1: batches: the model cannot run batch 1 (RuntimeError",
    "rank 1: batches: calibration needs at least one batch, got none: pass some training batches",
    "calibrated 2 layers on 1 batches",
    "batches: give inf or NaN, or numbers whose squares overflow, in the input of layer '0'",
    "rank 1: batches: the model cannot run batch 1 (RuntimeError",
    "rank 1: batches: calibration needs at least one batch, got none: pass some training batches",
    "starts of weights: 2 gptq",
    "model: each process would find types of its own: call qat.search in one process",
)


@pytest.mark.slow
def test_all_processes_raise_what_one_of_them_found(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", SEVERAL]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, env=environment)
        for rank in (0, 1)
    ]
    for process in processes:
        try:
            out, _ = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == 0
        lines = out.decode().splitlines()
        assert len(lines) == len(TOLD)
        assert all(line.startswith(told) for line, told in zip(lines, TOLD, strict=True))
