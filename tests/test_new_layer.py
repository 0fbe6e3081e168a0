"""A new kind of layer is one file: this one. Its weight is stored as ``(in, out)``, as in transformers' Conv1D.

Nothing outside this file is edited: the class stands in the registry, and goes through every verb.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layers import LAYERS, QuantizedLayer
from qat.layers.functional import quantized_linear
from qat.optimizers import unchanged
from qat.quantizers import Quantized


class Transposed(nn.Module):
    """``x W + b`` with ``W`` of shape ``(in, out)``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight + self.bias


class QTransposed(QuantizedLayer, Transposed):
    replaces: ClassVar[type[nn.Module]] = Transposed

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        weight: Tensor = module.weight
        return weight.t()

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        if weight is None:
            return x @ self.weight + self.bias
        master = self.effective_weight(self)
        return quantized_linear(x, master, self.bias, weight, self.weight_quantizer, self.active_input_quantizer())


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, Transposed, QTransposed)


def floats() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Transposed(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), Transposed(32, 16))


@pytest.mark.parametrize("weights", ["int8", "float8", "int4", "int2"])
@pytest.mark.parametrize("algorithm", [qat.StraightThrough(), qat.LearnedAffine()], ids=["dynamic", "learned"])
def test_every_verb(tmp_path: Path, weights: Any, algorithm: Any) -> None:
    architecture, model = floats(), floats()
    spec = qat.QuantSpec(weights=weights, dtype="float32")
    report = qat.inspect(model, spec)
    assert [(row.name, row.class_name, row.shape) for row in report.layers] == [
        ("0", "Transposed", (64, 256)),
        ("2", "Linear", (32, 64)),
        ("4", "Transposed", (16, 32)),
    ]
    qat.prepare(model, spec, algorithm=algorithm)
    assert qat.prepare(floats(), spec).layers == ("0", "2", "4")
    x, start = torch.randn(8, 256), copy.deepcopy(model[0].weight)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-2, scale_lr=1e-3))
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model[0].weight, start)
    layer: Any = model[0]
    trained = layer.weight_quantizer.quantize(layer.weight.t(), torch.float32).value
    assert model[0].weight.shape == (256, 64)
    assert trained.shape == (64, 256)
    expected = model(x)

    qat.freeze(model)
    assert torch.equal(model[0].weight.dequantize(), trained)  # type: ignore[operator]
    served = model(x)
    assert (served - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-6

    qat.export(model, tmp_path / "out", example_inputs=x)
    report = qat.verify(tmp_path / "out", reference=model, model=architecture)
    # quanto's own loader of plain modules replaces an nn.Linear only.
    assert [check.detail for check in report.checks if check.name == "load"] == [
        "qat.load, the only loader of this target"
    ]
    loaded = qat.load(tmp_path / "out", model=architecture)
    assert torch.equal(loaded(x), served)


def test_the_gradient_is_that_of_a_linear_layer_with_the_same_matrix() -> None:
    torch.manual_seed(0)
    one, other = nn.Sequential(Transposed(64, 32)), nn.Sequential(nn.Linear(64, 32))
    other[0].weight.data, other[0].bias.data = one[0].weight.data.t().clone(), one[0].bias.data.clone()
    x = torch.randn(4, 64)
    for model in (one, other):
        qat.prepare(model, qat.QuantSpec(weights="int4", dtype="float32"), algorithm=qat.LearnedAffine())
        model(x).square().sum().backward()
    assert torch.equal(one[0].weight.grad.t(), other[0].weight.grad)
    for name in ("low_move", "high_move"):
        assert torch.equal(getattr(one[0].weight_quantizer, name).grad, getattr(other[0].weight_quantizer, name).grad)


def test_a_float_checkpoint_starts_the_quantizers_afresh() -> None:
    model, checkpoint = floats(), floats().state_dict()
    checkpoint["0.weight"] *= 3
    qat.prepare(model, qat.QuantSpec(weights="int4", dtype="float32"), algorithm=qat.LearnedAffine())
    model.load_state_dict(checkpoint)
    fresh = floats()
    fresh[0].weight.data *= 3
    qat.prepare(fresh, qat.QuantSpec(weights="int4", dtype="float32"), algorithm=qat.LearnedAffine())
    x = torch.randn(4, 256)
    assert torch.equal(model(x), fresh(x))


class Tied(nn.Module):
    """Its second layer has the weight of the first, as a decoder may have that of its encoder."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.encode, self.decode = Transposed(64, 32), other
        other.weight = self.encode.weight
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(self.encode(x).relu(), self.decode.weight))


@pytest.mark.parametrize("other", [nn.Linear(32, 64), Transposed(64, 32)], ids=["linear", "transposed"])
def test_a_tie_is_seen_whatever_form_the_weight_is_stored_in(other: nn.Module) -> None:
    model, spec = Tied(other), qat.QuantSpec(dtype="float32")
    report = qat.inspect(model, spec)
    assert {row.name for row in report.layers if "tied to another weight" in row.reason} == {"encode", "decode"}
    one = spec.model_copy(update={"include": ("encode", "head")})
    report = qat.inspect(model, one)
    assert report.parameters == sum(p.numel() for p in model.parameters()) + 64 * 32
    assert "encode: its weight is tied; quantizing it breaks the tie" in "\n".join(report.notes)
    assert qat.prepare(model, one).untied == ("encode",)
    assert model.encode.weight is not model.decode.weight


def test_a_weight_that_is_read_without_a_call_of_its_layer_is_seen() -> None:
    model = Tied(Transposed(64, 32))
    model.decode.weight = nn.Parameter(torch.randn(64, 32))
    report = qat.inspect(model, qat.QuantSpec(dtype="float32"), example_inputs=torch.ones(2, 64))
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["decode"] == "Tied reads the weight without calling the layer"


class Named(nn.Linear):
    """Its weight has another name."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.kernel = self.weight
        del self.weight


class QNamed(QuantizedLayer, Named):
    replaces: ClassVar[type[nn.Module]] = Named

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        kernel: Tensor = module.kernel
        return kernel

    @classmethod
    def adoption_fault(cls, module: nn.Module) -> None:
        return None

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        assert weight is not None
        return quantized_linear(x, self.kernel, self.bias, weight, self.weight_quantizer)


def test_what_training_leaves_alone_is_told_whatever_the_name_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, Named, QNamed)
    model, spec = nn.Sequential(Named(64, 64), Named(64, 32)), qat.QuantSpec(dtype="float32")
    qat.prepare(model, spec)
    optimizer = torch.optim.SGD([model[0].kernel, model[1].bias], lr=0.1)
    model(torch.ones(2, 64)).square().mean().backward()
    optimizer.step()
    (told,) = unchanged(model)
    assert told.startswith("training never changed the weights of 1 layers")
    assert told.endswith(": 1")
