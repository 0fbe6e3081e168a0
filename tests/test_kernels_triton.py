"""The Triton kernels against their specification, bit for bit; needs a GPU and is skipped without one."""

import pytest
import torch

from qat import kernels, numerics
from qat.kernels import triton as kernel
from qat.qtypes import QTYPES
from qat.quantizers import StraightThrough

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernel.available()), reason="needs a CUDA GPU and Triton"
)
SHAPES = [(8, 256), (5, 37), (1, 128), (300, 384), (64, 160), (7, 192), (3, 320), (1024, 4096), (130, 3000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("qtype", ["int8", "float8", "int4", "int2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("master", DTYPES, ids=lambda dtype: f"master {dtype}")
def test_equals_numerics_on_the_same_device_and_on_the_cpu(qtype, dtype, master):
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(master)
        weight[0] = 0
        scale, shift = StraightThrough().make(weight, qtype, dtype).serving(weight)
        on_gpu = [None if t is None else t.cuda() for t in (weight, scale, shift)]
        expected = numerics.fake_quantize(weight, scale, shift, qtype, dtype, dtype)
        found = kernels.fake_quantize_weight(*on_gpu, qtype, dtype, dtype)
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(numerics.fake_quantize(*on_gpu, qtype, dtype, dtype), found)


@pytest.mark.parametrize("qtype", ["int8", "float8", "int4", "int2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("master", DTYPES, ids=lambda dtype: f"master {dtype}")
def test_ranges_are_the_same_on_both_devices(qtype, dtype, master):
    generator = torch.Generator().manual_seed(1)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(master)
        weight[0] = 0
        expected = kernels.serving_range(weight, qtype, dtype)
        plain = numerics.range_scale_shift(*numerics.weight_range(weight.cuda(), qtype), qtype)
        plain = numerics.serving_pair(*plain, qtype, dtype, shape[1])
        for found in (kernels.serving_range(weight.cuda(), qtype, dtype), plain):
            for ours, wanted in zip(found, expected, strict=True):
                assert (ours is None and wanted is None) or torch.equal(ours.cpu(), wanted), shape
        found = kernels.quantize_own_range(weight.cuda(), qtype, dtype, master)
        for ours, wanted in zip(found, kernels.quantize_own_range(weight, qtype, dtype, master), strict=True):
            assert (ours is None and wanted is None) or torch.equal(ours.cpu(), wanted), shape


@pytest.mark.parametrize("qtype", ["int8", "float8", "int4", "int2"])
@pytest.mark.parametrize("master", DTYPES, ids=lambda dtype: f"master {dtype}")
def test_gradients_of_scales_are_those_of_the_specification(qtype, master):
    generator = torch.Generator().manual_seed(2)
    for shape in SHAPES:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(master)
        grad = torch.randn(shape, generator=generator).to(master)
        scale, shift = kernels.serving_range(weight, qtype, torch.bfloat16)
        scale = scale * 0.6
        on_gpu = [None if t is None else t.cuda() for t in (weight, scale, shift)]
        found = kernels.scale_gradients(*on_gpu, qtype, grad.cuda())
        wanted = numerics.scale_gradients(weight, scale, shift, qtype, grad)
        assert torch.equal(found[2].cpu(), grad * wanted[2]), shape
        assert found[2].dtype is master
        # Each is a sum in some order of a group's terms: float32's unit, times the terms' size, times their number.
        terms = 1e-7 * shape[1] * max(abs(QTYPES[qtype].code_min), QTYPES[qtype].code_max)
        torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-5, atol=terms)
        if shift is not None:
            torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-5, atol=terms)


@pytest.mark.parametrize("qtype", ["int8", "float8", "int4", "int2"])
def test_not_a_number_is_not_hidden(qtype):
    weight = torch.randn(4, 256, device="cuda")
    scale, shift = kernels.serving_range(weight, qtype, torch.bfloat16)
    weight[1, 7] = float("nan")
    value = kernels.fake_quantize_weight(weight, scale, shift, qtype, torch.bfloat16, torch.float32)
    assert value.isnan().nonzero().tolist() == [[1, 7]]
    assert kernels.serving_range(weight, qtype, torch.bfloat16)[0].isnan().sum() == 1


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_compiled_layers_equal_eager_ones(qtype):
    from qat.layers import QLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, device="cuda")
    layer = QLinear.adopt(linear, StraightThrough().make(linear.weight, qtype, torch.bfloat16))
    x = torch.randn(8, 256, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
