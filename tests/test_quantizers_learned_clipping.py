"""Learnable clipping: OmniQuant's formula, gradients and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import qat
from qat.formats import QUANTO
from qat.layers import QLinear
from qat.numerics import QType
from qat.quantizers.learned_clipping import ClippedRange
from tests.helpers import DTYPES, awkward_weight, one_sided_weight, reference_quantize

QTYPES = QUANTO.qtypes
CODES = {"int8": (-128, 127), "float8": (-448, 448), "int4": (0, 15), "int2": (0, 3)}


def moved(quantizer: ClippedRange, amount: float) -> ClippedRange:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(amount * torch.rand(parameter.shape, generator=generator))
    return quantizer


def differentiable(module: QLinear, x: Tensor) -> Tensor:
    """The layer as one expression in float64, after OmniQuant (arXiv 2308.13137, eq. 2); the range has no gradient."""
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, ClippedRange)
    low_code, high_code = CODES[quantizer.qtype.name]
    groups = quantizer.high_logit.shape[0]
    rows = module.weight.double().view(groups, -1)
    largest, smallest = rows.detach().amax(1, keepdim=True), rows.detach().amin(1, keepdim=True)
    if quantizer.low_logit is None:
        low = torch.zeros(())
        scale = torch.maximum(largest, -smallest) * torch.sigmoid(quantizer.high_logit.double()) / high_code
    else:
        low = smallest * torch.sigmoid(quantizer.low_logit.double())
        scale = (largest * torch.sigmoid(quantizer.high_logit.double()) - low) / high_code
    codes = ((rows - low) / scale).clamp(low_code, high_code)
    rounded = codes.float().to(torch.float8_e4m3fn).double() if quantizer.qtype.name == "float8" else codes.round()
    value = scale * (codes + (rounded - codes).detach()) + low
    return linear(x.double(), value.view_as(module.weight))


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_gradients_are_those_of_plain_autograd(qtype: QType) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(6, 256), nn.Linear(256, 12, bias=False)
    module = QLinear.adopt(layer, moved(qat.LearnedClipping().make(layer.weight, qtype, torch.float32), 4.0))
    found = []
    for forward in (module, lambda x: differentiable(module, x)):
        module.zero_grad()
        y = forward(x)
        (y.square() * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
        found.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    ours, reference = found
    assert ours.keys() == reference.keys() == {name for name, _ in module.named_parameters()}
    for name, tensor in reference.items():  # float32 against float64
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_served_values_are_those_of_an_independent_implementation(qtype: QType, dtype: str) -> None:
    weight = awkward_weight(6, 256)
    quantizer = moved(qat.LearnedClipping().make(weight, qtype, DTYPES[dtype]), 3.0)
    value, scale, shift = quantizer.quantize(weight, DTYPES[dtype])
    _, values = reference_quantize(weight, scale, shift, qtype.name, dtype, 128 if qtype.has_shift else None)
    assert torch.equal(value.double(), torch.from_numpy(values))


def test_it_starts_at_a_part_of_the_range_and_follows_the_weight() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    quantizer = qat.LearnedClipping().make(weight, QTYPES["int2"], torch.float32)
    for factor in (1.0, 3.0):
        _, scale, shift = quantizer.quantize(weight * factor, torch.float32)
        assert shift is not None
        assert scale.item() == pytest.approx(factor * 0.98201379)  # sigmoid(4), of the width 3 by three steps
        assert shift.item() == pytest.approx(factor * 0.98201379)


def test_the_ends_of_a_range_on_one_side_of_zero_never_cross() -> None:
    weight = one_sided_weight()
    quantizer = qat.LearnedClipping().make(weight, QTYPES["int4"], torch.float32)
    assert quantizer.low_logit is not None
    with torch.no_grad():
        quantizer.high_logit.fill_(-5.0)  # so that the high end of a positive group lies below the low one
    _, scale, _ = quantizer.quantize(weight, torch.float32)
    widths = weight.view(8, 128).amax(1) - weight.view(8, 128).amin(1)
    assert bool((15 * scale.squeeze() >= widths / 128 * (1 - 1e-5)).all())
    scale.sum().backward()
    assert quantizer.high_logit.grad is not None
    assert bool(quantizer.high_logit.grad.any())  # and the range can recover


def test_a_group_of_equal_weights_keeps_its_value() -> None:
    weight = torch.full((2, 128), 0.03)
    quantizer = moved(qat.LearnedClipping().make(weight, QTYPES["int2"], torch.float32), 2.0)
    assert torch.equal(quantizer.quantize(weight, torch.float32).value, weight)
