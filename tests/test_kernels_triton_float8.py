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
        arguments = (grad, weight, scale, inside)
        found = kernels.float8_input_gradient(*(None if t is None else t.cuda() for t in arguments))
        assert gap(found, kernels.float8_input_gradient(*arguments)) < _UNIT
        assert not found[3].any()
    assert not found.cpu()[~flags].any()
    found = kernels.float8_weight_gradient(grad.cuda(), x.cuda(), x_scale.cuda())
    assert gap(found, kernels.float8_weight_gradient(grad, x, x_scale)) < _UNIT


def test_not_a_number_in_a_gradient_is_not_hidden() -> None:
    grad, codes = torch.randn(32, 64, device="cuda").bfloat16(), torch.ones(64, 16, device="cuda")
    grad[5, 7] = torch.nan
    scale, codes = torch.ones(64, 1, device="cuda"), codes.to(torch.float8_e4m3fn)
    found = kernels.float8_input_gradient(grad, codes, scale, None)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [5]
    x = torch.ones(32, 16, device="cuda").to(torch.float8_e4m3fn)
    found = kernels.float8_weight_gradient(grad, x, torch.ones((), device="cuda"))
    assert found.isnan().any(1).nonzero().flatten().tolist() == [7]


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
