"""Gradients in float8 on a Hopper GPU against the plain form of the operators; skipped without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat import kernels
from qat.formats import QUANTO
from qat.kernels import triton_float8
from qat.layers import QLinear
from qat.numerics import pack_bits
from qat.observers import Absmax
from qat.quantizers import StraightThrough
from qat.quantizers.activation import ActivationQuantizer

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and triton_float8.supports(torch.ones(1, device="cuda"))),
    reason="needs a CUDA GPU of compute capability 9.0 and Triton",
)


KEY = QUANTO.qtypes["float8"].key
_UNIT = 2.0**-8  # of bfloat16, to which both round their sums


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.cpu().double() - other.cpu().double()).norm() / other.cpu().double().norm())


@pytest.mark.parametrize("shape", [(64, 32, 48), (512, 4096, 1024), (256, 1008, 272), (16, 14336, 16)], ids=str)
def test_products_are_those_of_the_plain_form(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, out_features, in_features = shape
    grad = torch.randn(rows, out_features).bfloat16() * torch.rand(rows, 1).bfloat16()
    grad[3] = 0
    weight, x = ((torch.randn(n, in_features) * 60).to(torch.float8_e4m3fn) for n in (out_features, rows))
    scale, x_scale = torch.rand(out_features, 1) + 0.1, torch.tensor(0.01)
    flags = torch.rand(rows, in_features) > 0.01
    for inside in (None, pack_bits(flags)):
        given = (grad, weight, scale, inside, x, x_scale)
        on_gpu = tuple(None if t is None else t.cuda() for t in given)
        found = kernels.float8_gradients(*on_gpu, KEY, True, True)
        for ours, plain in zip(found, kernels.float8_gradients(*given, KEY, True, True), strict=True):
            assert gap(ours, plain) < _UNIT
        assert not found[0][3].any()
        assert torch.equal(kernels.float8_gradients(*on_gpu, KEY, True, False)[0], found[0])
        assert torch.equal(kernels.float8_gradients(*on_gpu, KEY, False, True)[1], found[1])
    assert not found[0].cpu()[~flags].any()


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float32], ids=str)
def test_a_weight_and_its_codes_give_the_same_gradient(master: torch.dtype) -> None:
    torch.manual_seed(0)
    grad, weight = (torch.randn(shape, device="cuda") for shape in ((64, 336), (336, 272)))
    grad, weight = grad.bfloat16(), weight.to(master)
    codes, scale, _ = kernels.quantize_own_range(weight, KEY, torch.bfloat16, torch.float8_e4m3fn)
    scale = scale * 0.7  # so that some saturate
    codes = kernels.fake_quantize_weight(weight, scale, None, KEY, torch.bfloat16, torch.float8_e4m3fn)
    rest = (scale, None, torch.ones(64, 272, device="cuda").to(codes.dtype), torch.ones((), device="cuda"), KEY)
    ours, theirs = (kernels.float8_gradients(grad, one, *rest, True, False)[0] for one in (weight, codes))
    assert torch.equal(ours, theirs)


def test_not_a_number_in_a_gradient_is_not_hidden() -> None:
    grad = torch.randn(32, 64, device="cuda").bfloat16()
    grad[5, 7] = torch.nan
    codes, x = (torch.ones(n, 16, device="cuda").to(torch.float8_e4m3fn) for n in (64, 32))
    scale, x_scale = torch.ones(64, 1, device="cuda"), torch.ones((), device="cuda")
    of_x, of_weight = kernels.float8_gradients(grad, codes, scale, None, x, x_scale, KEY, True, True)
    assert of_x.isnan().any(1).nonzero().flatten().tolist() == [5]
    assert of_weight.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_compiled_layers_equal_eager_ones_with_their_gradients() -> None:
    torch.manual_seed(0)
    qtype, linear = QUANTO.qtypes["float8"], nn.Linear(256, 128, device="cuda", dtype=torch.bfloat16)
    activation = ActivationQuantizer(qtype, torch.bfloat16, Absmax()).cuda()
    activation.observe(torch.full((1,), 2.0, device="cuda"))
    activation.refresh()
    quantizer = StraightThrough().make(linear.weight, qtype, torch.bfloat16)
    quantizer.float8_backward = True
    layer = QLinear.adopt(linear, quantizer, activation)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for called in (layer, torch.compile(layer, fullgraph=True)):
        y = called(x)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
