"""The module that holds an expert's packed matrix: its value is quanto's, and no kernel's order gets hold of it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.formats import QUANTO, FrozenLayer
from qat.formats.quanto_modules import expert_class, module_class
from qat.layers import ExpertMatrix
from qat.layers.expert_forms import Form
from tests.helpers import same_bits


def held(weights: str, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    types = QUANTO.types(weights, None, dtype)
    weight = torch.randn(32, 256)
    frozen = qat.StraightThrough().make(weight, types.weights, dtype).final_codes(weight)
    one = torch.ones((), dtype=dtype)
    tensors = QUANTO.pack(FrozenLayer(frozen, None, types, one, one))
    like = ExpertMatrix(nn.Module(), "down_proj", 0, Form(("down_proj",)))
    return QUANTO.build(types, (32, 256), tensors, like=like), frozen.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int8", "float8", "int4", "int2"])
def test_its_value_is_that_of_the_codes(weights: str, dtype: torch.dtype) -> None:
    module, value = held(weights, dtype)
    assert type(module) is expert_class()
    assert same_bits(module.value(), value)
    assert same_bits(QUANTO.values(module), value)
    assert type(module.weight.data).__name__ in ("WeightQBitsTensor", "WeightQBytesTensor")
    assert QUANTO.is_settled(module, plain_on_cpu=False)
    QUANTO.settle(module, plain_on_cpu=False)
    assert same_bits(module.value(), value)


def test_a_pickle_is_such_a_module() -> None:
    module, value = held("int4", torch.bfloat16)
    other = pickle.loads(pickle.dumps(module))
    assert type(other) is type(module)
    assert same_bits(other.value(), value)


def test_other_layers_are_quantos_linear_ones() -> None:
    assert module_class(nn.Linear(2, 2)).__name__ == "QLinear"
