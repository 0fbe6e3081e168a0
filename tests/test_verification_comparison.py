"""What verification compares beside the weights of layers. The rest: `test_verification`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import ExportError, VerifyError
from qat.files.manifest import MANIFEST_NAME, read_manifest
from qat.verification import verify
from tests.exports import unsealed


class Scaled(nn.Module):
    """A layer beside a number that no file holds."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 32)
        self.register_buffer("factor", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.factor
        return y


def frozen() -> Scaled:
    model = Scaled()
    qat.prepare(model, qat.QuantSpec(dtype="float32"))
    qat.freeze(model)
    return model


def test_a_bias_that_changed_after_freezing_is_refused(tmp_path: Path) -> None:
    model = frozen()
    with torch.no_grad():
        model.layer.bias[3] += 1
    with pytest.raises(ExportError, match=r"the model changed after qat\.freeze: .*layer"):
        qat.export(model, tmp_path / "out")


def test_an_export_from_before_biases_were_recorded_still_verifies(tmp_path: Path) -> None:
    qat.export(frozen(), tmp_path / "out")
    path, kept = tmp_path / "out" / MANIFEST_NAME, read_manifest(tmp_path / "out").frozen.layers["layer"].bias
    assert kept is not None
    path.write_text(json.dumps(unsealed(tmp_path / "out")).replace(f'"{kept}"', "null", 1))
    assert read_manifest(tmp_path / "out").frozen.layers["layer"].bias is None
    assert verify(tmp_path / "out", model=Scaled()).ok
    qat.export(qat.load(tmp_path / "out", model=Scaled()), tmp_path / "again")


def test_a_buffer_that_no_file_holds_is_compared_with_the_live_model(tmp_path: Path) -> None:
    model = frozen()
    model.factor.fill_(2)
    qat.export(model, tmp_path / "out")
    with pytest.raises(VerifyError, match="factor, which no file holds: 1 of 1 numbers differ, by up to 1"):
        verify(tmp_path / "out", model, model=Scaled())


def test_outputs_that_nobody_compared_are_said(tmp_path: Path) -> None:
    model = frozen()
    qat.export(model, tmp_path / "out")
    last = verify(tmp_path / "out", model, model=Scaled()).checks[-1]
    assert (last.name, last.passed) == ("reference outputs", True)
    assert last.detail == "not compared: the export holds no example, and no inputs= were given"
    last = verify(tmp_path / "out", model, torch.randn(2, 64), model=Scaled()).checks[-1]
    assert last.detail == "1 output tensors equal, bit for bit"
