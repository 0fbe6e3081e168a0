"""What every algorithm of the library promises, whatever it learns: what is trained is what is stored and served."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

import qat
from qat.formats import QUANTO
from qat.layers import QLinear, quantized_layers
from qat.numerics import QType
from qat.quantizers import Algorithm, AnyAlgorithm, Quantized, WeightQuantizer
from qat.quantizers.base import Algorithm as Base
from tests.helpers import DTYPES, awkward_weight, same_bits

QTYPES = QUANTO.qtypes
ALGORITHMS: list[Algorithm] = [
    *(kind() for kind in get_args(get_args(AnyAlgorithm)[0])),
    qat.LearnedAffine(start="lsq", mask_margin=0.5),
    qat.DualLSQ(start="minmax"),
]
NEEDS_SHIFT = qat.StretchedElastic
PAIRS = [
    pytest.param(algorithm, qtype, id=f"{algorithm.kind}{index}-{name}")
    for index, algorithm in enumerate(ALGORITHMS)
    for name, qtype in QTYPES.items()
    if qtype.has_shift or not isinstance(algorithm, NEEDS_SHIFT)
]
SHAPES = [(1, 8), (3, 5), (4, 96), (16, 256), (3, 320), (3, 200)]


def moved(quantizer: WeightQuantizer, amount: float, seed: int = 5) -> WeightQuantizer:
    """All that is learned, moved at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return quantizer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 16))


def prepared(algorithm: Algorithm, weights: str, seed: int = 0, dtype: str = "float32") -> nn.Sequential:
    torch.manual_seed(seed)
    model = network()
    with torch.no_grad():
        model[0].weight[0] = 0.0  # type: ignore[union-attr]
        model[0].weight[1] = 0.03  # type: ignore[union-attr]
    qat.prepare(model, qat.QuantSpec.model_validate({"weights": weights, "dtype": dtype}), algorithm=algorithm)
    return model


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-2, weight_decay=0.1))
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 256, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def test_every_algorithm_has_a_name_for_configuration_files_and_is_public() -> None:
    adapter: TypeAdapter[Algorithm] = TypeAdapter(AnyAlgorithm)
    kinds = get_args(get_args(AnyAlgorithm)[0])
    assert len(kinds) == len({kind().kind for kind in kinds}) == 6
    for kind in kinds:
        assert issubclass(kind, Base)
        assert adapter.validate_python({"kind": kind().kind, "gradient": "stable"}) == kind(gradient="stable")
        assert getattr(qat, kind.__name__) is kind


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("algorithm", "qtype"), PAIRS)
def test_the_final_codes_give_the_trained_weight(algorithm: Algorithm, qtype: QType, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        quantizer = algorithm.make(weight, qtype, dtype)
        for amount in (0.0, 0.1, 2.0):  # the last makes ends cross
            trained = moved(quantizer, amount).quantize(weight, dtype).value
            frozen, value = quantizer.freeze(weight)
            assert bool(trained.isfinite().all())
            assert same_bits(value, trained)
            assert same_bits(frozen.dequantize(), trained)
            assert same_bits(quantizer.quantize(weight, torch.float32).value, trained.float())
            assert not bool((frozen.scale < 0).any())


@pytest.mark.parametrize("smooth", [False, True], ids=["straight through", "stable"])
@pytest.mark.parametrize(("algorithm", "qtype"), PAIRS)
def test_backward_computes_the_value_of_the_forward_again(algorithm: Algorithm, qtype: QType, smooth: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 8, bias=False)
    quantizer = moved(algorithm.make(layer.weight, qtype, torch.bfloat16), 0.1)
    quantizer.smooth = smooth and not qtype.floating
    x = torch.eye(8, 256, requires_grad=True)
    y = QLinear.adopt(layer, quantizer)(x)
    y.backward(torch.eye(8))
    assert x.grad is not None
    assert same_bits(x.grad, quantizer.quantize(layer.weight, torch.float32).value)


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("algorithm", "qtype"), PAIRS)
def test_masters_of_other_dtypes(algorithm: Algorithm, qtype: QType, master: torch.dtype) -> None:
    layer = nn.Linear(256, 5, bias=False, dtype=master)
    quantizer = moved(algorithm.make(layer.weight, qtype, torch.bfloat16), 0.1)
    assert {tensor.dtype for tensor in quantizer.state_dict().values()} <= {
        torch.float32,
        torch.bool,
        torch.uint8,
    }  # uint8: a name
    QLinear.adopt(layer, quantizer)(torch.ones(2, 256, dtype=master)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is master
    found = quantizer.quantize(layer.weight, torch.bfloat16)
    assert same_bits(quantizer.freeze(layer.weight)[0].dequantize(), found.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("algorithm", "qtype"), PAIRS)
def test_what_is_trained_is_what_is_served(algorithm: Algorithm, qtype: QType, dtype: str, tmp_path: Path) -> None:
    model = prepared(algorithm, qtype.name, dtype=dtype)
    train(model)
    for name, layer in quantized_layers(model):
        assert all(bool(p.isfinite().all()) for p in layer.parameters()), name
    values = {n: m.weight_quantizer.quantize(m.weight, DTYPES[dtype]).value for n, m in quantized_layers(model)}
    x = torch.randn(3, 256, dtype=DTYPES[dtype])
    qat.freeze(model)
    for name, value in values.items():
        assert same_bits(model.get_submodule(name).weight.dequantize(), value)  # type: ignore[operator]
    qat.export(model, tmp_path / "out")
    qat.verify(tmp_path / "out", reference=model, inputs=x, model=network())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: str(algorithm.kind))
