"""Which float8 layers quanto's Marlin kernel would take on CUDA, and the mark that keeps theirs from it."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import WeightQBytesTensor, qfloat8_e4m3fn, qint8

from qat.formats import QUANTO
from qat.formats.quanto_marlin import keep_bias, loses_bias_on_cuda


@pytest.mark.parametrize(
    ("weights", "activations", "dtype", "shape", "lost"),
    [
        ("float8", None, torch.bfloat16, (128, 64), True),
        ("float8", None, torch.float16, (64, 128), True),
        ("float8", None, torch.bfloat16, (64, 64), False),
        ("float8", None, torch.bfloat16, (128, 96), False),
        ("float8", None, torch.float32, (128, 64), False),
        ("float8", "float8", torch.bfloat16, (128, 64), False),
        ("int8", None, torch.bfloat16, (128, 64), False),
    ],
)
def test_marlin_takes_some_shapes(
    weights: str, activations: str | None, dtype: torch.dtype, shape: tuple[int, int], lost: bool
) -> None:
    assert loses_bias_on_cuda(QUANTO.types(weights, activations, dtype), shape) is lost


@pytest.mark.parametrize("qtype", [qfloat8_e4m3fn, qint8], ids=str)
def test_only_float8_weights_are_marked(qtype: object) -> None:
    codes = torch.zeros(128, 64, dtype=qtype.dtype)  # type: ignore[attr-defined]
    weight = WeightQBytesTensor(qtype, 0, codes.size(), codes.stride(), codes, torch.ones(128, 1), None)
    assert keep_bias(weight) is weight
    assert weight.activation_qtype is (qfloat8_e4m3fn if qtype is qfloat8_e4m3fn else None)
