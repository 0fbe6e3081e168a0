"""Dual-LSQ: codes from one range, values from another, and the gradients of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import qat
from qat.formats import QUANTO
from qat.layers import QLinear
from qat.numerics import QType, Symmetric
from qat.quantizers.dual_lsq import DualRange
from tests.helpers import DTYPES, awkward_weight, kept_by, same_bits

QTYPES = QUANTO.qtypes
CODES = {"int8": (-128, 127), "float8": (-448, 448), "int4": (0, 15), "int2": (0, 3)}


def moved(quantizer: DualRange, amount: float = 0.1) -> DualRange:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return quantizer


def grid(quantizer: DualRange, low_move: Tensor | None, high_move: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of the moved range, in float64."""
    steps, high = CODES[quantizer.qtype.name][1], quantizer.high_start.double()
    if quantizer.low_start is None or low_move is None:
        return high * (1 + high_move.double()) / steps, torch.zeros((), dtype=torch.float64)
    low = quantizer.low_start.double()
    half = (high - low) / 2
    moved_low, moved_high = low - half * low_move.double(), high + half * high_move.double()
    return (moved_high - moved_low) / steps, -moved_low


def differentiable(module: QLinear, x: Tensor) -> Tensor:
    """The layer as one expression in float64: ``s_post q((w + z_pre) / s_pre) - z_post``."""
    quantizer = module.weight_quantizer
    assert isinstance(quantizer, DualRange)
    scale, shift = grid(quantizer, quantizer.low_move, quantizer.high_move)
    code_scale, code_shift = grid(quantizer, quantizer.low_code_move, quantizer.high_code_move)
    codes = ((module.weight.double().view(scale.shape[0], -1) + code_shift) / code_scale).clamp(
        *CODES[quantizer.qtype.name]
    )
    rounded = codes.float().to(torch.float8_e4m3fn).double() if quantizer.qtype.name == "float8" else codes.round()
    value = scale * (codes + (rounded - codes).detach()) - shift
    return linear(x.double(), value.view_as(module.weight))


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_gradients_are_those_of_plain_autograd(qtype: QType) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(6, 256), nn.Linear(256, 12, bias=False)
    module = QLinear.adopt(layer, moved(qat.DualLSQ().make(layer.weight, qtype, torch.float32), 0.05))
    found = []
    for forward in (module, lambda x: differentiable(module, x)):
        module.zero_grad()
        y = forward(x)
        (y.square() * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append({"y": y.detach().double()} | gradients)
    ours, reference = found
    assert ours.keys() == reference.keys() == {"y", *(name for name, _ in module.named_parameters())}
    for name, tensor in reference.items():  # float32 against float64
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_codes_come_from_the_first_range_and_values_from_the_second(qtype: QType, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    quantizer = moved(qat.DualLSQ().make(weight, qtype, dtype))
    frozen, value = quantizer.freeze(weight)
    code_scale, code_shift = quantizer.served(weight, quantizer.low_code_move, quantizer.high_code_move)
    scale, shift = quantizer.served(weight, quantizer.low_move, quantizer.high_move)
    rows = weight.double().view(code_scale.shape[0], -1)
    x = (rows + (0 if code_shift is None else code_shift.detach().double())) / code_scale.detach().double()
    x = x.clamp(*CODES[qtype.name])
    wanted = x.float().to(torch.float8_e4m3fn).double() if qtype.name == "float8" else x.round()
    codes = frozen.codes.double().view_as(wanted)
    # A position in float32 has an error of 1e-7 of its size, so a few codes may round to the other side.
    assert int((codes != wanted).sum()) <= 3
    assert torch.equal(frozen.scale.float(), scale.detach())
    assert frozen.shift is shift is None or torch.equal(frozen.shift.float(), shift.detach())  # type: ignore[union-attr]
    assert same_bits(frozen.dequantize(), value)
    assert not torch.equal(scale, code_scale)


@pytest.mark.parametrize("start", ["minmax", "clip", "lsq"])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_it_starts_as_a_learned_range(qtype: QType, start: str) -> None:
    weight, options = awkward_weight(8, 256), {"start": start}
    dual = qat.DualLSQ.model_validate(options).make(weight, qtype, torch.bfloat16)
    single = qat.LearnedAffine.model_validate(options).make(weight, qtype, torch.bfloat16)
    for ours, theirs in zip(dual.quantize(weight, torch.float32), single.quantize(weight, torch.float32), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_a_layer_keeps_one_more_copy_of_its_weight() -> None:
    layer, x = nn.Linear(256, 64, bias=False), torch.randn(2, 256)
    module = QLinear.adopt(layer, qat.DualLSQ().make(layer.weight, QTYPES["int4"], torch.float32))
    kept, _ = kept_by(lambda: module(x))
    size = 64 * 256 * 4
    assert size <= kept.beyond(x, *module.parameters(), *module.buffers()) < 1.1 * size


def test_a_type_of_another_arithmetic_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Symmetric):
        fused: ClassVar[bool] = False

    options = {"bits": 8, "code_min": -128, "code_max": 127, "steps": 127, "storage": torch.int8}
    other = Other(format="test_dual_lsq", name="int8", **options)  # type: ignore[arg-type]
    with pytest.raises(qat.SpecError, match=r"^algorithm: DualLSQ needs values that are scale \* code - shift"):
        qat.DualLSQ().make(torch.ones(2, 8), other, torch.float32)
