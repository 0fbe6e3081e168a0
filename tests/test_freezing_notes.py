"""What freezing puts on record beside the evidence: layers that were never called, notes of the inspection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.evidence import frozen_record
from qat.freezing import freeze, frozen_copy
from qat.layers import quantized_layers
from qat.spec import QuantSpec
from tests.helpers import tiny_model

F32 = QuantSpec(dtype="float32")


class ReadsUncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.called(x) @ self.read.weight.t()
        return y


def test_a_layer_that_was_never_called_is_named_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model = ReadsUncalled()
    qat.prepare(model, F32)
    model(torch.randn(2, 64))
    frozen_copy(model)
    assert not caplog.text
    freeze(model)
    assert "1 layers were never called" in caplog.text
    assert caplog.text.rstrip().endswith("read")
    (note,) = frozen_record(model).notes
    assert note.startswith("read: never called: if its weight is read without calling the layer")
    assert note.endswith("exclude it or pass example_inputs")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
def test_nothing_is_said_of_calls_when_none_were_made_or_when_they_were_compiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    qat.prepare(model, F32)
    assert frozen_record(frozen_copy(model)).notes == ()
    model[0].compile(backend="eager", fullgraph=True)
    model(torch.randn(2, 64))
    assert [layer.called for _, layer in quantized_layers(model)] == [False, True]
    freeze(model)
    assert not [record for record in caplog.records if record.name == "qat"]
    assert frozen_record(model).notes == ()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
def test_compiled_checkpointing_of_a_layer_is_one_graph() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    qat.prepare(model, F32)
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 64)).sum().backward()
    assert model[0].weight.grad is not None


def test_what_inspection_noted_and_what_was_untied_is_recorded() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    notes = qat.prepare(model, QuantSpec(overrides={"lm_head": "int8"})).inspection.notes
    freeze(model)
    assert frozen_record(model).notes == (*notes, "untied: lm_head")
