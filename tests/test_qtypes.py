"""The formats' numbers are optimum-quanto's, and so is the rule about groups, which no file stores."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import qtypes as quanto_types
from optimum.quanto.nn import QLinear as QuantoLinear
from qat.qtypes import QTYPES, group_size

ROW_LENGTHS = [*range(1, 600, 7), *range(32, 2080, 32), 127, 128, 129, 192, 320, 4096, 5120, 11008]


@pytest.mark.parametrize("name", QTYPES)
def test_a_qtype_has_quantos_numbers(name: str) -> None:
    kind, theirs = QTYPES[name], quanto_types[QTYPES[name].quanto_name]
    assert kind.name == name
    assert kind.bits == theirs.bits
    assert kind.floating == theirs.is_floating_point
    assert getattr(torch, kind.storage) == theirs.dtype if kind.bits == 8 else kind.storage == "uint8"
    if kind.affine:
        assert (kind.code_min, kind.code_max) == (0, 2**kind.bits - 1)
    else:
        assert (kind.code_min, kind.code_max) == (theirs.qmin, theirs.qmax)
    assert kind.scale_max == kind.code_max


@pytest.mark.parametrize("name", QTYPES)
def test_groups_are_those_that_quantos_layer_computes(name: str) -> None:
    for in_features in ROW_LENGTHS:
        layer = QuantoLinear(in_features, 2, device="meta", weights=QTYPES[name].quanto_name)
        assert group_size(name, in_features) == layer.weight_group_size, in_features


@pytest.mark.parametrize(
    ("in_features", "size"),
    [(96, None), (128, None), (200, None), (160, 32), (192, 96), (256, 128), (320, 64)],
    ids=str,
)
def test_group_sizes_as_documented(in_features: int, size: int | None) -> None:
    assert group_size("int4", in_features) == group_size("int2", in_features) == size
    assert group_size("int8", in_features) is group_size("float8", in_features) is None
