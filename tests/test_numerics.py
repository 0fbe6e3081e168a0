"""The specification of quantization against two independent ones: numpy in float64, and optimum-quanto's operators.

The first parity tests loop over well more than a thousand seeded cases; they are cheap, for weights are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes
from optimum.quanto.tensor import WeightQBitsTensor
from torch import Tensor

from qat import numerics
from qat.errors import StateError
from qat.formats import QUANTO
from qat.formats.quanto_types import QUANTO_NAMES
from qat.numerics import Affine, FrozenWeight, QType, Symmetric
from tests.helpers import DTYPES, awkward_weight, reference_quantize, same_bits

QTYPES = QUANTO.qtypes

# (out, in): one row, odd sizes, and groups of 128, 96, 64, 32 and a whole row; the last two are longer than 128 with
# no group that divides.
SHAPES = [
    (1, 8),
    (3, 5),
    (7, 33),
    (4, 96),
    (5, 128),
    (2, 256),
    (16, 256),
    (3, 192),
    (3, 320),
    (2, 160),
    (1, 256),
    (3, 200),
    (2, 131),
]
SEEDS = range(24)


def serving(weight: Tensor, qtype: QType, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Scale and shift as training finds them; every other seed shrinks the range, so that weights saturate."""
    part = 1.0 if seed % 2 == 0 else 0.7
    scale, shift = qtype.scale_shift(*qtype.weight_range(weight))
    return qtype.serve(scale * part, None if shift is None else shift * part, dtype, weight.shape[1])


def cases() -> Iterator[tuple[Tensor, int]]:
    for (out_features, in_features), seed in itertools.product(SHAPES, SEEDS):
        yield awkward_weight(out_features, in_features, seed), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_codes_and_values_are_those_of_numpy(qtype: QType, dtype: str) -> None:
    for weight, seed in cases():
        scale, shift = serving(weight, qtype, DTYPES[dtype], seed)
        codes = qtype.encode(weight, scale, shift)
        values = qtype.decode(codes, scale, shift, DTYPES[dtype])
        expected = reference_quantize(weight, scale, shift, qtype.name, dtype, qtype.group_size(weight.shape[1]))
        assert codes.shape == values.shape == weight.shape
        assert codes.dtype == qtype.storage
        assert values.dtype is DTYPES[dtype]
        assert np.array_equal(codes.double().numpy(), expected[0]), (weight.shape, seed)
        assert np.array_equal(values.double().numpy(), expected[1]), (weight.shape, seed)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_codes_are_quantos_in_float32(qtype: QType) -> None:
    for weight, seed in cases():
        scale, shift = serving(weight, qtype, torch.float32, seed)
        ours = qtype.encode(weight, scale, shift)
        if shift is not None:
            size = qtype.group_size(weight.shape[1])
            theirs = torch.ops.quanto.quantize_affine(weight, qtype.bits, 0, size, scale, shift)
        elif weight.shape[0] == 1:
            theirs = torch.ops.quanto.quantize_symmetric(weight, ours.dtype, None, scale.reshape(()))
        else:
            theirs = torch.ops.quanto.quantize_symmetric(weight, ours.dtype, 0, scale)
        # Where the scale is 0 quanto casts NaN to an integer, which means nothing.
        defined = (scale != 0).expand_as(qtype.grouped(weight))
        ours, theirs = ours.float().reshape(defined.shape), theirs.float().reshape(defined.shape)
        assert torch.equal(ours[defined], theirs[defined]), (weight.shape, seed)
        assert not ours[~defined].any()


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_ranges_are_those_of_quantos_optimizers(qtype: QType) -> None:
    quanto_type = qtypes[QUANTO_NAMES[qtype.name]]
    for weight, _ in cases():
        if qtype.has_shift:
            if qtype.grouped(weight).shape[0] == 1:
                continue  # quanto takes one row's range a column at a time; ours keeps one scale, which loads as well
            ours = qtype.scale_shift(*qtype.weight_range(weight))
            theirs = MaxOptimizer()(weight, quanto_type, 0, qtype.group_size(weight.shape[1]))
            assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(ours, theirs, strict=True))
        else:
            theirs = AbsmaxOptimizer()(weight, quanto_type, 0)
            assert torch.equal(qtype.scale_shift(*qtype.weight_range(weight))[0], theirs.reshape(-1, 1))


