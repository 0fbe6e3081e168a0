"""The fast forms give the bits of `qat.numerics`, and the operators are what they promise to a compiler."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import qtypes
from optimum.quanto.tensor import quantize_activation
from torch import Tensor

from qat import kernels
from qat.formats import QUANTO
from qat.formats.quanto_types import QUANTO_NAMES
from qat.numerics import QType, pack_bits, unpack_bits
from tests.helpers import DTYPES, awkward_weight, same_bits

QTYPES = QUANTO.qtypes
BYTES = [QTYPES[name] for name in ("int8", "float8")]

# Blocks of the CPU form hold 2^17 elements: several blocks, a part of one at the end, one row longer than a block.
BLOCK = 2**17
SHAPES = [(1, 8), (3, 5), (7, 200), (64, 320), (1030, 256), (700, 192), (3, BLOCK // 2 + 32), (2, BLOCK + 64)]


def own_range(weight: Tensor, qtype: QType, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Serving scale and shift of a weight's own range."""
    return kernels.quantize_own_range(weight, qtype.key, dtype, dtype)[1:]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_weights_are_those_of_the_specification(qtype: QType, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        scale, shift = own_range(weight, qtype, dtype)
        scale = scale * (1.0 if seed % 2 else 0.5)
        for out_dtype in {dtype, torch.float32}:
            ours = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, out_dtype)
            assert same_bits(ours, qtype.fake_quantize(weight, scale, shift, dtype, out_dtype)), shape


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_narrow_wide_or_strided_master_gives_the_same_bits(qtype: QType, master: torch.dtype) -> None:
    weight = awkward_weight(130, 256).to(master)
    if master is torch.float64:  # values that float32 does not hold
        weight = weight * (1 + 2.0**-27 * torch.randn(130, 256, dtype=master))
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    for dtype in DTYPES.values():
        scale, shift = own_range(weight, qtype, dtype)
        expected = qtype.fake_quantize(weight, scale, shift, dtype, master)
        for tensor in (weight, strided):
            assert same_bits(kernels.fake_quantize_weight(tensor, scale, shift, qtype.key, dtype, master), expected)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_codes_are_those_that_are_stored(qtype: QType) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        value, scale, shift = kernels.quantize_own_range(weight, qtype.key, torch.bfloat16, qtype.storage)
        assert same_bits(value, qtype.encode(weight, scale, shift))
        assert same_bits(
            value, kernels.fake_quantize_weight(weight, scale, shift, qtype.key, torch.bfloat16, qtype.storage)
        )


