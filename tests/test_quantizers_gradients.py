"""Gradients other than the straight-through one, against float64 and plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.formats import QUANTO
from qat.layers.functional import fake_quantized
from qat.numerics import QType
from qat.quantizers.gradients import masked_beyond, smooth_rounding
from tests.helpers import awkward_weight, same_bits

QTYPES = QUANTO.qtypes
INTEGERS = {name: QTYPES[name] for name in ("int8", "int4", "int2")}
CODES = {"int8": (-128, 127), "float8": (-448, 448), "int4": (0, 15), "int2": (0, 3)}


def scaled(qtype: QType, groups: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """A weight that reaches a step and more beyond the codes, scale, shift, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    low, high = CODES[qtype.name]
    scale = torch.rand(groups, 1, generator=generator) + 0.5
    shift = torch.rand(groups, 1, generator=generator) * high if qtype.has_shift else None
    x = low - 2 + (high - low + 4) * torch.rand(groups, 128, generator=generator)
    x[:, :2] = torch.tensor([low - 0.3, high + 0.4])
    weight = x * scale - (0 if shift is None else shift)
    return weight, scale, shift, torch.randn(groups, 128, generator=generator)


@pytest.mark.parametrize("qtype", INTEGERS.values(), ids=INTEGERS)
def test_the_smooth_gradient_is_that_of_the_rotated_wave(qtype: QType) -> None:
    weight, scale, shift, grad = scaled(qtype)
    leaf = weight.clone().requires_grad_()
    found = smooth_rounding(leaf, scale, shift, qtype)
    assert found.data_ptr() == leaf.data_ptr()  # no copy
    found.backward(grad)  # type: ignore[no-untyped-call]
    # arXiv 2601.19320: the rounding, turned by 45 degrees, is a wave y' = -a sin(sqrt(2) pi x') of the turned position
    # x' = (x + round x) / sqrt(2); a slope m there is a slope (1 + m) / (1 - m) here.
    x = (weight.double() + (0 if shift is None else shift.double())) / scale.double()
    turned = ((x + x.round()) / math.sqrt(2)).requires_grad_()
    (slope,) = torch.autograd.grad((-0.21 * torch.sin(math.sqrt(2) * math.pi * turned)).sum(), turned)
    wanted = grad.double() * (1 + slope) / (1 - slope)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-3, atol=1e-4)  # x of 127 has an error of 1e-5


def test_the_smooth_gradient_is_whole_where_a_group_has_no_scale() -> None:
    weight = torch.full((2, 128), 0.03, requires_grad=True)
    smooth_rounding(weight, torch.zeros(2, 1), torch.full((2, 1), -0.03), QTYPES["int2"]).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(2, 128))


@pytest.mark.parametrize("margin", [0.0, 0.48, 0.5, 1.0])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_wider_mask_has_the_gradients_of_autograd(qtype: QType, margin: float) -> None:
    weight, scale, shift, grad = scaled(qtype)
    leaves = [t.clone().requires_grad_() for t in (weight, scale, shift) if t is not None]
    masked_beyond(leaves[0], leaves[1], leaves[2] if shift is not None else None, qtype, margin).backward(grad)  # type: ignore[no-untyped-call]
    doubles = [t.double().requires_grad_() for t in (weight, scale, shift) if t is not None]
    z = doubles[2] if shift is not None else torch.zeros(())
    x = (doubles[0] + z) / doubles[1]
    low, high = CODES[qtype.name]
    inside = (x >= low - margin) & (x <= high + margin)
    clamped = x.detach().clamp(low, high)
    codes = clamped.float().to(torch.float8_e4m3fn).double() if qtype.name == "float8" else clamped.round()
    value = doubles[1] * torch.where(inside, x + (codes - x).detach(), codes) - z
    value.backward(grad.double())  # type: ignore[no-untyped-call]
    beyond = (x < low) | (x > high)
    assert bool((beyond & inside).any()) is (margin > 0)
    for ours, theirs in zip(leaves, doubles, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max())
        )


def test_the_mask_of_quest_lets_errors_of_half_a_step_through() -> None:
    weight = nn.Parameter(awkward_weight(8, 256))
    made = qat.LearnedAffine(mask_margin=0.5).make(weight, QTYPES["int4"], torch.float32)
    quantized = made.quantize(weight, torch.float32)
    fake_quantized(weight, quantized, made).sum().backward()  # type: ignore[no-untyped-call]
    error = (quantized.value - weight.detach()).abs().view(16, 128)
    step = quantized.scale.detach()
    assert weight.grad is not None
    passed = weight.grad.view(16, 128) == 1
    assert torch.equal(passed, (error <= 0.5 * step * (1 + 1e-4)) | (step == 0))  # errors of exactly half a step round
    assert 0 < int((~passed).sum()) < int((made_inside(quantized, weight)).logical_not().sum())


def made_inside(quantized: qat.quantizers.Quantized, weight: Tensor) -> Tensor:
    """Where weights lie within the range itself."""
    assert quantized.shift is not None
    x = (weight.detach().view(16, 128) + quantized.shift.detach()) / quantized.scale.detach()
    return (x >= 0) & (x <= 15)


def test_the_default_stays_the_straight_through_gradient() -> None:
    weight = nn.Parameter(awkward_weight(8, 256))
    quantizer = qat.LearnedAffine().make(weight, QTYPES["int4"], torch.float32)
    _, scale, shift = quantizer.quantize(weight, torch.float32)
    found = quantizer.through(weight, scale, shift)
    assert found[0] is weight
    assert found[1] is scale
    assert found[2] is shift


@pytest.mark.parametrize("algorithm", [qat.StraightThrough(), qat.LearnedAffine(), qat.DualLSQ()], ids=lambda a: a.kind)
def test_the_smooth_gradient_leaves_those_of_scales_alone(algorithm: qat.Algorithm) -> None:
    weight = nn.Parameter(awkward_weight(8, 256))
    found: list[list[Tensor]] = []
    for smooth in (False, True):
        quantizer = algorithm.make(weight, QTYPES["int4"], torch.float32)
        quantizer.smooth = smooth
        value = fake_quantized(weight, quantizer.quantize(weight, torch.float32), quantizer)
        learned = [weight, *quantizer.parameters()]
        found.append(list(torch.autograd.grad(value.square().sum(), learned)))
    plain, changed = found
    assert bool((changed[0].abs() <= plain[0].abs()).all())
    assert not torch.equal(changed[0], plain[0])
    assert all(same_bits(one, other) for one, other in zip(plain[1:], changed[1:], strict=True))
