"""The registry of starts, their common measure, and that the best is the best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.errors import SpecError
from qat.formats import QUANTO
from qat.numerics import QType
from qat.quantizers import LearnedAffine
from qat.starts import DATA_STARTS, RANGE_STARTS, Start, output_error
from qat.starts.base import block_product, served
from qat.starts.best import best_start
from tests.helpers import DTYPES, awkward_weight, reference_quantize

QTYPES = QUANTO.qtypes


def correlated_inputs(features: int, seed: int = 0, rank: int = 24) -> Tensor:
    """Inputs whose channels depend on each other; one channel is always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, rank, generator=generator) @ torch.randn(rank, features, generator=generator)
    x = mixed + 0.3 * torch.randn(400, features, generator=generator)
    x[:, 3] = 0.0
    return x


def moments_of(x: Tensor) -> Tensor:
    return (x.double().t() @ x.double() / len(x)).float()


def names(qtype: QType) -> list[str]:
    return [name for name in RANGE_STARTS if name != "seq" or qtype.name == "int2"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_output_error_is_that_of_served_outputs(qtype: QType, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = awkward_weight(7, 256), correlated_inputs(256)
    ends = RANGE_STARTS["clip"](weight, qtype, DTYPES[dtype])
    scale, shift = qtype.serve(*qtype.scale_shift(*ends), DTYPES[dtype], 256)
    _, values = reference_quantize(weight, scale, shift, qtype.name, dtype, 128 if qtype.has_shift else None)
    outputs = x.double() @ (torch.from_numpy(values) - weight.double()).t()
    for elements in (1 << 22, 600):  # the second: chunks of two rows
        monkeypatch.setattr("qat.starts.base.CHUNK_ELEMENTS", elements)
        found = output_error(Start("clip", ends, weight), weight, qtype, DTYPES[dtype], moments_of(x))
        assert found == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("features", [96, 256, 320])
def test_products_with_the_blocks_of_each_group(features: int) -> None:
    x, moments = torch.randn(5, features), moments_of(correlated_inputs(features))
    size = {96: 96, 256: 128, 320: 64}[features]
    mask = torch.block_diag(*[torch.ones(size, size)] * (features // size))
    wanted = x.double() @ (moments * mask).double()
    torch.testing.assert_close(block_product(x, moments, QTYPES["int4"]).double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_best_is_never_worse_than_another(qtype: QType, dtype: torch.dtype) -> None:
    for seed, features in enumerate((96, 256)):
        weight, moments = awkward_weight(12, features, seed), moments_of(correlated_inputs(features, seed))
        options = (qtype, dtype, moments)
        errors = {
            name: output_error(Start(name, RANGE_STARTS[name](weight, qtype, dtype), weight), weight, *options)
            for name in names(qtype)
        }
        starts = {name: find(weight, *options) for name, find in DATA_STARTS.items()}
        errors |= {name: output_error(start, weight, *options) for name, start in starts.items()}
        assert all(errors["best"] <= error for error in errors.values()), errors
        assert errors["output"] <= errors["clip"]
        assert errors["gptq"] < 0.9 * errors["clip"]
        assert starts["best"].name in {*errors} - {"best"}
        for start in starts.values():
            ends = [end for end in start.ends if end is not None]
            assert all(bool(tensor.isfinite().all()) for tensor in (start.weight, *ends))


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("name", DATA_STARTS)
def test_without_inputs_weights_start_as_clip(name: str, qtype: QType) -> None:
    weight, moments = awkward_weight(6, 256), torch.zeros(256, 256)
    start = DATA_STARTS[name](weight, qtype, torch.bfloat16, moments)
    low, high = RANGE_STARTS["clip"](weight, qtype, torch.bfloat16)
    assert torch.equal(start.ends[1], high)
    assert low is None or (start.ends[0] is not None and torch.equal(start.ends[0], low))
    assert torch.equal(start.weight, weight)


@pytest.mark.parametrize("outlier", [1e20, 3e38])
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_huge_weight_gives_finite_starts(qtype: QType, outlier: float) -> None:
    weight, moments = awkward_weight(6, 256), moments_of(correlated_inputs(256))
    weight[4, 9] = outlier
    for find in DATA_STARTS.values():
        start = find(weight, qtype, torch.float32, moments)
        assert bool(start.weight.isfinite().all())
        assert bool(served(start.weight, start.ends, qtype, torch.float32).isfinite().all())


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
@pytest.mark.parametrize("start", [*RANGE_STARTS, *DATA_STARTS])
def test_what_is_served_is_what_a_learned_range_serves(start: str, qtype: QType) -> None:
    weight, moments = awkward_weight(9, 256), moments_of(correlated_inputs(256))
    if start not in names(qtype) and start not in DATA_STARTS:
        return
    quantizer = LearnedAffine(start=start).make(weight, qtype, torch.bfloat16)  # type: ignore[arg-type]
    found = Start(
        start, RANGE_STARTS[start if start in RANGE_STARTS else "clip"](weight, qtype, torch.bfloat16), weight
    )
    if start in DATA_STARTS:
        assert quantizer.awaited_start() == start
        found = DATA_STARTS[start](weight, qtype, torch.bfloat16, moments)
        quantizer.restart(*found.ends)
    assert quantizer.awaited_start() is None
    values = quantizer.quantize(found.weight, torch.bfloat16).value.float()
    assert torch.equal(values, served(found.weight, found.ends, qtype, torch.bfloat16))


@pytest.mark.parametrize("qtype", [QTYPES["int8"], QTYPES["float8"], QTYPES["int4"]], ids=str)
def test_seq_is_refused_for_other_types(qtype: QType) -> None:
    with pytest.raises(
        SpecError, match=f"start='seq' needs 2 bits and a float shift, but a layer has {qtype.name} weights"
    ):
        LearnedAffine(start="seq").make(awkward_weight(4, 96), qtype, torch.bfloat16)


def test_a_compensation_without_an_error_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(start: Start, *_: object) -> Start:
        return Start("gptq", start.ends, torch.full_like(start.weight, torch.nan))

    monkeypatch.setattr("qat.starts.best._compensated", spoilt)
    weight = torch.randn(8, 32)
    found = best_start(weight, QTYPES["int2"], torch.float32, torch.eye(32))
    assert found.name != "gptq"
    assert found.weight.isfinite().all()
