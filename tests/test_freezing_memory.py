"""Freezing holds one float master beside the frozen layers, and what threads raise is the caller's."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
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


def peak(model: nn.Sequential) -> int:
    """The most bytes that freezing held above what was there before, as torch's allocator has it."""
    marker = 12_345_677
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(marker, dtype=torch.uint8)
        freeze(model)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes[sizes.index(marker) + 2 :]))


@pytest.mark.parametrize(("weights", "layers"), [("int8", 2.5), ("float8", 3.0), ("int4", 3.5), ("int2", 3.5)])
def test_freezing_holds_one_value_and_its_codes_above_the_model(weights: Any, layers: float) -> None:
    """A value is a layer and codes are half of one; buffers of blocks, of half a MiB each, are the rest here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, dtype=torch.bfloat16))
    prepare(model, QuantSpec(weights=weights))
    assert 1.5 < peak(model) / (2 * 1024**2) < layers


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
