"""What becomes a prepared layer and what does not, what its mode does, and where its quantizers live."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, parametrize, prune

import qat
from qat.errors import CalibrationError, StateError
from qat.formats import QUANTO
from qat.layers import Mode, QLinear, QuantizedLayer, quantized_layers
from qat.observers import Absmax
from qat.quantizers import Algorithm, LearnedAffine, StraightThrough
from qat.quantizers.activation import ActivationQuantizer
from tests.helpers import WEIGHT_TYPES, LearnedStep, same_bits
from tests.test_experts import TOKENS, build
from tests.test_layers_conv1d import gpt2

INT8 = QUANTO.qtypes["int8"]
ALGORITHMS: list[Algorithm] = [StraightThrough(), LearnedAffine(), LearnedStep()]


class Subclass(nn.Linear):
    pass


class Wrapped(Tensor):
    """A tensor subclass, as quantized and distributed weights are."""


def changed(change: Callable[[nn.Linear], object]) -> nn.Linear:
    layer = nn.Linear(8, 4)
    change(layer)
    return layer


def with_weight(weight: Tensor) -> nn.Linear:
    return changed(lambda layer: setattr(layer, "weight", nn.Parameter(weight, requires_grad=False)))


def weight_norm(layer: nn.Linear) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Subclass(8, 4), "Subclass is not exactly nn.Linear: its own forward would be lost"),
    "torch's own subclass": (lambda: nn.MultiheadAttention(8, 2).out_proj, "NonDynamicallyQuantizableLinear is not"),
    "lazy": (lambda: nn.LazyLinear(4), "LazyLinear is not exactly nn.Linear"),
    "prepared already": (lambda: adopted(nn.Linear(8, 4)), "QLinear is not exactly nn.Linear"),
    "forward on the object": (
        lambda: changed(lambda layer: setattr(layer, "forward", lambda x: x)),
        "its object has a forward of its own .*: remove the hook or merge the adapter first",
    ),
    "pruned": (
        lambda: changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        "its weight is no parameter of its own but computed .* as with torch.nn.utils.prune.remove",
    ),
    "pruned bias": (
        lambda: changed(lambda layer: prune.l1_unstructured(layer, "bias", 0.5)),
        "its bias is no parameter of its own but computed before each forward",
    ),
    "old weight_norm": (lambda: changed(weight_norm), "its weight is no parameter of its own"),
    "old spectral_norm": (lambda: changed(nn.utils.spectral_norm), "its weight is no parameter of its own"),
    "weight_norm": (lambda: changed(parametrizations.weight_norm), "ParametrizedLinear is not exactly nn.Linear"),
    "parametrized": (
        lambda: changed(lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity())),
        "ParametrizedLinear is not exactly nn.Linear",
    ),
    "float8": (lambda: with_weight(torch.ones(4, 8).to(torch.float8_e4m3fn)), "its weight has dtype torch.float8_e4m3"),
    "integer": (lambda: with_weight(torch.ones(4, 8, dtype=torch.int8)), "its weight has dtype torch.int8"),
    "tensor subclass": (
        lambda: with_weight(torch.ones(4, 8).as_subclass(Wrapped)),
        "its weight is a .*, not a plain nn.Parameter: prepare before it is converted",
    ),
    "no weight": (lambda: changed(lambda layer: setattr(layer, "weight", None)), "its weight is a NoneType"),
    "empty": (lambda: with_weight(torch.ones(0, 8)), r"its weight has shape \(0, 8\)"),
    "sharded": (lambda: with_weight(torch.ones(32)), r"its weight has shape \(32,\), .*: prepare it unsharded"),
}


def adopted(module: nn.Module, algorithm: Algorithm | None = None, activations: bool = False) -> QLinear:
    """An int8 layer served in float32; its activations are not calibrated."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    pair = [ActivationQuantizer(INT8, torch.float32, Absmax()) for _ in range(2)] if activations else []
    return QLinear.adopt(module, (algorithm or StraightThrough()).make(weight, INT8, torch.float32), *pair)


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_what_it_seems_is_refused_and_left_alone(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    cls, names = type(module), {*module.state_dict()}
    fault = QLinear.adoption_fault(module)
    assert fault is not None
    quantizer = StraightThrough().make(torch.ones(4, 8), INT8, torch.float32)
    with pytest.raises(StateError, match=f"module: .*{reason}"):
        QLinear.adopt(module, quantizer)
    assert type(module) is cls
    assert {*module.state_dict()} == names


def test_adopting_keeps_the_object_its_parameters_and_its_hooks() -> None:
    float_layer = nn.Linear(8, 4)
    weight, calls = float_layer.weight, []
    float_layer.register_forward_hook(lambda *_: calls.append(1))
    layer = QLinear.adopt(float_layer, StraightThrough().make(weight, INT8, torch.float32))
    layer(torch.ones(8))
    assert layer is float_layer
    assert layer.weight is weight
    assert calls == [1]
    assert "weights=int8" in repr(layer)


def test_tied_parameter_objects_are_a_layers_own() -> None:
    one, other = nn.Linear(8, 4), nn.Linear(8, 4)
    other.weight = one.weight
    assert QLinear.adoption_fault(one) is QLinear.adoption_fault(other) is None
    first, second = adopted(one), adopted(other)
    assert first.weight is second.weight


@pytest.mark.parametrize(
    "make",
    [
        lambda: changed(lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight")),
        lambda: nn.Linear(8, 4, bias=False),
        lambda: nn.Linear(8, 4, device="meta"),
        lambda: nn.Linear(8, 4, dtype=torch.float64),
        lambda: with_weight(torch.ones(8, 4).t()),
    ],
    ids=["pruning made permanent", "no bias", "meta", "float64", "transposed view"],
)
def test_plain_layers_are_adopted(make: Callable[[], nn.Linear]) -> None:
    assert QLinear.adoption_fault(make()) is None


def test_a_layer_class_says_how_it_computes() -> None:
    class Silent(QuantizedLayer, nn.Linear):
        replaces = nn.Linear

    layer = nn.Linear(8, 4)
    Silent.adopt(layer, StraightThrough().make(layer.weight, INT8, torch.float32))
    with pytest.raises(NotImplementedError, match="Silent"):
        layer(torch.ones(8))


def test_a_mode_is_a_value() -> None:
    layer = adopted(nn.Linear(8, 4), activations=True)
    assert layer.mode == Mode() == Mode(weights=True, activations=True, observe=False)
    assert Mode()._replace(observe=True) == Mode(observe=True)
    layer.mode = Mode(weights=False)
    x = torch.randn(3, 8)
    assert same_bits(layer(x), linear(x, layer.weight, layer.bias))  # no activation scale is asked for


@pytest.mark.parametrize("weights", [True, False])
def test_observers_record_whatever_else_the_mode_does(weights: bool) -> None:
    layer, x = adopted(nn.Linear(8, 4), activations=True), torch.randn(3, 8)
    layer.mode = Mode(weights=weights, activations=False, observe=True)
    y = layer(x)
    inputs, outputs = layer.activation_quantizers()
    for quantizer in (inputs, outputs):
        quantizer.refresh()
    assert inputs.scale == x.abs().max() / 127
    assert outputs.scale == y.detach().abs().max() / 127
    layer.mode = Mode()
    before = inputs.scale.clone()
    layer(100 * x)
    assert inputs.scale == before


def test_a_layer_knows_whether_it_ran() -> None:
    layer = adopted(nn.Linear(8, 4))
    assert layer.reached is False
    layer(torch.ones(8))
    assert layer.reached is True


@pytest.mark.parametrize("observe", [False, True])
def test_an_empty_input_needs_no_scale_and_sets_none(observe: bool) -> None:
    layer = adopted(nn.Linear(8, 4), activations=True)
    layer.mode = Mode(observe=observe)
    y = layer(torch.ones(2, 0, 8, requires_grad=True))
    assert y.shape == (2, 0, 4)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert not any(quantizer.initialized for quantizer in layer.activation_quantizers())
    layer.mode = Mode()
    with pytest.raises(CalibrationError):
        layer(torch.ones(1, 8))


def test_an_empty_input_leaves_scales_that_are_set() -> None:
    layer = adopted(nn.Linear(8, 4), activations=True)
    layer.mode = Mode(observe=True)
    layer(torch.ones(1, 8))
    before = [quantizer.scale.clone() for quantizer in layer.activation_quantizers()]
    layer(torch.ones(0, 8))
    assert [quantizer.scale for quantizer in layer.activation_quantizers()] == before


def test_calibration_passes_over_an_expert_whose_first_input_is_empty() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, x: Tensor, route: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                out[route == index] = expert(x[route == index])
            return out

    model, x = Routed(), torch.randn(8, 16)
    qat.prepare(model, qat.QuantSpec(activations="int8", dtype="float32"))
    report = qat.calibrate(model, [(x, torch.zeros(8)), (x, torch.ones(8))])
    assert report.scales.keys() == {"experts.0", "experts.1"}
    assert report.scales["experts.0"][0] == report.scales["experts.1"][0]
    with pytest.raises(CalibrationError, match=r"1 layers were never reached .*experts.1"):
        qat.calibrate(model, [(x, torch.zeros(8))])


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.mark.parametrize("activations", [None, "int8"], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: str(algorithm.kind))
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_float_checkpoint_into_a_model_prepared_on_meta_gives_what_the_cpu_gives(
    weights: str, algorithm: Algorithm, activations: str | None
) -> None:
    checkpoint, x = two_layers().state_dict(), torch.randn(3, 256)
    spec = qat.QuantSpec.model_validate({"weights": weights, "activations": activations, "dtype": "float32"})
    truth = two_layers()
    with torch.device("meta"):
        model = two_layers()
    for one in (truth, model):
        qat.prepare(one, spec, algorithm=algorithm)
    model.load_state_dict(checkpoint, assign=True)
    truth.load_state_dict(checkpoint)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    for one in (truth, model):
        qat.calibrate(one, [x])
    assert same_bits(model(x), truth(x))
    for one in (truth, model):
        qat.freeze(one)
    with torch.no_grad():
        found, wanted = model(x), truth(x)
    assert torch.equal(*(y.dequantize() if hasattr(y, "dequantize") else y for y in (found, wanted)))


@pytest.mark.parametrize("made", [gpt2, partial(build, "GptOssForCausalLM")], ids=["Conv1D", "experts"])
def test_a_float_checkpoint_fills_layers_that_store_their_weights_transposed(made: Any) -> None:
    model, other = made(), made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers")
    model.load_state_dict(other.state_dict())
    qat.prepare(other, qat.QuantSpec(weights="int4"), target="transformers")
    assert same_bits(model(input_ids=TOKENS).logits, other(input_ids=TOKENS).logits)


@pytest.mark.parametrize("algorithm", [LearnedAffine(), LearnedStep()], ids=lambda algorithm: str(algorithm.kind))
def test_a_quantizer_on_another_device_than_its_weight_is_refused(algorithm: Algorithm) -> None:
    layer = adopted(nn.Linear(8, 4), algorithm)
    layer.weight_quantizer.to("meta")
    with pytest.raises(StateError, match="its state is on meta, but the layer's weight on cpu: move the whole model"):
        layer(torch.ones(8))
    layer.mode = Mode(weights=False)
    assert layer(torch.ones(8)).device.type == "cpu"


@pytest.mark.parametrize("mode", [Mode(), Mode(weights=False, observe=True)], ids=["quantize", "observe"])
def test_an_activation_quantizer_on_another_device_is_refused(mode: Mode) -> None:
    layer = adopted(nn.Linear(8, 4), activations=True)
    assert layer.input_quantizer is not None
    layer.input_quantizer.to("meta")
    layer.mode = mode
    with pytest.raises(StateError, match="ActivationQuantizer: its state is on meta"):
        layer(torch.ones(8))


def test_a_whole_model_on_meta_still_gives_shapes() -> None:
    with torch.device("meta"):
        model = two_layers()
        qat.prepare(model, qat.QuantSpec(weights="int4"), algorithm=LearnedAffine())
        assert model(torch.ones(3, 256)).shape == (3, 32)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_master_that_is_a_transposed_view_freezes_to_contiguous_codes(weights: str) -> None:
    plain = two_layers()
    turned = two_layers()
    for layer in (turned[0], turned[2]):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
        assert not layer.weight.is_contiguous()
    x = torch.randn(3, 256).bfloat16()
    outputs = []
    for model in (plain, turned):
        qat.prepare(model, qat.QuantSpec.model_validate({"weights": weights}))
        for _, layer in quantized_layers(model):
            frozen, value = layer.weight_quantizer.freeze(layer.effective_weight(layer))
            assert frozen.codes.is_contiguous()
            assert same_bits(frozen.dequantize(), value.contiguous())
        model(torch.randn(3, 256)).sum().backward()
        qat.freeze(model)
        with torch.no_grad():
            outputs.append(model(x))
    assert same_bits(*outputs)
