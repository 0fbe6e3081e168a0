"""`QLinear` against plain autograd, against `nn.Linear`'s memory, and in everything a training loop does to a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from qat.formats import QUANTO
from qat.layers import Mode, QLinear, layer_class, quantized_layers
from qat.observers import Absmax
from qat.quantizers import Algorithm, StraightThrough
from qat.quantizers.activation import ActivationQuantizer
from tests.helpers import DTYPES, WEIGHT_TYPES, LearnedStep, kept_by, same_bits

QTYPES = QUANTO.qtypes
IN, OUT = 256, 48


def layer(
    weights: str = "int8",
    *,
    algorithm: Algorithm | None = None,
    activations: str | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    in_features: int = IN,
    out_features: int = OUT,
) -> QLinear:
    """A prepared layer; its activations are calibrated, so that some of them saturate."""
    torch.manual_seed(0)
    float_layer = nn.Linear(in_features, out_features, bias=bias)
    quantizer = (algorithm or StraightThrough()).make(float_layer.weight, QTYPES[weights], dtype)
    if activations is None:
        return QLinear.adopt(float_layer, quantizer)
    pair = [ActivationQuantizer(QTYPES[activations], dtype, Absmax()) for _ in range(2)]
    for one, largest in zip(pair, (2.0, 1.0), strict=True):
        one.observe(torch.tensor(largest))
        one.refresh()
    return QLinear.adopt(float_layer, quantizer, *pair)


def served(module: QLinear) -> Tensor:
    """The weight in the serving dtype, as it will be frozen."""
    return module.weight_quantizer.freeze(module.weight)[1]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def straight_through(x: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
    """``value`` in the forward; the gradient of ``x``, where ``inside``, in the backward."""
    passed = x if inside is None else x * inside
    return passed + (value - passed).detach()


def reference_activation(x: Tensor, scale: Tensor, qtype: str) -> Tensor:
    low, high = {"int8": (-128, 127), "float8": (-448, 448)}[qtype]
    steps = (x / scale).detach()
    codes = (
        steps.round().clamp(low, high) if qtype == "int8" else steps.clamp(low, high).to(torch.float8_e4m3fn).float()
    )
    return straight_through(x, codes * scale, (steps >= low) & (steps <= high))


def reference_forward(module: QLinear, x: Tensor) -> Tensor:
    """The same layer by plain autograd on expressions: everything in float32, nothing recomputed."""
    weight = straight_through(module.weight, served(module).float())
    if module.input_quantizer is not None:
        x = reference_activation(x, module.input_quantizer.scale, module.input_quantizer.qtype.name)
    y = linear(x, weight, module.bias)
    if module.output_quantizer is not None:
        y = reference_activation(y, module.output_quantizer.scale, module.output_quantizer.qtype.name)
    return y


def gradients(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a weighted sum of squares."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    (y.square() * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum().backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return found | {"x": x.grad, "y": y.detach()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # Sums of some hundred products in float32, in another order: 1e-6 relative, with room for cancellation.
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(found[name], tensor, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("activations", [None, "int8", "float8"], ids=str)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_outputs_and_gradients_are_those_of_plain_autograd(
    weights: str, activations: str | None, shape: tuple[int, ...]
) -> None:
    module = layer(weights, activations=activations)
    x = inputs(*shape)
    found = gradients(module, module, x)
    assert_close(found, gradients(module, lambda x: reference_forward(module, x), x))
    assert found.keys() == {"weight", "bias", "x", "y"}


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_layer_without_bias_and_with_frozen_parts(weights: str) -> None:
    module, x = layer(weights, bias=False), inputs(4, IN)
    expected = gradients(module, lambda x: reference_forward(module, x), x)
    assert_close(gradients(module, module, x), expected)
    module.weight.requires_grad_(False)
    del expected["weight"]
    assert_close(gradients(module, module, x), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_forward_multiplies_with_the_weight_that_will_be_served(weights: str, dtype: torch.dtype) -> None:
    module = layer(weights, dtype=dtype)
    weight = served(module).float()
    assert torch.equal(module(inputs(3, IN)), linear(inputs(3, IN), weight, module.bias))


def learned_reference(module: QLinear, x: Tensor) -> Tensor:
    """LearnedStep in one differentiable expression (LSQ, Esser et al. 2020), in float32."""
    quantizer = module.weight_quantizer
    low, high = {"int8": (-128, 127), "float8": (-448, 448), "int4": (0, 15), "int2": (0, 3)}[quantizer.qtype.name]
    scale = quantizer.log_scale.exp()
    rows = module.weight.reshape(scale.shape[0], -1)
    shift = quantizer.shift
    steps = ((rows if shift is None else rows + shift) / scale).clamp(low, high)
    codes = (
        steps.detach().to(torch.float8_e4m3fn).float() if quantizer.qtype.name == "float8" else steps.detach().round()
    )
    value = scale * straight_through(steps, codes)
    value = value if shift is None else value - shift
    return linear(x, value.reshape(module.weight.shape), module.bias)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_learned_scale_gets_the_gradient_of_lsq(weights: str) -> None:
    module = layer(weights, algorithm=LearnedStep())
    found = gradients(module, module, inputs(6, IN))
    expected = gradients(module, lambda x: learned_reference(module, x), inputs(6, IN))
    assert "weight_quantizer.log_scale" in found
    assert ("weight_quantizer.shift" in found) is (weights in ("int4", "int2"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


def test_where_everything_saturates_the_scale_gradient_is_that_of_finite_differences() -> None:
    # There v = scale * (-128 or 127) is differentiable, so LSQ's gradient is the true one.
    module = layer("int8", algorithm=LearnedStep(start=0.01), bias=False, in_features=16, out_features=4)
    with torch.no_grad():
        module.weight.copy_(torch.where(module.weight < 0, -0.3, 0.3))
        module.weight_quantizer.log_scale.fill_(-7.0)  # type: ignore[operator, union-attr]
    parameter = module.weight_quantizer.get_parameter("log_scale")
    x = inputs(5, 16)
    module(x).square().sum().backward()
    assert parameter.grad is not None
    for row in range(4):
        sides = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter[row] += step
                sides.append(float(module(x).double().square().sum()))
                parameter[row] -= step
        difference = (sides[0] - sides[1]) / 2e-3
        assert float(parameter.grad[row]) == pytest.approx(difference, rel=1e-2)
    assert module.weight.grad is not None
    assert not module.weight.grad.any()  # saturated weights get none


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_learned_scale_is_learned(weights: str) -> None:
    # The range starts too wide, or for float8, which hardly minds that, too narrow. Only scale and shift may move, and
    # the output error must fall.
    module = layer(weights, algorithm=LearnedStep(start=0.3 if weights == "float8" else 1.8))
    module.weight.requires_grad_(False)
    x, wanted = inputs(64, IN), linear(inputs(64, IN), module.weight, module.bias).detach()
    parameters = list(module.quantizer_parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_nothing_is_kept_for_backward_but_what_a_float_layer_keeps(weights: str, algorithm: Algorithm) -> None:
    module = layer(weights, algorithm=algorithm)
    x = inputs(32, IN).requires_grad_()
    ours, y = kept_by(lambda: module(x))
    theirs, z = kept_by(lambda: linear(x, module.weight, module.bias))
    assert y.shape == z.shape
    same = {tensor.untyped_storage().data_ptr() for tensor in (x, module.weight)}
    assert theirs.storages.keys() == same
    assert same <= ours.storages.keys()
    # Scale and shift, and what the algorithm's own arithmetic on them keeps: some float32 numbers a group.
    groups = OUT * (2 if weights in ("int4", "int2") else 1)
    assert ours.beyond(x, module.weight) <= 8 * 4 * groups
    if isinstance(algorithm, StraightThrough):
        assert ours.beyond(x, module.weight) <= 2 * 4 * groups


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_autocast_keeps_and_gives_what_a_float_layer_does(weights: str) -> None:
    module = layer(weights, dtype=torch.bfloat16)
    x = inputs(32, IN).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, y = kept_by(lambda: module(x))
        theirs, z = kept_by(lambda: linear(x, module.weight, module.bias))
    assert y.dtype is z.dtype is torch.bfloat16
    weight = served(module)
    assert torch.equal(y, linear(x.bfloat16(), weight, module.bias.bfloat16()))
    # The input and the weight in bfloat16, as the float layer does, and some scales.
    scales = 2 * 4 * 2 * OUT
    assert ours.beyond(x, module.weight) <= theirs.beyond(x, module.weight) + scales
    y.float().sum().backward()
    assert module.weight.grad is not None
    assert x.grad is not None
    assert module.weight.grad.dtype is x.grad.dtype is torch.float32


@pytest.mark.parametrize("activations", [None, "int8"], ids=str)
@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
def test_activation_checkpointing_changes_nothing(algorithm: Algorithm, activations: str | None) -> None:
    module = layer("int4", algorithm=algorithm, activations=activations)
    x = inputs(6, IN)
    plain = gradients(module, module, x)
    again = gradients(module, lambda x: checkpoint(module, x, use_reentrant=False), x)  # type: ignore[no-any-return]
    assert all(same_bits(again[name], tensor) for name, tensor in plain.items())


def test_an_observer_sees_the_same_under_activation_checkpointing() -> None:
    module = layer("int8", activations="int8")
    assert module.input_quantizer is not None
    module.mode = Mode(observe=True)
    observer = module.input_quantizer.observer
    before = int(observer.calls)
    checkpoint(module, inputs(6, IN), use_reentrant=False).sum().backward()
    assert int(observer.calls) == before + 1
    module.input_quantizer.refresh()
    assert module.input_quantizer.scale == inputs(6, IN).abs().max() / 127


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_gradients_accumulate(weights: str) -> None:
    module = layer(weights)
    for seed in (1, 2):
        module(inputs(4, IN, seed=seed)).sum().backward()
    found = module.weight.grad
    module.zero_grad()
    module(torch.cat([inputs(4, IN, seed=1), inputs(4, IN, seed=2)])).sum().backward()
    assert found is not None
    assert module.weight.grad is not None
    torch.testing.assert_close(found, module.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_layer_called_twice_adds_both_gradients(weights: str) -> None:
    module = layer(weights, in_features=OUT)
    found = gradients(module, lambda x: module(torch.tanh(module(x))), inputs(4, OUT))
    expected = gradients(
        module, lambda x: reference_forward(module, torch.tanh(reference_forward(module, x))), inputs(4, OUT)
    )
    assert_close(found, expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(OUT, 64)
        self.head = nn.Linear(64, OUT, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, numbers: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(numbers))
        return y


def test_a_weight_shared_with_an_embedding_gets_both_gradients() -> None:
    torch.manual_seed(0)
    model = Tied()
    QLinear.adopt(model.head, StraightThrough().make(model.head.weight, QTYPES["int8"], torch.float32))
    numbers = torch.arange(5)
    model(numbers).square().sum().backward()
    found = model.embedding.weight.grad
    assert found is not None
    found = found.clone()
    model.zero_grad()
    head = model.head
    assert isinstance(head, QLinear)
    reference_forward(head, model.embedding(numbers)).square().sum().backward()
    assert model.embedding.weight.grad is not None
    torch.testing.assert_close(found, model.embedding.weight.grad, rtol=2e-5, atol=2e-5)
    assert model.embedding.weight is model.head.weight


@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
def test_a_cast_to_bfloat16_leaves_the_scales_in_float32(algorithm: Algorithm) -> None:
    module = layer("int4", algorithm=algorithm, activations="int8", dtype=torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items() if "quantizer" in name}
    module.to(torch.bfloat16)
    assert module.weight.dtype is torch.bfloat16
    assert all(same_bits(module.state_dict()[name], tensor) for name, tensor in state.items())
    y = module(inputs(3, IN).bfloat16())
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert module.weight.grad is not None
    assert module.weight.grad.dtype is torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in module.quantizer_parameters())


@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_deep_copy_and_a_state_dict_compute_the_same(weights: str, algorithm: Algorithm) -> None:
    module = layer(weights, algorithm=algorithm, activations="int8")
    copied = copy.deepcopy(module)
    loaded = layer(
        weights,
        algorithm=LearnedStep(start=0.5) if isinstance(algorithm, LearnedStep) else algorithm,
        activations="int8",
    )
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(module.state_dict(), strict=True)
    for other in (copied, loaded):
        assert same_bits(other(inputs(3, IN)), module(inputs(3, IN)))
    with torch.no_grad():
        copied.weight.zero_()
    assert module.weight.abs().max() > 0


def test_modes() -> None:
    module = layer("int2", activations="int8")
    x = inputs(4, IN)
    module.mode = Mode(activations=False)
    weight_only = module(x)
    assert same_bits(weight_only, layer("int2")(x))
    module.mode = Mode(weights=False)
    assert same_bits(module(x), linear(x, module.weight, module.bias))
    module.mode = Mode()
    assert not torch.equal(module(x), weight_only)
    assert same_bits(module.train()(x), module.eval()(x))


def test_an_input_that_arrives_quantized_is_not_quantized_again() -> None:
    module = layer("int8", activations="int8")
    assert module.input_quantizer is not None
    assert module.output_quantizer is not None
    assert [*module.activation_quantizers()] == [module.input_quantizer, module.output_quantizer]
    module.input_quantizer.arrives_quantized = True
    x = inputs(4, IN)
    expected = linear(x, served(module), module.bias)
    assert torch.equal(module(x), reference_activation(expected, module.output_quantizer.scale, "int8"))


def test_a_subclass_is_found_so_that_it_can_be_reported() -> None:
    assert layer_class(nn.MultiheadAttention(8, 2).out_proj) is layer_class(nn.Linear(2, 2)) is QLinear
    assert layer_class(nn.LayerNorm(2)) is None


def test_every_layer_object_is_listed_once() -> None:
    one = layer()
    assert [name for name, _ in quantized_layers(nn.Sequential(one, nn.ReLU(), one))] == ["0"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own compiler does
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_compiled_and_eager_training_have_the_same_bits(weights: str) -> None:
    torch.compiler.reset()
    module = layer(weights, dtype=torch.bfloat16, activations="int8" if weights == "int8" else None, out_features=32)
    eager = gradients(module, module, inputs(4, IN))
    compiled = gradients(module, torch.compile(module, fullgraph=True), inputs(4, IN))
    assert eager.keys() == compiled.keys()
    for name, tensor in eager.items():
        assert same_bits(compiled[name], tensor), name
