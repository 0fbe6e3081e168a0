"""The module that runs a frozen layer: what it stores, what it gives back, and what it computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from qat.formats import COMPRESSED_TENSORS, FrozenLayer
from qat.formats.compressed_modules import FrozenExpert, FrozenLinear, joined_rows, split_rows
from qat.formats.compressed_types import QTYPES
from qat.layers import ExpertMatrix
from qat.layers.expert_forms import Form
from qat.quantizers import StraightThrough
from tests.helpers import awkward_weight, same_bits

NAMES = ["int8", "float8", "int4_g32", "int2_g64", "int4_g32_zp", "int2_g64_zp"]


def layer(name: str, activations: str | None = None, bias: bool = True) -> FrozenLayer:
    weight, dtype = awkward_weight(10, 128), torch.bfloat16
    frozen, _ = StraightThrough().make(weight, QTYPES[name], dtype).freeze(weight)
    types = COMPRESSED_TENSORS.types(name, activations, dtype, outputs=False)
    scale = torch.tensor(0.02, dtype=dtype) if activations else torch.ones((), dtype=dtype)
    return FrozenLayer(
        frozen, torch.randn(10, dtype=dtype) if bias else None, types, scale, torch.ones((), dtype=dtype)
    )


def built(frozen: FrozenLayer) -> FrozenLinear:
    module = COMPRESSED_TENSORS.build(
        frozen.types, (10, 128), COMPRESSED_TENSORS.pack(frozen), like=torch.nn.Linear(128, 10)
    )
    assert isinstance(module, FrozenLinear)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_what_was_packed_is_read_again(name: str) -> None:
    frozen = layer(name)
    read = COMPRESSED_TENSORS.read(copy.deepcopy(built(frozen)))
    assert same_bits(read.weight.codes, frozen.weight.codes)
    assert same_bits(read.weight.scale, frozen.weight.scale)
    assert (read.weight.shift is None) == (frozen.weight.shift is None)
    if read.weight.shift is not None and frozen.weight.shift is not None:
        assert same_bits(read.weight.shift, frozen.weight.shift)
    assert read.types == frozen.types
    assert same_bits(COMPRESSED_TENSORS.values(built(frozen)), frozen.weight.dequantize())


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_static_activations_are_fake_quantized_and_outputs_are_not(name: str) -> None:
    frozen = layer(name, activations=name)
    module, x = built(frozen), torch.randn(3, 128, dtype=torch.bfloat16) * 3
    scale = frozen.input_scale
    if name == "int8":
        given = (x / scale).clamp(-128, 127).round() * scale
    else:
        given = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16) * scale
    assert torch.equal(module(x), torch.nn.functional.linear(given, frozen.weight.dequantize(), frozen.bias))
    assert module.stored()["input_scale"].shape == (1,)


def test_a_row_and_a_column_that_fill_no_word() -> None:
    """Ten rows of zero points fill one word of eight and a quarter of the next."""
    stored = COMPRESSED_TENSORS.pack(layer("int4_g32_zp", bias=False))
    assert stored["weight_zero_point"].shape == (2, 4)
    assert stored["weight_shape"].tolist() == [10, 128]


@pytest.mark.parametrize("name", ["int8", "float8", "int4_g32", "int2_g64"])
def test_equal_runs_of_rows_are_layers_of_the_same_bytes(name: str) -> None:
    """As gate and up of an expert, which a module holds in one matrix."""
    frozen = layer(name, bias=False)
    stored = COMPRESSED_TENSORS.pack(frozen)
    parts = {key: split_rows(key, tensor, 2) for key, tensor in stored.items()}
    assert all(same_bits(joined_rows(key, parts[key]), tensor) for key, tensor in stored.items())
    for number, rows in enumerate((slice(0, 5), slice(5, 10))):
        scale = frozen.weight.scale.view(10, -1)[rows].reshape(-1, 1)
        half = replace(frozen, weight=replace(frozen.weight, codes=frozen.weight.codes[rows], scale=scale))
        alone = COMPRESSED_TENSORS.pack(half)
        assert all(same_bits(alone[key], parts[key][number]) for key in stored)


def test_an_expert_gives_its_values_and_leaves_its_input() -> None:
    frozen = layer("int4_g32", bias=False)
    matrix = ExpertMatrix(torch.nn.Module(), "down_proj", 0, Form(("down_proj",)))
    module = COMPRESSED_TENSORS.build(frozen.types, (10, 128), COMPRESSED_TENSORS.pack(frozen), like=matrix)
    assert isinstance(module, FrozenExpert)
    assert same_bits(module.value(), frozen.weight.dequantize())
    assert not module.quantizes_input