def test_every_float8_number_and_every_midpoint_rounds_as_torch_does() -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    midpoints = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([grid, midpoints, midpoints.nextafter(grid[1:]), midpoints.nextafter(grid[:-1])])
    values = torch.cat([values, -values, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 447.9, 480.0, 1e9, -1e9])]).unsqueeze(
        0
    )
    ones = torch.ones(1, 1)
    ours = kernels.fake_quantize_weight(values, ones, None, QTYPES["float8"].key, torch.float32, torch.float32)
    assert same_bits(ours, values.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_ranges_are_those_of_the_specification(qtype: QType, dtype: torch.dtype) -> None:
    for shape in ((1, 8), (5, 256), (6, 320)):
        weight = awkward_weight(*shape)
        scale, shift = own_range(weight, qtype, dtype)
        expected, wanted = qtype.serve(*qtype.scale_shift(*qtype.weight_range(weight)), dtype, shape[1])
        assert same_bits(scale, expected)
        assert (shift is not None) is (wanted is not None) is qtype.has_shift
        assert shift is None or wanted is None or same_bits(shift, wanted)
        assert torch.equal(scale.to(dtype).float(), scale)
        both = kernels.quantize_own_range(weight, qtype.key, dtype, torch.float32)
        alone = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, dtype, torch.float32), scale, shift
        assert all(ours is wanted or same_bits(ours, wanted) for ours, wanted in zip(both, alone, strict=True))


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_range_of_a_narrow_master_has_the_very_zero_of_the_specification(qtype: QType, master: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((300, 37), (300, 256), (1030, 128), (2, BLOCK + 64)):
        signs = torch.rand(shape, generator=generator) < torch.rand(shape[0], 1, generator=generator)
        zeros = torch.where(signs, 0.0, -0.0)
        half = torch.where(signs, zeros, torch.rand(shape, generator=generator))
        for weight in (zeros.to(master), half.to(master), -half.to(master)):
            scale, shift = own_range(weight, qtype, torch.bfloat16)
            expected, wanted = qtype.serve(*qtype.scale_shift(*qtype.weight_range(weight)), torch.bfloat16, shape[1])
            assert same_bits(scale, expected), shape
            assert shift is None or wanted is None or same_bits(shift, wanted), shape


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_gradients_of_scales_are_those_of_the_specification(qtype: QType) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        scale, shift = own_range(weight, qtype, torch.bfloat16)
        scale = scale * (1.0 if seed % 2 else 0.5)
        found = kernels.scale_gradients(weight, scale, shift, qtype.key, grad)
        wanted = qtype.scale_gradients(weight, scale, shift, grad)
        assert torch.equal(found[2], wanted[2]), shape
        # Each is a sum in some order of a group's terms: float32's unit, times the terms' size, times their number.
        terms = 1e-7 * shape[1] * max(abs(qtype.code_min), qtype.code_max)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=terms)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=terms)


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_scales_of_a_narrow_or_wide_master(master: torch.dtype) -> None:
    weight, grad = awkward_weight(130, 256).to(master), torch.randn(130, 256).to(master)
    int4 = QTYPES["int4"]
    scale, shift = own_range(weight, int4, torch.bfloat16)
    found = kernels.scale_gradients(weight, scale, shift, int4.key, grad)
    wanted = int4.scale_gradients(weight, scale, shift, grad)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-5, atol=1e-4)
    assert found[2].dtype is master
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_activations_are_quantized_as_quanto_does(qtype: QType, dtype: torch.dtype) -> None:
    quanto_type = qtypes[QUANTO_NAMES[qtype.name]]
    for seed in range(50):
        x = (torch.randn(3, 7, 33) * 10.0 ** (seed % 5 - 2)).to(dtype)
        # Every other scale is too small for the largest magnitudes, so that codes saturate.
        scale = (x.abs().amax() / qtype.steps * (1.0 if seed % 2 else 0.6)).float().to(dtype)
        theirs = quantize_activation(x, qtype=quanto_type, scale=scale).dequantize()
        codes, inside, found = kernels.quantize_activation(x, scale.float(), qtype.key, dtype)
        assert torch.equal(kernels.dequantize(codes, found, dtype, dtype), theirs), seed
        value, flags = kernels.fake_quantize_activation(x, scale.float(), qtype.key, dtype)
        assert torch.equal(value, theirs)
        assert torch.equal(flags, inside)
        assert torch.equal(found, scale.float())
        exact = x.double() / scale.double()
        clear = ((exact.abs() - qtype.steps).abs() > 1) & (exact.abs() - 128).abs().gt(1)  # from rounding at the ends
        wanted = (exact >= qtype.code_min) & (exact <= qtype.code_max)
        assert torch.equal(unpack_bits(inside, x.shape)[clear], wanted[clear])
        assert seed % 2 or not wanted.all()


def test_values_of_activations_keep_the_dtype_in_which_they_came() -> None:
    x, options = torch.randn(4, 8), (torch.tensor(0.03125), QTYPES["int8"].key, torch.bfloat16)
    codes, _, scale = kernels.quantize_activation(x, *options)
    ours = kernels.dequantize(codes, scale, torch.bfloat16, torch.float32)
    assert ours.dtype is torch.float32
    assert torch.equal(ours, QTYPES["int8"].fake_quantize_activation(x, options[0], torch.bfloat16))
    assert same_bits(codes, kernels.quantize_activation(x.bfloat16(), *options)[0])


@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_not_a_number_among_activations_is_not_hidden(qtype: QType) -> None:
    x, scale = torch.randn(4, 33), torch.tensor(0.01)
    x[2, 3] = torch.nan
    codes, inside, found = kernels.quantize_activation(x, scale, qtype.key, torch.float32)
    assert found.isnan()
    assert not unpack_bits(inside, x.shape)[2, 3]
    value, flags = kernels.fake_quantize_activation(x, scale, qtype.key, torch.float32)
    assert value.isnan().nonzero().tolist() == [[2, 3]]
    assert torch.equal(flags, inside)
    weight = torch.zeros(5, 33).to(qtype.storage)
    y = kernels.linear_codes(codes, found, weight, torch.ones(5, 1), None, qtype.key, torch.float32)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("shape", [(24, 64, 32), (3, 5, 7), (1, 2500, 3), (0, 8, 4), (9, 1, 1)], ids=str)
