"""The search for a clipped range: never worse than the whole range, near the optimum, the same in chunks."""

from __future__ import annotations

import pytest
import torch

from qat.formats import QUANTO
from qat.numerics import QType
from qat.quantizers import LearnedAffine
from qat.starts.clip import clipped_range, weight_error
from tests.helpers import DTYPES, awkward_weight, one_sided_weight, same_bits

QTYPES = QUANTO.qtypes

SHAPES = [(1, 8), (3, 5), (4, 96), (16, 256), (3, 320), (3, 200)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_the_clipped_range_is_never_worse_than_the_whole_one(qtype: QType, dtype: torch.dtype) -> None:
    for weight in (*(awkward_weight(*shape, seed) for seed, shape in enumerate(SHAPES)), one_sided_weight()):
        whole = weight_error(weight, *qtype.weight_range(weight), qtype, dtype)
        clipped = weight_error(weight, *clipped_range(weight, qtype, dtype), qtype, dtype)
        assert bool((clipped <= whole).all())


def test_the_clipped_range_of_a_normal_group_is_near_the_best_uniform_quantizer() -> None:
    # Four equidistant levels have the smallest squared error for a normal distribution at a step of 0.9957 σ, an
    # error of 0.1188 σ² (Max 1960, table II). In-sample, with 8 rows of 8,192 numbers.
    weight = torch.randn(8, 8192, generator=torch.Generator().manual_seed(0))
    int2 = QTYPES["int2"]
    ends = int2.weight_range(weight[:, :127])
    low, high = clipped_range(weight[:, :127], int2, torch.float32)
    assert low is not None
    assert bool((high - low < ends[1] - ends[0]).all())  # type: ignore[operator]
    quantizer = LearnedAffine().make(weight[:, :8191], int2, torch.float32)  # odd: the whole row is one group
    error = (quantizer.quantize(weight[:, :8191], torch.float32).value - weight[:, :8191]).square().mean()
    assert float(error) == pytest.approx(0.1188, rel=0.03)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = awkward_weight(37, 256)
    whole = clipped_range(weight, QTYPES["int4"], torch.bfloat16)
    monkeypatch.setattr("qat.starts.base.CHUNK_ELEMENTS", 1000)  # three rows
    chunked = clipped_range(weight, QTYPES["int4"], torch.bfloat16)
    assert whole[0] is not None
    assert chunked[0] is not None
    assert same_bits(whole[0], chunked[0])
    assert same_bits(whole[1], chunked[1])
