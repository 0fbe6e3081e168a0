"""SEQ: the paper's formula and gradient, as an affine grid of the format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.formats import QUANTO
from qat.layers import QLinear
from qat.numerics import QType
from tests.helpers import DTYPES

QTYPES = QUANTO.qtypes
AFFINE = {name: QTYPES[name] for name in ("int4", "int2")}


class Paper(torch.autograd.Function):
    """ParetoQ (arXiv 2502.02631), in float64, for 2^(b-1) = ``n`` levels on each side; rows share an alpha."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, alpha: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(weight, alpha)  # type: ignore[attr-defined]
        ctx.n = n  # type: ignore[attr-defined]
        return alpha * (torch.round(n * (weight / alpha).clamp(-0.99, 0.99) - 0.5) + 0.5) / n

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, alpha = ctx.saved_tensors  # type: ignore[attr-defined]
        n, ratio = ctx.n, weight / alpha  # type: ignore[attr-defined]
        middle = ratio.abs() <= 0.99
        rounded = (torch.round(n * ratio.clamp(-0.99, 0.99) - 0.5) + 0.5) / n
        of_alpha = torch.where(middle, rounded - ratio, ratio.sign() * (1 - 0.5 / n))
        return grad * middle, (grad * of_alpha).sum(1, keepdim=True), None


@pytest.mark.parametrize("start", [0.0, -0.4, 0.3])
@pytest.mark.parametrize("qtype", AFFINE.values(), ids=AFFINE)
def test_values_and_gradients_are_the_papers(qtype: QType, start: float) -> None:
    torch.manual_seed(0)
    n = {"int4": 8, "int2": 2}[qtype.name]
    layer, x = nn.Linear(256, 12, bias=False), torch.randn(6, 256)
    quantizer = qat.StretchedElastic().make(layer.weight, qtype, torch.float32)
    with torch.no_grad():
        quantizer.high_move.fill_(start)
    layer = QLinear.adopt(layer, quantizer)
    y = layer(x)
    y.square().sum().backward()

    weight = layer.weight.detach().double().view(-1, 128).requires_grad_()
    largest = weight.detach().abs().amax(1, keepdim=True)
    move = torch.full_like(largest, start).requires_grad_()
    value = Paper.apply(weight, largest * (1 + move), n)  # type: ignore[no-untyped-call]
    wanted = x.double() @ value.view(12, 256).t()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)
    wanted.square().sum().backward()
    pairs = [(layer.weight.grad, weight.grad), (quantizer.high_move.grad, move.grad)]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        theirs = theirs.view(ours.shape)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    beyond = (weight.detach() / (largest * (1 + start))).abs()
    wider = (beyond > 1 - 0.5 / n) & (beyond <= 0.99)  # where the mask is wider than the range
    assert bool(wider.any()) or start > 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_it_exports_as_half_of_alpha_and_one_and_a_half_scales(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    frozen, _ = qat.StretchedElastic().make(weight, QTYPES["int2"], dtype).freeze(weight)
    alpha = weight.view(16, 128).abs().amax(1, keepdim=True)
    assert frozen.shift is not None
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(frozen.scale.float(), alpha / 2, rtol=unit, atol=0)
    torch.testing.assert_close(frozen.shift.float(), 1.5 * frozen.scale.float(), rtol=2 * unit, atol=0)
    assert not bool((frozen.dequantize() == 0).any())


def test_a_group_of_zeros_follows_its_weights_by_the_same_grid() -> None:
    quantizer = qat.StretchedElastic().make(torch.zeros(1, 8), QTYPES["int2"], torch.float32)
    weight = torch.tensor([[-4.0, 0.1, 1.5, 2.5, -0.1, 0.0, 4.0, 1.0]])
    value = quantizer.quantize(weight, torch.float32).value
    assert value.tolist() == [[-3.0, 1.0, 1.0, 3.0, -1.0, 1.0, 3.0, 1.0]]


def test_a_type_without_a_shift_is_refused_and_nothing_is_prepared() -> None:
    model = nn.Sequential(nn.Linear(256, 16), nn.Linear(16, 8))
    spec = qat.QuantSpec(weights="int2", overrides={"1": "int8"})
    with pytest.raises(
        qat.SpecError, match=r"^algorithm: StretchedElastic needs a type with a float shift .*, got int8: "
    ):
        qat.prepare(model, spec, algorithm=qat.StretchedElastic())
    assert type(model[0]) is nn.Linear
