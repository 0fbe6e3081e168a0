"""`fake_quantized` gives any operation the weight that `quantized_linear` multiplies with, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qat.errors import CalibrationError
from qat.formats import QUANTO
from qat.layers.functional import fake_quantized, quantized_linear
from qat.numerics import QType
from qat.observers import Absmax
from qat.quantizers import Algorithm, LearnedAffine, StraightThrough, WeightQuantizer
from qat.quantizers.activation import ActivationQuantizer
from tests.helpers import LearnedStep, same_bits

QTYPES = QUANTO.qtypes
ALGORITHMS: list[Algorithm] = [
    StraightThrough(),
    StraightThrough(mask_saturated=True),
    LearnedStep(),
    LearnedAffine(),
    LearnedAffine(mask_saturated=False),
]


def gradients(weight: nn.Parameter, quantizer: WeightQuantizer, y: Tensor) -> list[Tensor]:
    """Those of a weighted sum of squares, for the weight and all that is learned."""
    loss = (y.square() * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum()
    return list(torch.autograd.grad(loss, [weight, *quantizer.parameters()]))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_product_with_the_fake_quantized_weight_is_the_quantized_linear_map(
    qtype: QType, algorithm: Algorithm
) -> None:
    weight, x = nn.Parameter(torch.randn(24, 256) * 0.05), torch.randn(6, 256)
    quantizer = algorithm.make(weight, qtype, torch.bfloat16)
    results = []
    for way in ("autograd", "linear"):
        quantized = quantizer.quantize(weight, torch.float32)
        if way == "linear":
            y = quantized_linear(x, weight, None, quantized, quantizer)
        else:
            value = fake_quantized(weight, quantized, quantizer)
            assert same_bits(value.detach(), quantized.value)
            y = x @ value.t()
        results.append([y.detach(), *gradients(weight, quantizer, y)])
    ours, theirs = results
    assert len(ours) == len(theirs) == 2 + len(list(quantizer.parameters()))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype is other.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_gradient_of_a_master_in_bfloat16_is_bfloat16(qtype: QType) -> None:
    weight = nn.Parameter((torch.randn(8, 256) * 0.05).bfloat16())
    quantizer = StraightThrough().make(weight, qtype, torch.bfloat16)
    value = fake_quantized(weight, quantizer.quantize(weight, torch.float32), quantizer)
    value.square().sum().backward()  # type: ignore[no-untyped-call]
    assert value.dtype is torch.float32
    assert weight.grad is not None
    assert torch.equal(weight.grad, (2 * value.detach()).bfloat16())


def test_a_frozen_weight_or_a_frozen_scale_gets_no_gradient() -> None:
    weight = nn.Parameter(torch.randn(8, 64), requires_grad=False)
    quantizer = LearnedStep().make(weight, QTYPES["int8"], torch.float32)
    fake_quantized(weight, quantizer.quantize(weight, torch.float32), quantizer).sum().backward()
    assert weight.grad is None
    assert quantizer.log_scale.grad is not None
    quantizer.requires_grad_(False)
    assert not fake_quantized(weight, quantizer.quantize(weight, torch.float32), quantizer).requires_grad


def test_a_quantized_input_needs_its_scale_where_it_has_elements() -> None:
    weight = nn.Parameter(torch.randn(4, 16))
    quantizer = StraightThrough().make(weight, QTYPES["int8"], torch.float32)
    activation = ActivationQuantizer(QTYPES["int8"], torch.float32, Absmax())
    quantized = quantizer.quantize(weight, torch.float32)
    with pytest.raises(CalibrationError, match=r"run qat.calibrate\(model, batches\)"):
        quantized_linear(torch.ones(1, 16), weight, None, quantized, quantizer, activation)
    x = torch.ones(0, 16, requires_grad=True)
    y = quantized_linear(x, weight, None, quantized, quantizer, activation)
    assert y.shape == linear(x, weight).shape == (0, 4)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.shape == (0, 16)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64)], ids=str)
def test_a_model_may_add_to_the_output_in_place(shape: tuple[int, ...]) -> None:
    weight, bias, x = nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.randn(8)), torch.randn(shape)
    quantizer = StraightThrough().make(weight, QTYPES["int8"], torch.float32)
    results = []
    for in_place in (False, True):
        y = quantized_linear(x, weight, bias, quantizer.quantize(weight, torch.float32), quantizer)
        y = y.add_(x.sum()) if in_place else y + x.sum()
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [weight, bias])])
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)
