"""The Triton kernel against its specification, bit for bit; needs a GPU and is skipped without one."""

import pytest
import torch

from qat import kernels, numerics
from qat.kernels import triton as kernel
from qat.quantizers import StraightThrough

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernel.available()), reason="needs a CUDA GPU and Triton"
)
SHAPES = [(8, 256), (5, 37), (1, 128), (300, 384), (64, 160), (7, 192), (3, 320), (1024, 4096)]
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
def test_scales_are_the_same_on_both_devices(qtype):
    weight = torch.randn(300, 384, generator=torch.Generator().manual_seed(1))
    quantizer = StraightThrough().make(weight, qtype, torch.bfloat16)
    for on_cpu, on_gpu in zip(quantizer.serving(weight), quantizer.serving(weight.cuda()), strict=True):
        assert (on_cpu is None and on_gpu is None) or torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_compiled_layers_equal_eager_ones(qtype):
    from qat.layers import QLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, device="cuda")
    layer = QLinear.adopt(linear, StraightThrough().make(linear.weight, qtype, torch.bfloat16))
    x = torch.randn(8, 256, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
