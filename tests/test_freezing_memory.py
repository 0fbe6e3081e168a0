"""Freezing holds one float master beside the frozen layers, and what threads raise is the caller's."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from torch import nn

from qat import QuantSpec, freeze, prepare
from qat import freezing as module
from qat.errors import QatError
from qat.files.evidence import is_frozen
from qat.formats import FrozenLayer
from qat.layers import quantized_layers

LAYERS = 6


def prepared(shared: bool = False) -> nn.Sequential:
    layers = [nn.Linear(64, 64) for _ in range(LAYERS)]
    model = nn.Sequential(*layers, *(layers[:1] if shared else []))
    prepare(model, QuantSpec(weights="int8"))
    return model


def test_each_master_goes_before_the_next_layer_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    masters = [weakref.ref(layer.weight) for _, layer in quantized_layers(model)]
    alive: list[int] = []

    def counted(*arguments: Any) -> Any:
        alive.append(sum(master() is not None for master in masters))
        return honest(*arguments)

    honest = module._freeze_layer
    monkeypatch.setattr(module, "_freeze_layer", counted)
    freeze(model)
    assert alive == [LAYERS - done for done in range(LAYERS)]
    assert all(master() is None for master in masters)


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    model = prepared(shared=True)
    freeze(model)
    assert model[0] is model[LAYERS]
    assert not list(quantized_layers(model))


def test_a_fault_in_a_thread_is_raised_and_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: FrozenLayer, value: str) -> None:
        raise QatError("evidence: a fault")

    model = prepared()
    monkeypatch.setattr(FrozenLayer, "evidence", fails)
    with pytest.raises(QatError, match=r"^evidence: a fault$"):
        freeze(model)
    assert not is_frozen(model)
