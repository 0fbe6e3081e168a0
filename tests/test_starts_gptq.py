"""GPTQ against its definition: an explicit inverse for each column, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.formats import QUANTO
from qat.numerics import Affine, QType
from qat.starts import RANGE_STARTS, Start, output_error
from qat.starts.gptq import compensated_weight, inverse_factor
from tests.helpers import DTYPES, awkward_weight
from tests.test_starts import correlated_inputs, moments_of

QTYPES = QUANTO.qtypes


def brain_surgeon(weight: Tensor, scale: Tensor, shift: Tensor, top: int, moments: Tensor) -> Tensor:
    """Optimal Brain Quantization in a fixed order, Frantar et al. 2022, eq. 2: masters before rounding, float64."""
    w, h = weight.double().clone(), moments.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        group = int(column) // (weight.shape[1] // scale.shape[1])
        s, z = scale[:, group].double(), shift[:, group].double()
        error = w[:, column] - (s * ((w[:, column] + z) / s).round().clamp(0, top) - z)
        w[:, rest[1:]] -= (error / inverse[0, 0])[:, None] * inverse[0, 1:]
    return w


@pytest.mark.parametrize("features", [64, 160])  # one group, and five of 32
@pytest.mark.parametrize("name", ["int4", "int2"])
def test_it_is_optimal_brain_quantization_in_order(name: str, features: int) -> None:
    qtype = QTYPES[name]
    weight = torch.randn(8, features, generator=torch.Generator().manual_seed(0))
    moments = moments_of(correlated_inputs(features))
    ends = RANGE_STARTS["minmax"](weight, qtype, torch.float32)
    scale, shift = qtype.serve(*qtype.scale_shift(*ends), torch.float32, features)
    assert shift is not None
    wanted = brain_surgeon(weight, scale.view(8, -1), shift.view(8, -1), int(qtype.steps), moments)
    found = compensated_weight(weight, qtype, torch.float32, moments, ends)
    close = torch.isclose(found.double(), wanted, rtol=1e-2, atol=1e-3).all(1)
    assert int(close.sum()) >= 6  # a weight beside a rounding boundary sends its row another way


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_correlated_inputs_get_a_smaller_output_error(qtype: QType, dtype: torch.dtype, master: torch.dtype) -> None:
    weight, moments = awkward_weight(16, 256).to(master), moments_of(correlated_inputs(256))
    ends = RANGE_STARTS["clip"](weight, qtype, dtype)
    made = compensated_weight(weight, qtype, dtype, moments, ends)
    assert (made.dtype, made.shape) == (weight.dtype, weight.shape)
    options = (weight, qtype, dtype, moments)
    before = output_error(Start("clip", ends, weight), *options)
    # float16 holds no smaller scales than 6e-8 and a bfloat16 master moves weights by up to 2^-9: less is won there.
    assert output_error(Start("gptq", ends, made), *options) < 0.9 * before
    assert torch.equal(made[0], weight[0])  # zeros stay zeros


@pytest.mark.parametrize("elements", [160, 3 * 160, 2**28])
@pytest.mark.parametrize("name", ["int4", "int2", "int8"])
def test_rows_do_not_depend_on_their_chunk(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments, qtype = torch.randn(8, 160), moments_of(correlated_inputs(160)), QTYPES[name]
    ends = RANGE_STARTS["clip"](weight, qtype, torch.float32)
    monkeypatch.setattr("qat.starts.base.CHUNK_ELEMENTS", elements)
    found = compensated_weight(weight, qtype, torch.float32, moments, ends)
    monkeypatch.undo()
    wanted = compensated_weight(weight, qtype, torch.float32, moments, ends)
    assert int(torch.isclose(found, wanted, rtol=1e-4, atol=1e-5).all(1).sum()) >= 7  # sums of another order


def test_a_singular_matrix_raises_the_damping() -> None:
    ones = torch.ones(64, 64)
    upper = inverse_factor(ones)
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(ones + 0.01 * torch.eye(64)), rtol=1e-2, atol=1e-1)
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    upper = inverse_factor(indefinite)
    assert bool(upper.isfinite().all())
    assert not torch.equal(upper, torch.eye(3))
    assert torch.equal(inverse_factor(torch.full((3, 3), torch.nan)), torch.eye(3))


def test_types_with_one_group_size_for_all_rows() -> None:
    class Groups(Affine):
        def group_size(self, in_features: int) -> int | None:
            return 32

    fixed = Groups(format="gptq", name="int4", bits=4, code_min=0, code_max=15, steps=15, storage=torch.uint8)
    weight, moments = awkward_weight(8, 160), moments_of(correlated_inputs(160))
    ends = RANGE_STARTS["clip"](weight, QTYPES["int4"], torch.float32)  # whose groups have 32 elements here too
    found = [compensated_weight(weight, qtype, torch.float32, moments, ends) for qtype in (fixed, QTYPES["int4"])]
    assert torch.equal(*found)
