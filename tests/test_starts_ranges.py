"""SEQ, HQQ and ranges by output error against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.formats import QUANTO
from qat.numerics import QType
from qat.starts import RANGE_STARTS, Start, output_error
from qat.starts.base import served
from qat.starts.output import fitted_range, output_range
from tests.helpers import awkward_weight
from tests.test_starts import correlated_inputs, moments_of

QTYPES = QUANTO.qtypes


def test_seq_is_paretoqs_formula() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    values = served(weight, RANGE_STARTS["seq"](weight, QTYPES["int2"], torch.float32), QTYPES["int2"], torch.float32)
    alpha = weight.double().abs().amax(1, keepdim=True)
    wanted = alpha * (torch.round(2 * (weight.double() / alpha).clamp(-0.99, 0.99) - 0.5) + 0.5) / 2
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-6)


def half_quadratic(weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of each row after 20 steps, in float64, and the row's norm: of the best step."""
    w = weight.double()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale, shift = (high - low) / top, -low
    best, smallest, beta = shift, torch.full_like(shift, torch.inf), 10.0
    for _ in range(21):
        codes = ((w + shift) / scale).round().clamp(0, top)
        error = w - (scale * codes - shift)
        norm = error.abs().pow(0.7).sum(1, keepdim=True)
        best = torch.where(norm < smallest, shift, best)
        smallest = torch.minimum(norm, smallest)
        units = error.abs() / scale
        sparse = torch.sign(error) * scale * torch.relu(units - units.pow(-0.3) / beta)
        shift = (scale * codes - (w - sparse)).mean(1, keepdim=True)
        beta *= 1.01
    return best, smallest


@pytest.mark.parametrize("qtype", [QTYPES["int4"], QTYPES["int2"]], ids=["int4", "int2"])
def test_hqq_is_its_formula_in_float64(qtype: QType) -> None:
    weight = 0.02 * torch.randn(32, 96, generator=torch.Generator().manual_seed(0)).pow(3)
    low, high = RANGE_STARTS["hqq"](weight, qtype, torch.float32)
    assert low is not None
    shift, norm = half_quadratic(weight, int(qtype.steps))
    values = served(weight, (low, high), qtype, torch.float32)
    found = (values.double() - weight.double()).abs().pow(0.7).sum(1, keepdim=True)
    # A weight beside a rounding boundary may fall to either side, so that a few rows go another way.
    assert int((torch.isclose(-low.double(), shift, rtol=1e-4, atol=1e-7)).sum()) >= 28
    torch.testing.assert_close(found, norm, rtol=2e-2, atol=0)
    whole = served(weight, qtype.weight_range(weight), qtype, torch.float32)
    assert bool((norm < 0.9 * (whole - weight).double().abs().pow(0.7).sum(1, keepdim=True)).any())


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_fit_is_the_least_squares_solution(qtype: QType) -> None:
    weight, x = awkward_weight(6, 96)[3:], correlated_inputs(96).double()
    ends = RANGE_STARTS["clip"](weight, qtype, torch.float32)
    scale, shift = qtype.serve(*qtype.scale_shift(*ends), torch.float32, 96)
    codes = qtype.encode(weight, scale, shift).double()
    low, high = fitted_range(weight, ends, qtype, torch.float32, moments_of(x))
    for row in range(3):
        columns = [x @ codes[row]] + ([-x.sum(1)] if qtype.has_shift else [])
        wanted = torch.linalg.lstsq(torch.stack(columns, 1), (x @ weight[row].double())[:, None]).solution[:, 0]
        found, *minus = (float(end[row]) for end in (high, low) if end is not None)
        assert (found - sum(minus)) / qtype.steps == pytest.approx(float(wanted[0]), rel=1e-3)
        assert low is None or -minus[0] == pytest.approx(float(wanted[1]), rel=1e-2)


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_chunks_of_rows_change_little(qtype: QType, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = awkward_weight(20, 256), moments_of(correlated_inputs(256))
    errors = []
    for elements in (1 << 22, 1000):  # three rows
        monkeypatch.setattr("qat.starts.base.CHUNK_ELEMENTS", elements)
        ends = output_range(weight, qtype, torch.bfloat16, moments)
        errors.append(output_error(Start("output", ends, weight), weight, qtype, torch.bfloat16, moments))
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)  # products of other sizes sum in another order
