"""What freezing asks of a prepared model. Layers that never ran: `test_freezing_notes`."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.checks import function_check, hooks_change
from qat.errors import QatError, StateError
from qat.freezing import freeze
from qat.layers import LAYERS, QLinear, quantized_layers
from qat.quantizers import Algorithm, Quantized, WeightQuantizer
from qat.spec import QuantSpec
from tests.exports import small_flux, small_llama


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
        assert function_check(layer)(frozen) is None
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight.neg_()
        assert "computes something else than QLinear did" in str(function_check(other)(frozen))


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
    with pytest.raises(QatError, match=r"layer '0': MoodyQuantizer.quantize depends on its training mode"):
        freeze(model)


def test_freezing_asks_of_hooks_only_once_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    qat.prepare(model, QuantSpec(dtype="float32"))
    handle = model[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(StateError, match="hooks change what 1 prepared layers"):
        freeze(model)
    assert not any(layer.reached for _, layer in quantized_layers(model))
    handle.remove()
    freeze(model)


def test_a_weight_that_is_not_finite_is_no_fault_of_its_hooks() -> None:
    model = prepared(QuantSpec(dtype="float32"))
    model[0].register_forward_hook(lambda module, args, output: None)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(StateError, match="layer '0' holds inf or NaN in its weight"):
        freeze(model)


def test_outputs_that_overflow_float16_are_no_fault_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(256, 64))
    with torch.no_grad():
        model[0].weight.normal_(std=8000, generator=torch.Generator().manual_seed(0))
    qat.prepare(model, QuantSpec(dtype="float16"))
    freeze(model)


BEYOND = [
    *(("quanto", weights, what) for weights in ("int8", "float8", "int4", "int2") for what in ("scale", "value")),
    *(("compressed-tensors", weights, "scale") for weights in ("int8", "float8", "int4", "int2_g32_zp")),
    *(("gguf", weights, "value") for weights in ("q8_0", "q4_0", "q4_1")),  # whose scales end at 65504
    *(("gguf-diffusers", weights, "value") for weights in ("q8_0", "q4_0")),
    *((target, kind, "activation") for target in ("quanto", "compressed-tensors") for kind in ("int8", "float8")),
]


@pytest.mark.parametrize(("target", "weights", "what"), BEYOND)
def test_what_float16_cannot_hold_of_a_quantizer_is_refused_by_layer(target: str, weights: Any, what: str) -> None:
    model: Any = small_flux() if target == "gguf-diffusers" else small_llama()
    spec = QuantSpec(weights=weights, activations=weights if what == "activation" else None, dtype="float16")
    qat.prepare(model, spec, target=target, algorithm=qat.LearnedAffine(start="minmax"))
    name, layer = next(iter(quantized_layers(model)))
    found = rf"model: layer '{name}' has an activation scale beyond its dtype"
    if what == "activation":
        for quantizer in [q for _, one in quantized_layers(model) for q in one.activation_quantizers()]:
            quantizer.scale.fill_(1e6 if quantizer is layer.input_quantizer else 1.0)
            quantizer.initialized = True
    else:
        found = rf"model: layer '{name}': a {what} of its weight is beyond what float16 can hold: serve in bfloat16"
        own: Any = layer.weight_quantizer
        own.high_start.fill_(1e9 if what == "scale" else 65504 / 2.9 * own.qtype.steps)  # 2.9 is rounded to 3
        if own.low_start is not None:
            own.low_start.zero_()
        layer.weight.data.fill_(65504.0)
    with pytest.raises(StateError, match=found):
        qat.freeze(model, allow_unreached=True)