def test_codes_are_multiplied_as_quanto_does(shape: tuple[int, int, int], qtype: QType, dtype: torch.dtype) -> None:
    rows, in_features, out_features = shape
    x = (torch.randn(rows, in_features) * 90).clamp(-128, 127).to(qtype.storage)
    codes = (torch.randn(out_features, in_features) * 90).clamp(-128, 127).to(qtype.storage)
    x_scale, scale = torch.tensor(0.013).to(dtype), (torch.rand(out_features, 1) + 0.1).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    theirs = torch.ops.quanto.qbytes_mm(x, codes, x_scale * scale) + bias
    scales = (codes, scale.float(), bias)
    assert same_bits(kernels.linear_codes(x, x_scale.float(), *scales, qtype.key, dtype), theirs)
    batch = kernels.linear_codes(x[None], x_scale.float(), *scales, qtype.key, dtype)
    assert batch.shape == (1, rows, out_features)
    assert same_bits(batch[0], theirs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_codes_of_a_weight_have_the_values_that_were_quantized(qtype: QType, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        weight = awkward_weight(*shape, seed)
        codes, scale, _ = kernels.quantize_own_range(weight, qtype.key, dtype, qtype.storage)
        for out_dtype in {dtype, torch.float32}:
            expected = kernels.fake_quantize_weight(weight, scale, None, qtype.key, dtype, out_dtype)
            assert same_bits(kernels.dequantize(codes, scale, dtype, out_dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", BYTES, ids=lambda qtype: qtype.name)
def test_an_output_is_quantized_as_quanto_does(qtype: QType, dtype: torch.dtype) -> None:
    x, codes = ((torch.randn(n, 64) * 60).clamp(-128, 127).to(qtype.storage) for n in (24, 32))
    x_scale, scale = torch.tensor(0.013).to(dtype), (torch.rand(32, 1) * 1e-3 + 1e-4).to(dtype)
    bias, y_scale = torch.randn(32).to(dtype), torch.tensor(0.01 if qtype.storage is torch.int8 else 0.003).to(dtype)
    y = torch.ops.quanto.qbytes_mm(x, codes, x_scale * scale) + bias
    theirs = quantize_activation(y, qtype=qtypes[QUANTO_NAMES[qtype.name]], scale=y_scale)
    scales = (x_scale.float(), codes, scale.float(), bias, y_scale.float())
    value, inside = kernels.linear_codes_quantized(x[None], *scales, qtype.key, qtype.key, dtype)
    assert torch.equal(value[0], theirs.dequantize())
    wanted = (y / y_scale).clamp(qtype.code_min, qtype.code_max) == y / y_scale
    assert torch.equal(unpack_bits(inside, y.shape), wanted)
    assert 0 < wanted.sum() < wanted.numel()


def test_saturated_elements_get_no_gradient() -> None:
    flags = torch.rand(5, 7) > 0.5
    grad, weight = torch.randn(5, 3), torch.randn(3, 7)
    assert torch.equal(kernels.masked_product(grad, weight, pack_bits(flags)), torch.where(flags, grad @ weight, 0))
    nan = torch.full((5, 7), torch.nan)
    assert torch.equal(kernels.masked_gradient(nan, pack_bits(flags)).isnan(), flags)


def test_gradients_in_float8_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    grad = torch.randn(64, 32) * torch.rand(64, 1)
    weight, x = ((torch.randn(n, 48) * 60).to(torch.float8_e4m3fn) for n in (32, 64))
    scale, x_scale, flags = torch.rand(32, 1) + 0.1, torch.tensor(0.01), torch.rand(64, 48) > 0.1
    rest = x, x_scale, QTYPES["float8"].key
    found, of_weight = kernels.float8_gradients(grad, weight, scale, pack_bits(flags), *rest, True, True)
    exact = torch.where(flags, grad @ (weight.float() * scale), 0)
    assert 0.001 < (found - exact).norm() / exact.norm() < 0.04
    assert not found[~flags].any()
    exact = grad.t() @ (x.float() * x_scale)
    assert 0.001 < (of_weight - exact).norm() / exact.norm() < 0.04
    whole, nothing = kernels.float8_gradients(grad, weight.float() * scale, scale, None, *rest, True, False)
    assert torch.equal(whole[flags], found[flags])
    assert nothing is None
    nothing, alone = kernels.float8_gradients(grad, weight, scale, None, *rest, False, True)
    assert nothing is None
    assert torch.equal(alone, of_weight)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_operators_leave_their_inputs_alone_and_record_nothing(qtype: QType) -> None:
    weight = awkward_weight(5, 256).requires_grad_()
    before = weight.detach().clone()
    scale, shift = own_range(weight.detach(), qtype, torch.bfloat16)
    copies = scale.clone(), None if shift is None else shift.clone()
    with torch.no_grad():
        value = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, torch.bfloat16, torch.float32)
    assert not value.requires_grad
    assert same_bits(weight.detach(), before)
    assert same_bits(scale, copies[0])
    assert shift is None or (copies[1] is not None and same_bits(shift, copies[1]))


def operator_arguments() -> dict[str, tuple[object, ...]]:
    weight, scale = awkward_weight(6, 256), torch.full((6, 1), 0.01)
    groups = torch.full((12, 1), 0.01)
    strided, codes = weight.t().contiguous().t(), torch.ones(6, 256, dtype=torch.int8)
    float8 = codes.to(torch.float8_e4m3fn)
    float8_rest = (
        torch.ones(256, 256).to(float8.dtype),
        torch.ones(256, 1),
        None,
        float8,
        torch.tensor(0.01),
        "quanto.float8",
    )
    return {
        "fake_quantize_weight": (weight, scale, None, "quanto.int8", torch.bfloat16, torch.float32),
        "fake_quantize_weight affine": (weight, groups, groups, "quanto.int4", torch.bfloat16, torch.bfloat16),
        "fake_quantize_weight strided": (strided, scale, None, "quanto.float8", torch.bfloat16, torch.bfloat16),
        "quantize_own_range": (weight, "quanto.float8", torch.float16, torch.float32),
        "quantize_own_range affine": (weight, "quanto.int4", torch.bfloat16, torch.bfloat16),
        "quantize_own_range strided": (strided, "quanto.int8", torch.float32, torch.float32),
        "moved_scale_shift": (None, scale, None, scale, "quanto.int8", torch.bfloat16, 256),
        "moved_scale_shift affine": (-groups, groups, groups, groups, "quanto.int4", torch.bfloat16, 256),
        "scale_gradients": (weight, scale, None, "quanto.int8", weight),
        "scale_gradients affine": (weight, groups, groups, "quanto.int4", weight),
        "scale_gradients strided": (strided, scale, None, "quanto.int8", strided),
        "fake_quantize_weight codes": (weight, scale, None, "quanto.int8", torch.bfloat16, torch.int8),
        "quantize_own_range codes": (weight, "quanto.float8", torch.bfloat16, torch.float8_e4m3fn),
        "quantize_activation": (weight, torch.tensor(0.01), "quanto.int8", torch.bfloat16),
        "quantize_activation strided": (strided, torch.tensor(0.01), "quanto.float8", torch.bfloat16),
        "dequantize": (codes, torch.tensor(0.01), torch.bfloat16, torch.float32),
        "dequantize of one dtype": (codes, torch.tensor(0.01), torch.bfloat16, torch.bfloat16),
        "linear_codes": (codes[None], torch.tensor(0.01), codes, scale, scale[:, 0], "quanto.int8", torch.float32),
        "float8_gradients": (weight, *float8_rest, True, True),
        "float8_gradients of the input": (weight, *float8_rest, True, False),
        "float8_gradients of the weight": (weight, *float8_rest, False, True),
        "dequantize rows": (codes, scale, torch.bfloat16, torch.bfloat16),
        "fake_quantize_activation": (weight, torch.tensor(0.01), "quanto.int8", torch.bfloat16),
        "fake_quantize_activation strided": (strided, torch.tensor(0.01), "quanto.float8", torch.float32),
        "linear_codes_quantized": (
            *(codes[None], torch.tensor(0.01), codes, scale, None, torch.tensor(0.01)),
            *("quanto.int8", "quanto.int8", torch.bfloat16),
        ),
        "masked_gradient": (weight, pack_bits(weight > 0)),
        "masked_product": (weight[:, :6], weight, pack_bits(weight > 0)),
        "round_to": (weight, torch.bfloat16),
    }


@pytest.mark.parametrize("case", operator_arguments())
def test_operators_are_what_a_compiler_is_told(case: str) -> None:
    operator = getattr(torch.ops.qat, case.partition(" ")[0])
    arguments = operator_arguments()[case]
    # Its test of schemas adds to every tensor, which torch cannot do with float8.
    only = {"test_utils": ("test_faketensor", "test_autograd_registration")} if case.startswith("float8") else {}
    torch.library.opcheck(operator, arguments, **only)
    if case.startswith(("fake_quantize_weight", "dequantize")):
        torch.library.opcheck(operator, arguments, {"after": torch.ones(3)})


def test_the_tensor_that_must_exist_first_is_not_read() -> None:
    weight, scale = awkward_weight(4, 64), torch.full((4, 1), 0.01)
    arguments = (weight, scale, None, QTYPES["int8"].key, torch.float32, torch.float32)
    after = torch.full((3,), float("nan"))
    assert same_bits(kernels.fake_quantize_weight(*arguments), kernels.fake_quantize_weight(*arguments, after=after))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_triton_rounds_to_float8_from_compute_capability_8_9_on(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qat.kernels import triton as kernel

    monkeypatch.setattr(kernel, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    weight = torch.ones(2, 2)
    assert kernel.supports(weight, "quanto.float8", torch.float32, torch.float32) is (capability >= (8, 9))
    assert kernel.supports(weight, weight, None, "quanto.int4", torch.float32, torch.float32, None)
