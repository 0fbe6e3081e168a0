"""What freezing asks of a prepared model. Layers that never ran: `test_freezing_notes`."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.checks import function_fault, hooks_change
from qat.errors import QatError, StateError
from qat.freezing import freeze
from qat.layers import LAYERS, QLinear, quantized_layers
from qat.quantizers import Algorithm, Quantized, WeightQuantizer
from qat.spec import QuantSpec
from tests.helpers import tiny_model, tokens


def prepared(spec: QuantSpec, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False)).to(dtype)
    qat.prepare(model, spec)
    x = torch.randn(4, 64, dtype=dtype)
    qat.calibrate(model, [x])
    model(x)
    return model


def add_noise(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] + torch.randn_like(args[0])


def clamp(module: Any, *_: Any) -> None:
    with torch.no_grad():
        module.weight.clamp_(-0.05, 0.05)


def double_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] * 2


@pytest.mark.parametrize(
    "hook",
    [clamp, double_input, lambda module, args: args[0] + torch.randn_like(args[0])],
    ids=["weight", "in", "noise"],
)
def test_a_hook_before_the_forward_that_changes_the_layer_is_refused(hook: Any) -> None:
    model = prepared(QuantSpec(dtype="float32"))
    before = copy.deepcopy(model.state_dict())
    model[2].register_forward_pre_hook(hook)
    with pytest.raises(StateError, match=r"hooks change what 1 prepared layers compute \(2\), .* remove them, or move"):
        freeze(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(model[2], QLinear)


def test_a_hook_after_the_forward_that_changes_the_output_is_refused() -> None:
    model = prepared(QuantSpec(dtype="float32"))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(StateError, match=r"hooks change what 1 prepared layers compute \(0\)"):
        freeze(model)


def test_a_hook_that_only_looks_is_none_that_changes() -> None:
    model = prepared(QuantSpec(activations="int8", dtype="float32"))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[2].register_forward_pre_hook(lambda module, args: args[0].reshape(2, 9, 5) and None)  # not for our example
    assert [hooks_change(layer) for _, layer in quantized_layers(model)] == [False, False]


def test_a_hook_whose_work_is_done_is_none_that_changes() -> None:
    """A clamp that ran after the last step finds nothing left to clamp."""
    model = prepared(QuantSpec(dtype="float32"))
    model[2].register_forward_pre_hook(clamp)
    model(torch.randn(2, 64))
    freeze(model)


@pytest.mark.parametrize("weights", ["int8", "float8", "int4", "int2"])
@pytest.mark.parametrize(
    ("activations", "dtype", "master"),
    [
        (None, "float32", torch.float32),
        (None, "bfloat16", torch.float32),
        (None, "float16", torch.bfloat16),
        ("int8", "float32", torch.bfloat16),
        ("int8", "bfloat16", torch.bfloat16),
        ("float8", "bfloat16", torch.float32),
    ],
)
def test_no_layer_of_ours_is_at_fault(weights: Any, activations: Any, dtype: Any, master: torch.dtype) -> None:
    model = prepared(QuantSpec(weights=weights, activations=activations, dtype=dtype), dtype=master)
    layers = {name: copy.deepcopy(layer) for name, layer in quantized_layers(model)}
    freeze(model)
    for name, layer in layers.items():
        frozen = model.get_submodule(name)
        assert function_fault(layer, frozen, getattr(torch, dtype)) is None
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight.neg_()
        assert "computes something else than QLinear did" in str(function_fault(other, frozen, getattr(torch, dtype)))


class Doubles(nn.Linear):
    """Like a linear layer, but its output is twice as large."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class QDoubles(QLinear):
    replaces: ClassVar[type[nn.Module]] = Doubles

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        return 2 * super().compute(x, weight)


def test_a_layer_whose_format_builds_another_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, Doubles, QDoubles)
    model = nn.Sequential(nn.Linear(64, 32), Doubles(32, 32))
    qat.prepare(model, QuantSpec(dtype="float32"))
    with pytest.raises(QatError, match=r"layer '1': frozen, it computes something else than QDoubles did .* is wrong"):
        freeze(model)


class MoodyQuantizer(WeightQuantizer):
    """Another range in training mode, as quantizers with noise or dropout have it."""

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        ends = self.qtype.weight_range(weight * 1.5 if self.training else weight)
        return self.by_scale(weight, *self.qtype.scale_shift(*ends), out_dtype)


class Moody(Algorithm):
    kind: str = "moody"

    def make(self, weight: Tensor, qtype: Any, dtype: torch.dtype) -> WeightQuantizer:
        return MoodyQuantizer(qtype, dtype)


def test_a_quantizer_with_two_ways_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    qat.prepare(model, QuantSpec(dtype="float32"), algorithm=Moody())
    with pytest.raises(QatError, match=r"layer '0': MoodyQuantizer quantizes in another way in training mode"):
        freeze(model)


class ReadsToo(nn.Module):
    """Calls a layer, and uses its weight a second time, as tied autoencoders do."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.encode, self.reads = nn.Linear(64, 32, bias=False), reads

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.encode(x).to(self.encode.weight)  # for its dtype, which reads no number
        hidden = hidden + torch.zeros_like(self.encode.weight)[:, 0] + self.encode.weight.new_zeros(32)
        return hidden @ self.encode.weight if self.reads else hidden


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_called_and_read_is_refused(training: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = ReadsToo(reads=True).train(training)
    qat.prepare(model, QuantSpec(dtype="float32"))
    for _ in range(2):
        model(torch.randn(2, 64))
    said = "1 weights of prepared layers were read without calling their layer, in float: encode (by ReadsToo)"
    assert caplog.text.count(said) == 1
    with pytest.raises(StateError, match=r"encode .by ReadsToo.: exclude those layers in the spec, or pass allow"):
        freeze(model)
    freeze(model, allow_unreached=True)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_layer_whose_weight_is_asked_only_for_its_dtype_is_frozen() -> None:
    model = ReadsToo(reads=False)
    qat.prepare(model, QuantSpec(dtype="float32"))
    model(torch.randn(2, 64))
    freeze(model)


def test_a_run_that_fails_leaves_no_trace_of_the_look_at_it() -> None:
    model = tiny_model("llama")
    qat.prepare(model, QuantSpec(dtype="float32"))
    with pytest.raises(IndexError):
        model(input_ids=tokens() + 100)
    assert not any(module._forward_hooks for module in list(model.modules())[1:])
    assert torch.overrides._len_torch_function_stack() == 0
    model(input_ids=tokens())
    freeze(model)
