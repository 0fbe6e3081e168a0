"""Learned ranges: what they start from, how they move, and that what they train is what is stored."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import linear

import qat
from qat.formats import QUANTO
from qat.layers import QLinear, quantized_layers
from qat.numerics import QType, moved_range
from qat.quantizers import LearnedAffine, Quantized, StraightThrough, WeightQuantizer
from qat.quantizers.learned_affine import LearnedRange
from tests.helpers import DTYPES, awkward_weight, one_sided_weight, reference_quantize, same_bits

QTYPES = QUANTO.qtypes
AFFINE = {name: QTYPES[name] for name in ("int4", "int2")}
ALGORITHMS = [LearnedAffine(start="minmax"), LearnedAffine(start="clip"), LearnedAffine(mask_saturated=False)]
SHAPES = [(1, 8), (3, 5), (4, 96), (16, 256), (3, 320), (3, 200)]


def move(quantizer: LearnedRange, amount: float = 0.1, seed: int = 5) -> LearnedRange:
    """Move every end at random, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return quantizer


def value_of(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """The fake-quantized weight in the serving dtype."""
    return quantizer.quantize(weight, quantizer.dtype).value


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_the_final_codes_give_the_trained_weight(algorithm: LearnedAffine, qtype: QType, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        quantizer = algorithm.make(weight, qtype, dtype)
        for amount in (0.0, 0.1, 2.0):  # the last makes ends cross
            moved = move(quantizer, amount)
            trained = value_of(moved, weight)
            assert bool(trained.isfinite().all())
            frozen, value = moved.freeze(weight)
            assert same_bits(value, trained)
            assert same_bits(frozen.dequantize(), trained)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_served_values_are_those_of_an_independent_implementation(qtype: QType, dtype: str) -> None:
    weight = awkward_weight(6, 256)
    quantizer = move(LearnedAffine().make(weight, qtype, DTYPES[dtype]))
    value, scale, shift = quantizer.quantize(weight, DTYPES[dtype])
    group = 128 if qtype.name in AFFINE else None
    _, values = reference_quantize(weight, scale, shift, qtype.name, dtype, group)
    assert torch.equal(value.double(), torch.from_numpy(values))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_started_at_min_and_max_it_is_straight_through(qtype: QType, dtype: torch.dtype) -> None:
    for weight in (awkward_weight(16, 256), one_sided_weight()):
        learned = LearnedAffine(start="minmax").make(weight, qtype, dtype)
        dynamic = StraightThrough().make(weight, qtype, dtype)
        assert same_bits(value_of(learned, weight), value_of(dynamic, weight))


def unrounded(quantizer: LearnedRange, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of the moved range before they are rounded to the serving dtype."""
    ends = moved_range(*quantizer._start(weight), quantizer.low_move, quantizer.high_move)
    return quantizer.qtype.scale_shift(*ends)


def plainly(quantizer: LearnedRange, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
    """What the quantizer does for a type without fast kernels: ordinary autograd on the moved range."""
    return quantizer.by_scale(weight, *unrounded(quantizer, weight), out_dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_faster_way_gives_the_bits_and_gradients_of_the_plain_one(qtype: QType, dtype: torch.dtype) -> None:
    weight = awkward_weight(8, 256)
    found: list[list[Tensor]] = []
    for way in ("fused", "plain"):
        quantizer = move(LearnedAffine().make(weight, qtype, dtype))
        _, scale, shift = (quantizer.quantize if way == "fused" else functools.partial(plainly, quantizer))(
            weight, dtype
        )
        pair = [scale] if shift is None else [scale, shift]
        torch.autograd.backward(pair, [torch.linspace(-1, 2, tensor.numel()).view_as(tensor) for tensor in pair])
        gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
        assert len(gradients) == len(pair)
        found.append([tensor.detach() for tensor in pair] + gradients)
    fast, plain = found
    assert all(same_bits(left, right) for left, right in zip(fast[: len(fast) // 2], plain, strict=False))
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-9)  # products in another order


def test_a_move_is_in_units_of_half_the_range() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.2, 3.0]])
    quantizer = LearnedAffine(start="minmax").make(weight, QTYPES["int2"], torch.float32)
    with torch.no_grad():
        assert quantizer.low_move is not None
        quantizer.low_move.fill_(-0.25)  # half the width is 2: the low end goes up to -0.5
        quantizer.high_move.fill_(0.5)  # and the high end to 4
    _, scale, shift = quantizer.quantize(weight, torch.float32)
    assert shift is not None
    assert (scale.item(), shift.item()) == (1.5, 0.5)


def differentiable(module: QLinear, x: Tensor) -> Tensor:
    """The layer as one differentiable expression in float64, after arXiv 2404.16898, without our operators."""
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, LearnedRange)
    steps = {"int8": (-128, 127), "float8": (-448, 448), "int4": (0, 15), "int2": (0, 3)}[quantizer.qtype.name]
    high_start, high_move = quantizer.high_start.double(), quantizer.high_move.double()
    weight = module.weight.double()
    if quantizer.low_start is None or quantizer.low_move is None:
        scale, low = high_start * (1 + high_move) / steps[1], torch.zeros(())
    else:
        low_start = quantizer.low_start.double()
        half = (high_start - low_start) / 2
        low = low_start - half * quantizer.low_move.double()
        scale = (high_start + half * high_move - low) / steps[1]
    codes = ((weight.view(scale.shape[0], -1) - low) / scale).clamp(*steps)
    rounded = codes.float().to(torch.float8_e4m3fn).double() if quantizer.qtype.name == "float8" else codes.round()
    value = scale * (codes + (rounded - codes).detach()) + low
    return linear(x.double(), value.view_as(weight))


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_gradients_are_those_of_plain_autograd(qtype: QType) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 256)
    layer = nn.Linear(256, 12, bias=False)
    quantizer = move(LearnedAffine().make(layer.weight, qtype, torch.float32), 0.05)
    module = QLinear.adopt(layer, quantizer)
    found = []
    for forward in (module, lambda x: differentiable(module, x)):
        module.zero_grad()
        y = forward(x)
        (y.square() * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    ours, reference = found
    assert ours.keys() == reference.keys() == {name for name, _ in module.named_parameters()}
    for name, tensor in reference.items():
        # float32 against float64; scale and shift in float32 move a few weights' codes by nothing, their x by 1e-6
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("qtype", AFFINE.values(), ids=AFFINE)
def test_gradients_of_the_ends_are_true_where_all_weights_saturate(qtype: QType) -> None:
    # There every value is an end of the range, a smooth function of the moves: finite differences must agree.
    weight = torch.where(torch.arange(128) % 3 == 0, -1.0, 1.0).repeat(2, 1)
    low, high = torch.full((2, 1), -0.3), torch.full((2, 1), 0.5)
    module = QLinear.adopt(nn.Linear(128, 2, bias=False), LearnedRange(low, high, qtype, torch.float32))
    with torch.no_grad():
        module.weight.copy_(weight)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        y: Tensor = module(x)
        return y.double().square().sum()

    loss().backward()  # type: ignore[no-untyped-call]
    assert module.weight.grad is not None
    assert not module.weight.grad.any()
    for parameter in module.weight_quantizer.parameters():
        assert parameter.grad is not None
        for row in range(2):
            sides = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter[row] += step
                    sides.append(float(loss()))
                    parameter[row] -= step
            assert float(parameter.grad[row]) == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=1e-2)


@pytest.mark.parametrize("masked", [True, False])
def test_weights_outside_the_range_get_a_gradient_only_if_asked_for(masked: bool) -> None:
    layer = nn.Linear(128, 4, bias=False)
    algorithm = LearnedAffine(start="minmax", mask_saturated=masked)
    module = QLinear.adopt(layer, algorithm.make(layer.weight, QTYPES["int4"], torch.float32))
    with torch.no_grad():
        module.weight[:, 7] = 1.0
    module(torch.ones(1, 128)).sum().backward()
    assert module.weight.grad is not None
    assert bool((module.weight.grad[:, 7] == (0.0 if masked else 1.0)).all())
    assert bool((module.weight.grad[:, 8] == 1.0).all()) or masked


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_ends_that_cross_leave_a_scale_above_zero_and_come_back(qtype: QType, dtype: torch.dtype) -> None:
    layer = nn.Linear(256, 8, bias=False)
    module = QLinear.adopt(layer, LearnedAffine().make(layer.weight, qtype, dtype))
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, LearnedRange)
    with torch.no_grad():
        quantizer.high_move.fill_(-3.0)
    _, scale, _ = quantizer.quantize(module.weight, dtype)
    assert bool((scale > 0).all())
    wanted = linear(torch.eye(256), module.weight.detach())
    module.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (module(torch.eye(256)) - wanted).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert float(quantizer.high_move.detach().mean()) > -1.5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_groups_without_a_range_follow_their_weights(qtype: QType, dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 256)
    weight[1] = 0.03
    weight[2] = torch.randn(256, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedAffine().make(weight, qtype, dtype)
    assert torch.equal(value_of(quantizer, weight)[0], torch.zeros(256, dtype=dtype))
    torch.testing.assert_close(value_of(quantizer, weight)[1], weight[1].to(dtype), rtol=2e-2, atol=0)
    later = weight + 0.3 * torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    dynamic = value_of(StraightThrough().make(later, qtype, dtype), later)
    rows = 1 if qtype.has_shift else 0  # a constant row is a range to a scale without shift
    assert same_bits(value_of(quantizer, later)[: rows + 1], dynamic[: rows + 1])
    assert not torch.equal(value_of(quantizer, later)[2], dynamic[2])
    layer = nn.Linear(256, 3, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    module = QLinear.adopt(layer, LearnedAffine().make(layer.weight, qtype, dtype))
    module(torch.ones(2, 256)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    assert module.weight.grad is not None
    assert bool((module.weight.grad == 2).all())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_one_sided_groups_can_move_both_ends(qtype: QType, dtype: torch.dtype) -> None:
    weight = one_sided_weight()
    quantizer = LearnedAffine(start="minmax").make(weight, qtype, dtype)
    before, _ = unrounded(quantizer, weight)
    for parameter in quantizer.parameters():
        nn.init.constant_(parameter, 0.5)
    after, _ = unrounded(quantizer, weight)
    torch.testing.assert_close(after, before * 1.5)


@pytest.mark.parametrize("outlier", [1e4, 1e20, 3e38])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_huge_outlier_gives_finite_ranges(qtype: QType, outlier: float) -> None:
    weight = awkward_weight(4, 256)
    weight[3, 3] = outlier
    quantizer = LearnedAffine().make(weight, qtype, torch.float32)
    assert all(bool(tensor.isfinite().all()) for tensor in quantizer.state_dict().values())
    assert bool(value_of(quantizer, weight).isfinite().all())


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_masters_of_other_dtypes(qtype: QType, master: torch.dtype) -> None:
    weight = awkward_weight(5, 256).to(master)
    quantizer = LearnedAffine().make(weight, qtype, torch.bfloat16)
    assert {tensor.dtype for tensor in (*quantizer.parameters(), *quantizer.buffers())} == {torch.float32}
    assert same_bits(quantizer.freeze(weight)[0].dequantize(), value_of(quantizer, weight))


def test_a_weight_on_the_meta_device_gets_its_shapes_now_and_its_ranges_with_the_checkpoint() -> None:
    quantizer = LearnedAffine().make(torch.empty(4, 256, device="meta"), QTYPES["int2"], torch.bfloat16)
    assert {tuple(tensor.shape) for tensor in (*quantizer.parameters(), *quantizer.buffers())} == {(8, 1)}
    quantizer.to_empty(device="cpu")
    weight = torch.zeros(4, 256)
    quantizer.load_state_dict(LearnedAffine().make(weight, QTYPES["int2"], torch.bfloat16).state_dict())
    assert torch.equal(value_of(quantizer, weight + 1), torch.ones(4, 256).bfloat16())  # flat groups were noted


def prepared(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = nn.Linear(256, 32)
    with torch.no_grad():
        first.weight[0] = 0.0
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 16))
    qat.prepare(model, qat.QuantSpec(weights="int2", dtype="float32"), algorithm=LearnedAffine())
    return model


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-2, weight_decay=0.1))
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 256, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def test_training_moves_weights_and_ranges_and_freezing_is_exact() -> None:
    model = prepared(0)
    train(model)
    for _, layer in quantized_layers(model):
        assert all(bool((p != 0).any()) for p in layer.quantizer_parameters())
    trained = {name: value_of(layer.weight_quantizer, layer.weight) for name, layer in quantized_layers(model)}
    qat.freeze(model)
    for name, weight in trained.items():
        assert same_bits(model.get_submodule(name).weight.dequantize(), weight)  # type: ignore[operator]


def test_a_checkpoint_holds_the_ranges() -> None:
    model, other = prepared(0), prepared(1)
    train(model)
    other.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    x = torch.randn(3, 256)
    assert same_bits(other(x), model(x))
    assert same_bits(copied(x), model(x))
    train(model)
    train(other)
    assert same_bits(other(x), model(x))


def test_a_float_checkpoint_starts_the_ranges_afresh(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared(0)
    train(model)
    before = {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()}
    fresh = prepared(1)
    model.load_state_dict({name: t for name, t in fresh.state_dict().items() if "quantizer" not in name})
    assert "2 quantizers start afresh" in caplog.text
    assert {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()} == before
    assert all(same_bits(t, model.state_dict()[name]) for name, t in fresh.state_dict().items())
    assert same_bits(model(torch.ones(2, 256)), fresh(torch.ones(2, 256)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own compiler does
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_compiled_and_eager_training_have_the_same_bits(qtype: QType) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = nn.Linear(256, 32)
    with torch.no_grad():
        layer.weight[0] = 0.0
    quantizer = move(LearnedAffine().make(layer.weight, qtype, torch.bfloat16), 0.03)
    module = QLinear.adopt(layer, quantizer)
    x = torch.randn(4, 256)
    found = []
    for forward in (module, torch.compile(module, fullgraph=True)):
        module.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        found.append(
            {"y": y.detach()} | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        )
    eager, compiled = found
    assert eager.keys() == compiled.keys()
    for name, tensor in eager.items():
        assert same_bits(compiled[name], tensor), name


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="'minmax', 'clip'"):
        LearnedAffine.model_validate({"start": "middle"})


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_start_of_lsq_is_the_papers(qtype: QType) -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) + 0.1
    _, scale, shift = LearnedAffine(start="lsq").make(weight, qtype, torch.float32).quantize(weight, torch.float32)
    rows = weight.double().view(scale.shape[0], -1)
    center = rows.mean(1, keepdim=True) if qtype.name in AFFINE else torch.zeros(())
    codes = {"int8": 127, "float8": 448, "int4": 7.5, "int2": 1.5}[qtype.name]
    wanted = 2 * (rows - center).abs().mean(1, keepdim=True) / codes**0.5
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-5, atol=0)
    if shift is not None:
        torch.testing.assert_close(shift.double(), wanted * codes - center, rtol=1e-5, atol=1e-6)


def test_a_margin_without_a_mask_is_refused() -> None:
    with pytest.raises(qat.SpecError, match=r"mask_margin \(0.5\) needs mask_saturated=True"):
        LearnedAffine(mask_margin=0.5, mask_saturated=False)
