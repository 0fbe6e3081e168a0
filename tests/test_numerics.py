"""The specification of quantization against two independent ones: numpy in float64, and optimum-quanto's operators.

The first parity tests loop over well more than a thousand seeded cases; they are cheap, for weights are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes
from optimum.quanto.tensor import WeightQBitsTensor
from torch import Tensor

from qat import numerics
from qat.qtypes import QTYPES, group_size
from tests.helpers import DTYPES, WEIGHT_TYPES, awkward_weight, reference_quantize, same_bits

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


def serving(weight: Tensor, qtype: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Scale and shift as training finds them; every other seed shrinks the range, so that weights saturate."""
    part = 1.0 if seed % 2 == 0 else 0.7
    if not QTYPES[qtype].affine:
        return numerics.serving_scale(
            numerics.range_scale_shift(*numerics.weight_range(weight, qtype), qtype)[0] * part, qtype, dtype
        ), None
    scale, shift = numerics.range_scale_shift(*numerics.weight_range(weight, qtype), qtype)
    scale = numerics.serving_scale(scale * part, qtype, dtype)
    tinygemm = numerics.meets_tinygemm(qtype, dtype, weight.shape[1])
    return scale, numerics.serving_shift(shift * part, scale, dtype, tinygemm=tinygemm)


def cases() -> Iterator[tuple[Tensor, int]]:
    for (out_features, in_features), seed in itertools.product(SHAPES, SEEDS):
        yield awkward_weight(out_features, in_features, seed), seed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_codes_and_values_are_those_of_numpy(qtype: str, dtype: str) -> None:
    for weight, seed in cases():
        scale, shift = serving(weight, qtype, DTYPES[dtype], seed)
        codes = numerics.encode(weight, scale, shift, qtype)
        values = numerics.decode(codes, scale, shift, qtype, DTYPES[dtype])
        expected = reference_quantize(weight, scale, shift, qtype, dtype, group_size(qtype, weight.shape[1]))
        assert codes.shape == values.shape == weight.shape
        assert codes.dtype == getattr(torch, QTYPES[qtype].storage)
        assert values.dtype is DTYPES[dtype]
        assert np.array_equal(codes.double().numpy(), expected[0]), (weight.shape, seed)
        assert np.array_equal(values.double().numpy(), expected[1]), (weight.shape, seed)


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_codes_are_quantos_in_float32(qtype: str) -> None:
    kind = QTYPES[qtype]
    for weight, seed in cases():
        scale, shift = serving(weight, qtype, torch.float32, seed)
        ours = numerics.encode(weight, scale, shift, qtype)
        if shift is not None:
            size = group_size(qtype, weight.shape[1])
            theirs = torch.ops.quanto.quantize_affine(weight, kind.bits, 0, size, scale, shift)
        elif weight.shape[0] == 1:
            theirs = torch.ops.quanto.quantize_symmetric(weight, ours.dtype, None, scale.reshape(()))
        else:
            theirs = torch.ops.quanto.quantize_symmetric(weight, ours.dtype, 0, scale)
        # Where the scale is 0 quanto casts NaN to an integer, which means nothing.
        defined = (scale != 0).expand_as(numerics.grouped(weight, qtype))
        ours, theirs = ours.float().reshape(defined.shape), theirs.float().reshape(defined.shape)
        assert torch.equal(ours[defined], theirs[defined]), (weight.shape, seed)
        assert not ours[~defined].any()


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_ranges_are_those_of_quantos_optimizers(qtype: str) -> None:
    kind = qtypes[QTYPES[qtype].quanto_name]
    for weight, _ in cases():
        if QTYPES[qtype].affine:
            if numerics.grouped(weight, qtype).shape[0] == 1:
                continue  # quanto takes one row's range a column at a time; ours keeps one scale, which loads as well
            ours = numerics.range_scale_shift(*numerics.weight_range(weight, qtype), qtype)
            theirs = MaxOptimizer()(weight, kind, 0, group_size(qtype, weight.shape[1]))
            assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(ours, theirs, strict=True))
        else:
            theirs = AbsmaxOptimizer()(weight, kind, 0)
            assert torch.equal(
                numerics.range_scale_shift(*numerics.weight_range(weight, qtype), qtype)[0], theirs.reshape(-1, 1)
            )


