"""The algorithm that docs/extending.md shows is complete: it trains, and freezes to what it trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from qat.layers import quantized_layers
from qat.quantizers import Algorithm
from qat.spec import QuantSpec
from tests.helpers import WEIGHT_TYPES, awkward_weight, same_bits

DOCUMENT = Path(__file__).parent.parent / "docs" / "extending.md"


def documented_algorithm() -> Algorithm:
    """An instance of the algorithm in the document's first Python block."""
    block, *_ = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {"__name__": "documented"}
    exec(compile(block, str(DOCUMENT), "exec", dont_inherit=True), namespace)
    algorithm = namespace["LearnedStep"]
    assert isinstance(algorithm, type)
    made = algorithm()
    assert isinstance(made, Algorithm)
    return made


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_documented_algorithm_trains_and_freezes(weights: str) -> None:
    model = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        model[0].weight.copy_(awkward_weight(32, 256))  # a row of zeros among others
    qat.prepare(
        model, QuantSpec.model_validate({"weights": weights, "dtype": "float32"}), algorithm=documented_algorithm()
    )
    before = [p.detach().clone() for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()]
    assert len(before) == (4 if weights in ("int4", "int2") else 2)
    optimizer = torch.optim.Adam(qat.parameter_groups(model, lr=1e-3))
    model(torch.randn(8, 256)).square().mean().backward()
    optimizer.step()
    after = [p for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()]
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, old) for p, old in zip(after, before, strict=True))
    trained = {name: layer.weight_quantizer.freeze(layer.weight)[1] for name, layer in quantized_layers(model)}
    qat.freeze(model)
    for name, weight in trained.items():
        assert same_bits(model.get_submodule(name).weight.dequantize(), weight)  # type: ignore[operator, union-attr]
