"""The Triton kernels against their specification, bit for bit; needs a GPU and is skipped without one."""

import pytest
import torch

from qat import kernels
from qat.formats import QUANTO
from qat.kernels import triton as kernel
from qat.quantizers import StraightThrough

QTYPES = QUANTO.qtypes

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernel.supports("quanto.int8")), reason="needs a CUDA GPU and Triton"
)
SHAPES = [(8, 256), (5, 37), (1, 128), (300, 384), (64, 160), (7, 192), (3, 320), (1024, 4096), (130, 3000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("master", DTYPES, ids=lambda dtype: f"master {dtype}")
def test_equals_numerics_on_the_same_device_and_on_the_cpu(qtype, dtype, master):
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(master)
        weight[0] = 0
        _, scale, shift = StraightThrough().make(weight, qtype, dtype).quantize(weight, dtype)
        on_gpu = [None if t is None else t.cuda() for t in (weight, scale, shift)]
        expected = qtype.fake_quantize(weight, scale, shift, dtype, dtype)
        found = kernels.fake_quantize_weight(*on_gpu, qtype.key, dtype, dtype)
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(qtype.fake_quantize(*on_gpu, dtype, dtype), found)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("master", DTYPES, ids=lambda dtype: f"master {dtype}")
def test_ranges_are_the_same_on_both_devices(qtype, dtype, master):
    generator = torch.Generator().manual_seed(1)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(master)
        weight[0] = 0
        expected = kernels.quantize_own_range(weight, qtype.key, dtype, master)
        found = kernels.quantize_own_range(weight.cuda(), qtype.key, dtype, master)
        plain = qtype.serve(*qtype.scale_shift(*qtype.weight_range(weight.cuda())), dtype, shape[1])
        for pair in (zip(found, expected, strict=True), zip(plain, expected[1:], strict=True)):
            for ours, wanted in pair:
                assert (ours is None and wanted is None) or torch.equal(ours.cpu(), wanted), shape


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("master", DTYPES, ids=lambda dtype: f"master {dtype}")
def test_gradients_of_scales_are_those_of_the_specification(qtype, master):
    generator = torch.Generator().manual_seed(2)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(master)
        grad = torch.randn(shape, generator=generator).to(master)
        _, scale, shift = kernels.quantize_own_range(weight, qtype.key, torch.bfloat16, torch.bfloat16)
        scale = scale * 0.6
        on_gpu = [None if t is None else t.cuda() for t in (weight, scale, shift)]
        found = kernels.scale_gradients(*on_gpu, qtype.key, grad.cuda())
        wanted = qtype.scale_gradients(weight, scale, shift, grad)
        assert torch.equal(found[2].cpu(), wanted[2]), shape
        assert found[2].dtype is master
        # Each is a sum in some order of a group's terms: float32's unit, times the terms' size, times their number.
        terms = 1e-7 * shape[1] * max(abs(qtype.code_min), qtype.code_max)
        torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-5, atol=terms)
        if shift is not None:
            torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-5, atol=terms)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_not_a_number_is_not_hidden(qtype):
    weight = torch.randn(4, 256, device="cuda")
    _, scale, shift = kernels.quantize_own_range(weight, qtype.key, torch.bfloat16, torch.bfloat16)
    weight[1, 7] = float("nan")
    value = kernels.fake_quantize_weight(weight, scale, shift, qtype.key, torch.bfloat16, torch.float32)
    assert value.isnan().nonzero().tolist() == [[1, 7]]
    assert kernels.quantize_own_range(weight, qtype.key, torch.bfloat16, torch.float32)[1].isnan().sum() == 1


@pytest.mark.parametrize("qtype", [QTYPES[name] for name in ["int8", "int4"]], ids=lambda qtype: qtype.name)
def test_compiled_layers_equal_eager_ones(qtype):
    from qat.layers import QLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, device="cuda")
    layer = QLinear.adopt(linear, StraightThrough().make(linear.weight, qtype, torch.bfloat16))
    x = torch.randn(8, 256, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moved_ranges_are_those_of_the_cpu(qtype, dtype):
    generator = torch.Generator().manual_seed(3)
    for shape in SHAPES:
        low, high = qtype.weight_range(torch.randn(shape, generator=generator) * 0.05)
        moves = [torch.randn(high.shape, generator=generator) for _ in range(2)]  # some ends meet, some cross
        ends = (low, high, moves[0] if low is not None else None, moves[1])
        expected = kernels.moved_scale_shift(*ends, qtype.key, dtype, shape[1])
        found = kernels.moved_scale_shift(*(None if t is None else t.cuda() for t in ends), qtype.key, dtype, shape[1])
        for ours, wanted in zip(found, expected, strict=True):
            assert (ours is None and wanted is None) or torch.equal(ours.cpu(), wanted), shape