@pytest.mark.parametrize("master", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_any_master_dtype_is_read_as_its_float32_numbers(qtype: str, master: str) -> None:
    weight = awkward_weight(6, 256).to(DTYPES[master])
    for dtype in DTYPES.values():
        scale, shift = serving(weight, qtype, dtype)
        again = serving(weight.float(), qtype, dtype)
        assert torch.equal(scale, again[0])
        codes = numerics.encode(weight, scale, shift, qtype)
        assert same_bits(codes, numerics.encode(weight.float(), scale, shift, qtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_a_zero_row_stays_zero(qtype: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 64)
    scale, shift = serving(weight, qtype, dtype)
    value = numerics.fake_quantize(weight, scale, shift, qtype, dtype, torch.float32)
    assert torch.equal(value, weight)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", ["int4", "int2"])
def test_a_constant_group_keeps_its_value_and_has_code_0(qtype: str, dtype: torch.dtype) -> None:
    weight = torch.full((2, 64), 0.03).to(dtype).float()
    scale, shift = serving(weight, qtype, dtype)
    assert not numerics.encode(weight, scale, shift, qtype).any()
    assert torch.equal(numerics.fake_quantize(weight, scale, shift, qtype, dtype, torch.float32), weight)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_float8_scale_is_above_zero_in_the_serving_dtype(dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-45, 1e-30):
        served = numerics.serving_scale(torch.tensor([[scale]]), "float8", dtype)
        assert served.to(dtype) > 0
        assert torch.equal(served.to(dtype).float(), served)
    assert numerics.serving_scale(torch.zeros(1, 1), "int8", dtype) == 0


@given(st.integers(0, 2**31), st.sampled_from(WEIGHT_TYPES), st.sampled_from(list(DTYPES)))
def test_values_on_the_grid_keep_their_codes(seed: int, qtype: str, dtype: str) -> None:
    # In float32 for the affine types: in a narrow dtype the rounded difference need not lie nearest to its code.
    kind = DTYPES[dtype] if not QTYPES[qtype].affine else torch.float32
    weight = awkward_weight(4, 160, seed)
    scale, shift = serving(weight, qtype, kind, seed)
    codes = numerics.encode(weight, scale, shift, qtype)
    value = numerics.decode(codes, scale, shift, qtype, kind)
    assert torch.equal(numerics.encode(value, scale, shift, qtype).float(), codes.float())


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
    ("qtype", "dtype", "in_features", "expected"),
    [
        ("int4", torch.bfloat16, 256, True),
        ("int4", torch.bfloat16, 128, False),
        ("int4", torch.bfloat16, 192, False),
        ("int4", torch.float32, 256, False),
        ("int2", torch.bfloat16, 256, False),
    ],
    ids=str,
)
def test_which_weights_meet_tinygemm(qtype: str, dtype: torch.dtype, in_features: int, expected: bool) -> None:
    assert numerics.meets_tinygemm(qtype, dtype, in_features) is expected


def random_scale_shift(count: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(count, 1) * 10.0 ** torch.empty(count, 1).uniform_(-4, 1)
    shift = torch.randn(count, 1) * 10.0 ** torch.empty(count, 1).uniform_(-5, 2)
    return numerics.round_to(scale, torch.bfloat16), shift


def test_the_shift_of_a_tinygemm_weight_is_a_fixed_point() -> None:
    scale, shift = random_scale_shift(200_000)
    fixed = numerics.serving_shift(shift, scale, torch.bfloat16, tinygemm=True)
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
    scale, shift = numerics.range_scale_shift(*numerics.weight_range(weight, "int4"), "int4")
    scale = numerics.serving_scale(scale, "int4", torch.bfloat16)
    naive = numerics.serving_shift(shift, scale, torch.bfloat16)
    fixed = numerics.serving_shift(shift, scale, torch.bfloat16, tinygemm=True)
    assert not same_bits(*through_tinygemm(numerics.encode(weight, scale, naive, "int4"), scale, naive))
    assert same_bits(*through_tinygemm(numerics.encode(weight, scale, fixed, "int4"), scale, fixed))
    assert float((fixed - naive).abs().max() / scale.max()) < 0.2  # the price: a fraction of a step


def test_the_shift_passes_its_gradient() -> None:
    scale, shift = random_scale_shift(10)
    for tinygemm in (False, True):
        leaf = shift.clone().requires_grad_()
        numerics.serving_shift(leaf, scale, torch.bfloat16, tinygemm=tinygemm).backward(
            torch.arange(10.0).reshape(10, 1)
        )
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.arange(10.0).reshape(10, 1))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


@pytest.mark.parametrize("shape", [(4, 24), (3, 160), (2, 256)], ids=str)
@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_scale_gradients_are_those_of_autograd(qtype: str, shape: tuple[int, int]) -> None:
    # The same function written as differentiable expressions, in float64, so that only our own rounding is judged.
    kind = QTYPES[qtype]
    weight = awkward_weight(*shape, seed=3)
    scale, shift = serving(weight, qtype, torch.float32, seed=1)
    scale = scale.clamp(min=1e-3)
    grad = torch.randn(shape)
    found = numerics.scale_gradients(weight, scale, shift, qtype, grad)
    rows = numerics.grouped(weight, qtype).double().requires_grad_()
    s = scale.double().requires_grad_()
    z = None if shift is None else shift.double().requires_grad_()
    x = torch.clamp((rows if z is None else rows + z) / s, kind.code_min, kind.code_max)
    rounded = x.detach().float().to(torch.float8_e4m3fn).double() if kind.floating else x.detach().round()
    value = s * straight_through(x, rounded) - (0.0 if z is None else z)
    value.backward(numerics.grouped(grad, qtype).double())
    assert s.grad is not None
    assert rows.grad is not None
    torch.testing.assert_close(found[0].double(), s.grad, rtol=1e-4, atol=1e-4)
    if z is None or found[1] is None:
        assert found[1] is None
    else:
        assert z.grad is not None
        torch.testing.assert_close(found[1].double(), z.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((grad * found[2]).double(), rows.grad.reshape(shape), rtol=1e-6, atol=1e-6)


def test_a_constant_group_gives_finite_gradients() -> None:
    weight = torch.zeros(2, 64)
    grad_scale, grad_shift, inside = numerics.scale_gradients(
        weight, torch.zeros(2, 1), torch.zeros(2, 1), "int4", weight + 1
    )
    assert grad_shift is not None
    assert bool(grad_scale.isfinite().all() and grad_shift.isfinite().all() and inside.all())
