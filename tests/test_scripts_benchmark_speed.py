"""Arms of the speed benchmark do what their names say."""

from __future__ import annotations

import pytest
import torch

from qat.layers import quantized_layers
from scripts.benchmark_speed import ARMS, build

SHAPE = {"hidden": 32, "intermediate": 64, "layers": 1, "heads": 4, "vocabulary": 64, "batch": 2, "length": 256}


@pytest.mark.parametrize(("arm", "recorded"), [("activations", 0), ("observed", 1), ("observed_absmax", 1)])
def test_observers_record_in_every_step_of_an_observed_arm(arm: str, recorded: int) -> None:
    torch.manual_seed(0)
    model = build(SHAPE, torch.float32, "cpu")
    ARMS[arm](model, "int8", "float32")
    observers = [q.observer for _, layer in quantized_layers(model) for q in layer.activation_quantizers()]
    assert len(observers) == 7
    before = [int(observer.calls) for observer in observers]
    for _ in range(2):
        tokens = torch.randint(0, 64, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert [int(observer.calls) - calls for observer, calls in zip(observers, before, strict=True)] == [
        2 * recorded
    ] * 7