@pytest.mark.parametrize("master", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_any_master_dtype_is_read_as_its_float32_numbers(qtype: QType, master: str) -> None:
    weight = awkward_weight(6, 256).to(DTYPES[master])
    for dtype in DTYPES.values():
        scale, shift = serving(weight, qtype, dtype)
        again = serving(weight.float(), qtype, dtype)
        assert torch.equal(scale, again[0])
        codes = qtype.encode(weight, scale, shift)
        assert same_bits(codes, qtype.encode(weight.float(), scale, shift))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_zero_row_stays_zero(qtype: QType, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 64)
    scale, shift = serving(weight, qtype, dtype)
    value = qtype.fake_quantize(weight, scale, shift, dtype, torch.float32)
    assert torch.equal(value, weight)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", [QTYPES[name] for name in ["int4", "int2"]], ids=lambda qtype: qtype.name)
def test_a_constant_group_keeps_its_value_and_has_code_0(qtype: QType, dtype: torch.dtype) -> None:
    weight = torch.full((2, 64), 0.03).to(dtype).float()
    scale, shift = serving(weight, qtype, dtype)
    assert not qtype.encode(weight, scale, shift).any()
    assert torch.equal(qtype.fake_quantize(weight, scale, shift, dtype, torch.float32), weight)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_float8_scale_is_above_zero_in_the_serving_dtype(dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-45, 1e-30):
        served, _ = QTYPES["float8"].serve(torch.tensor([[scale]]), None, dtype, 64)
        assert served.to(dtype) > 0
        assert torch.equal(served.to(dtype).float(), served)
    assert QTYPES["int8"].serve(torch.zeros(1, 1), None, dtype, 64)[0] == 0


@given(st.integers(0, 2**31), st.sampled_from([*QTYPES.values()]), st.sampled_from(list(DTYPES)))
def test_values_on_the_grid_keep_their_codes(seed: int, qtype: QType, dtype: str) -> None:
    # In float32 for the affine types: in a narrow dtype the rounded difference need not lie nearest to its code.
    served = DTYPES[dtype] if not qtype.has_shift else torch.float32
    weight = awkward_weight(4, 160, seed)
    scale, shift = serving(weight, qtype, served, seed)
    codes = qtype.encode(weight, scale, shift)
    value = qtype.decode(codes, scale, shift, served)
    kept = torch.ones_like(weight, dtype=torch.bool)
    if qtype.floating and served is torch.float16:
        # Among float16's subnormal numbers a fraction of the scale is rounded to a multiple of 2^-24, which may be 0.
        kept = (codes.float() * scale).abs() >= torch.finfo(served).tiny
    assert torch.equal(qtype.encode(value, scale, shift).float()[kept], codes.float()[kept])


def test_round_to_passes_the_gradient_and_gives_float32() -> None:
    values = torch.randn(50, requires_grad=True)
    rounded = numerics.round_to(values, torch.bfloat16)
    assert rounded.dtype is torch.float32
    assert torch.equal(rounded, values.detach().bfloat16().float())
    rounded.backward(torch.arange(50.0))
    assert values.grad is not None
    assert torch.equal(values.grad, torch.arange(50.0))
    assert torch.equal(numerics.round_to(values, torch.float32), values)


@pytest.mark.parametrize(
    ("name", "dtype", "in_features", "expected"),
    [
        ("int4", torch.bfloat16, 256, True),
        ("int4", torch.bfloat16, 128, False),
        ("int4", torch.bfloat16, 192, False),
        ("int4", torch.float32, 256, False),
        ("int2", torch.bfloat16, 256, False),
    ],
    ids=str,
)
def test_which_weights_meet_tinygemm(name: str, dtype: torch.dtype, in_features: int, expected: bool) -> None:
    assert QTYPES[name].anchor(dtype, in_features) == (8 if expected else 0)


def random_scale_shift(count: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(count, 1) * 10.0 ** torch.empty(count, 1).uniform_(-4, 1)
    shift = torch.randn(count, 1) * 10.0 ** torch.empty(count, 1).uniform_(-5, 2)
    return numerics.round_to(scale, torch.bfloat16), shift


def test_the_shift_of_a_tinygemm_weight_is_a_fixed_point() -> None:
    scale, shift = random_scale_shift(200_000)
    _, fixed = QTYPES["int4"].serve(scale, shift, torch.bfloat16, 256)
    assert fixed is not None
    narrow_scale, narrow_shift = scale.bfloat16(), fixed.bfloat16()
    assert torch.equal(narrow_shift.float(), fixed)
    assert torch.equal(8 * narrow_scale - (8 * narrow_scale - narrow_shift), narrow_shift)


def through_tinygemm(codes: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantized values of a plain weight tensor, and of one that TinyGemm packed and gave back."""
    rows = codes.reshape(-1, 128)
    parts = (rows, scale.bfloat16(), shift.bfloat16())
    plain = WeightQBitsTensor(qtypes["qint4"], 0, 128, codes.shape, codes.stride(), *parts)
    optimized = plain.optimize()
    assert type(optimized).__name__ == "TinyGemmWeightQBitsTensor"
    return plain.dequantize(), optimized.weight_qbits_tensor().dequantize()


def test_values_survive_tinygemm_at_the_fixed_point_and_only_there() -> None:
    weight = torch.rand(32, 1024) * 0.1 - 0.001  # a shift far below 8 * scale loses its last bits
    int4 = QTYPES["int4"]
    scale, shift = int4.scale_shift(*int4.weight_range(weight))
    naive = Affine.serve(QTYPES["int2"], scale, shift, torch.bfloat16, 1024)[1]  # int2 has the rule, and no anchor
    scale, fixed = int4.serve(scale, shift, torch.bfloat16, 1024)
    assert naive is not None
    assert fixed is not None
    assert not same_bits(*through_tinygemm(int4.encode(weight, scale, naive), scale, naive))
    assert same_bits(*through_tinygemm(int4.encode(weight, scale, fixed), scale, fixed))
    assert float((fixed - naive).abs().max() / scale.max()) < 0.2  # the price: a fraction of a step


def test_the_shift_passes_its_gradient() -> None:
    scale, shift = random_scale_shift(10)
    for in_features in (192, 256):  # without and with the fixed point
        leaf = shift.clone().requires_grad_()
        _, served = QTYPES["int4"].serve(scale, leaf, torch.bfloat16, in_features)
        assert served is not None
        served.backward(torch.arange(10.0).reshape(10, 1))  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.arange(10.0).reshape(10, 1))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


@pytest.mark.parametrize("shape", [(4, 24), (3, 160), (2, 256)], ids=str)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_scale_gradients_are_those_of_autograd(qtype: QType, shape: tuple[int, int]) -> None:
    # The same function written as differentiable expressions, in float64, so that only our own rounding is judged.
    weight = awkward_weight(*shape, seed=3)
    scale, shift = serving(weight, qtype, torch.float32, seed=1)
    scale = scale.clamp(min=1e-3)
    grad = torch.randn(shape)
    found = qtype.scale_gradients(weight, scale, shift, grad)
    rows = qtype.grouped(weight).double().requires_grad_()
    s = scale.double().requires_grad_()
    z = None if shift is None else shift.double().requires_grad_()
    x = torch.clamp((rows if z is None else rows + z) / s, qtype.code_min, qtype.code_max)
    rounded = x.detach().float().to(torch.float8_e4m3fn).double() if qtype.floating else x.detach().round()
    value = s * straight_through(x, rounded) - (0.0 if z is None else z)
    value.backward(qtype.grouped(grad).double())
    assert s.grad is not None
    assert rows.grad is not None
    torch.testing.assert_close(found[0].double(), s.grad, rtol=1e-4, atol=1e-4)
    if z is None or found[1] is None:
        assert found[1] is None
    else:
        assert z.grad is not None
        torch.testing.assert_close(found[1].double(), z.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2].double(), rows.grad.reshape(shape), rtol=1e-6, atol=1e-6)


def test_a_constant_group_gives_finite_gradients() -> None:
    weight = torch.zeros(2, 64)
    grad_scale, grad_shift, masked = QTYPES["int4"].scale_gradients(
        weight, torch.zeros(2, 1), torch.zeros(2, 1), weight + 1
    )
    assert grad_shift is not None
    assert bool(grad_scale.isfinite().all() and grad_shift.isfinite().all() and (masked == 1).all())


def test_a_range_moves_outwards_in_units_of_half_its_width() -> None:
    low, high = numerics.moved_range(
        torch.tensor([[-1.0]]), torch.tensor([[3.0]]), torch.tensor([[-0.25]]), torch.tensor([[0.5]])
    )
    assert low is not None
    assert (low.item(), high.item()) == (-0.5, 4.0)
    low, high = numerics.moved_range(None, torch.tensor([[2.0]]), None, torch.tensor([[0.5]]))
    assert low is None
    assert high.item() == 3.0


def test_ends_that_cross_keep_a_part_of_the_width_and_their_gradients() -> None:
    moves = [torch.tensor([[-1.5]], requires_grad=True) for _ in range(2)]
    low, high = numerics.moved_range(torch.tensor([[-1.0]]), torch.tensor([[3.0]]), *moves)
    assert low is not None
    assert (high - low).item() == pytest.approx(4.0 / 128)
    (high - low).backward()
    assert [move.grad.item() for move in moves if move.grad is not None] == [2.0, 2.0]  # as where they do not cross


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_frozen_weight_dequantizes_to_the_fake_quantized_one(qtype: QType, dtype: torch.dtype) -> None:
    weight = awkward_weight(6, 256)
    scale, shift = serving(weight, qtype, dtype, seed=1)
    codes = qtype.encode(weight, scale, shift)
    frozen = FrozenWeight(codes, scale.to(dtype), None if shift is None else shift.to(dtype), qtype)
    assert (frozen.shape, frozen.dtype) == (weight.shape, dtype)
    assert same_bits(frozen.dequantize(), qtype.fake_quantize(weight, scale, shift, dtype, dtype))


def test_a_type_is_found_by_its_key_and_types_of_one_key_are_equal() -> None:
    options = {"bits": 8, "code_min": -7, "code_max": 7, "steps": 7, "storage": torch.int8}
    one = Symmetric(format="test_numerics", name="int8", **options)  # type: ignore[arg-type]
    assert one.key == "test_numerics.int8"
    assert numerics.qtype_of(one.key) is one
    assert numerics.qtype_of("quanto.int8") is QTYPES["int8"]
    assert one == Symmetric(format="test_numerics", name="int8", **options)  # type: ignore[arg-type]
    assert hash(one) != hash(QTYPES["int8"])


def test_what_is_abstract_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="has_shift"):
        QType(format="a", name="b", bits=8, code_min=0, code_max=1, steps=1, storage=torch.int8)


def test_codes_of_activations_say_what_saturates() -> None:
    x = torch.tensor([-300.0, -128.0, 0.0, 127.0, 127.5, 300.0])
    codes, inside = QTYPES["int8"].encode_activation(x, torch.tensor(1.0), torch.float32)
    assert codes.tolist() == [-128, -128, 0, 127, 127, 127]
    assert inside.tolist() == [False, True, True, True, False, False]
    assert QTYPES["float8"].encode_activation(x, torch.tensor(1.0), torch.float32)[1].all()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4096, 4099])
def test_flags_survive_packing(count: int) -> None:
    flags = torch.rand(count) > 0.5
    packed = numerics.pack_bits(flags)
    assert packed.dtype is torch.uint8
    assert packed.numel() == -(-count // 8)
    assert packed.tolist() == np.packbits(flags.numpy(), bitorder="little").tolist()
    assert torch.equal(numerics.unpack_bits(packed, flags.shape), flags)


def test_products_of_integers_are_exact_however_long_the_rows_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (3, 5000), generator=generator, dtype=torch.int8)
    x[0] = -128
    weight = torch.randint(-128, 128, (4, 5000), generator=generator, dtype=torch.int8)
    weight[0] = -128
    one = torch.ones(())
    found = QTYPES["int8"].linear(x, one, weight, torch.ones(4, 1), None, torch.float32)
    assert torch.equal(found, (x.long() @ weight.long().t()).float())
    assert found[0, 0] == 5000 * 2**14
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(found, QTYPES["int8"].linear(x, one, weight, torch.ones(4, 1), None, torch.float32))


def test_one_key_is_one_type() -> None:
    int8 = QUANTO.qtypes["int8"]
    assert replace(int8) == int8
    with pytest.raises(StateError, match=r"QType: 'quanto.int8' is another type already"):
        replace(int8, steps=7.0)
    assert numerics.qtype_of("quanto.int8").steps == 127
