"""The types' numbers are optimum-quanto's, and so is the rule about groups, which no file stores."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import qtypes as quanto_types
from optimum.quanto.nn import QLinear as QuantoLinear

from qat.formats.quanto_types import QTYPES, QTYPES_OF_QUANTO, QUANTO_NAMES, widened
from tests.helpers import DTYPES, same_bits

ROW_LENGTHS = [*range(1, 600, 7), *range(32, 2080, 32), 127, 128, 129, 192, 320, 4096, 5120, 11008]


@pytest.mark.parametrize("name", QTYPES)
def test_a_qtype_has_quantos_numbers(name: str) -> None:
    qtype, theirs = QTYPES[name], quanto_types[QUANTO_NAMES[name]]
    assert qtype.name == name
    assert qtype.key == f"quanto.{name}"
    assert QTYPES_OF_QUANTO[theirs.name] is qtype
    assert qtype.bits == theirs.bits
    assert qtype.floating == theirs.is_floating_point
    assert qtype.storage == (theirs.dtype if qtype.bits == 8 else torch.uint8)
    if qtype.has_shift:
        assert (qtype.code_min, qtype.code_max) == (0, 2**qtype.bits - 1)
    else:
        assert (qtype.code_min, qtype.code_max) == (theirs.qmin, theirs.qmax)
    assert qtype.steps == qtype.code_max


@pytest.mark.parametrize("name", QTYPES)
def test_groups_are_those_that_quantos_layer_computes(name: str) -> None:
    for in_features in ROW_LENGTHS:
        layer = QuantoLinear(in_features, 2, device="meta", weights=QUANTO_NAMES[name])
        assert QTYPES[name].group_size(in_features) == layer.weight_group_size, in_features


@pytest.mark.parametrize(
    ("in_features", "size"),
    [(96, None), (128, None), (200, None), (160, 32), (192, 96), (256, 128), (320, 64)],
    ids=str,
)
def test_group_sizes_as_documented(in_features: int, size: int | None) -> None:
    assert QTYPES["int4"].group_size(in_features) == QTYPES["int2"].group_size(in_features) == size
    assert QTYPES["int8"].group_size(in_features) is QTYPES["float8"].group_size(in_features) is None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_float8_code_iswidened_as_torch_does(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    assert same_bits(widened(codes, dtype), codes.to(dtype))