def test_a_checkpoint_and_a_copy_hold_what_is_learned(algorithm: Algorithm) -> None:
    model, other = prepared(algorithm, "int2"), prepared(algorithm, "int2", seed=1)
    train(model)
    other.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    x = torch.randn(3, 256)
    assert same_bits(other(x), model(x))
    assert same_bits(copied(x), model(x))
    train(model)
    train(other)
    assert same_bits(other(x), model(x))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: str(algorithm.kind))
def test_a_float_checkpoint_starts_afresh(algorithm: Algorithm) -> None:
    model, fresh = prepared(algorithm, "int4"), prepared(algorithm, "int4", seed=1)
    train(model)
    model.load_state_dict({name: t for name, t in fresh.state_dict().items() if "quantizer" not in name})
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(same_bits(t, model.state_dict()[name]) for name, t in fresh.state_dict().items())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: str(algorithm.kind))
def test_all_that_is_learned_is_in_the_scale_group_and_has_a_dimension(algorithm: Algorithm) -> None:
    model = prepared(algorithm, "int4")
    learned = {id(p): p for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()}
    groups = {group["name"]: group for group in qat.parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    assert {id(p) for p in groups.get("scales", {"params": []})["params"]} == learned.keys()
    assert bool(learned) is not isinstance(algorithm, qat.StraightThrough)
    assert all(p.ndim == 2 and p.dtype is torch.float32 for p in learned.values())  # fully_shard takes no scalars
    before = {key: p.detach().clone() for key, p in learned.items()}
    train(model)
    assert all(not torch.equal(p, before[key]) for key, p in learned.items())


@pytest.mark.parametrize(("algorithm", "qtype"), PAIRS)
def test_held_scales_leave_the_gradient_of_the_weight(algorithm: Algorithm, qtype: QType) -> None:
    model = prepared(algorithm, qtype.name)
    layer = model[0]  # type: ignore[index]
    found = []
    for held in (False, True):
        layer.weight_quantizer.requires_grad_(not held)
        model.zero_grad()
        model(torch.ones(2, 256)).sum().backward()
        found.append(layer.weight.grad.clone())
        assert all((p.grad is None) is held for p in layer.weight_quantizer.parameters())
    assert same_bits(*found)
    assert found[0].any()


@pytest.mark.parametrize(("algorithm", "qtype"), PAIRS)
def test_a_weight_on_the_meta_device_gives_the_shapes(algorithm: Algorithm, qtype: QType) -> None:
    made = algorithm.make(torch.empty(4, 256, device="meta"), qtype, torch.bfloat16).state_dict()
    real = algorithm.make(awkward_weight(4, 256), qtype, torch.bfloat16).state_dict()
    assert {name: tensor.shape for name, tensor in made.items()} == {name: t.shape for name, t in real.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own compiler does
@pytest.mark.parametrize("smooth", [False, True], ids=["straight through", "stable"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: str(algorithm.kind))
def test_compiled_code_has_the_bits_of_eager_code(algorithm: Algorithm, smooth: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = nn.Linear(256, 32)
    with torch.no_grad():
        layer.weight[0] = 0.0
    quantizer = moved(algorithm.make(layer.weight, QTYPES["int4"], torch.bfloat16), 0.03)
    quantizer.smooth = smooth
    module = QLinear.adopt(layer, quantizer)
    x = torch.randn(4, 256)
    found: list[dict[str, Tensor]] = []
    for forward in (module, torch.compile(module, fullgraph=True)):
        module.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append({"y": y.detach()} | gradients)
    eager, compiled = found
    assert eager.keys() == compiled.keys() == {"y", *(name for name, _ in module.named_parameters())}
    assert same_bits(compiled["y"], eager["y"])
    for name, tensor in eager.items():  # the plain gradients are sums in another order
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))


def test_an_option_for_integer_codes_needs_some() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(qat.SpecError, match="gradient='stable' needs layers with integer codes"):
        qat.prepare(model, qat.QuantSpec(weights="float8"), algorithm=qat.StraightThrough(gradient="stable"))
    assert type(model[0]) is nn.Linear
    qat.prepare(model, qat.QuantSpec(weights="int8"), algorithm=qat.StraightThrough(gradient="stable"))
    assert model[0].weight_quantizer.smooth is True


def test_a_quantized_weight_is_still_three_things() -> None:
    assert Quantized._fields == ("value", "scale", "shift")
