"""The modules that hold GGUF's blocks, and what the format refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.formats import GGUF, GGUF_FLOAT16, QUANTO
from qat.formats.base import FrozenLayer
from qat.formats.gguf import GgufEmbedding, GgufLinear
from tests.helpers import awkward_weight, same_bits, tiny_model


def packed(name: str, like: nn.Module, dtype: torch.dtype = torch.bfloat16, format: Any = GGUF) -> tuple[Any, Any]:
    types = format.types(name, None, dtype)
    weight = awkward_weight(12, 64)
    frozen, value = qat.StraightThrough().make(weight, types.weights, dtype).freeze(weight)
    bias = torch.ones(12, dtype=dtype) if isinstance(like, nn.Linear) else None
    one = torch.ones((), dtype=dtype)
    tensors = format.pack(FrozenLayer(frozen, bias, types, one, one))
    slots = format.slots(types, (12, 64), bias is not None)
    assert {key: (slot.dtype, slot.shape) for key, slot in slots.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    return format.build(types, (12, 64), tensors, like=like), value


@pytest.mark.parametrize("format", [GGUF, GGUF_FLOAT16], ids=["gguf", "gguf-float16"])
@pytest.mark.parametrize("name", GGUF.qtypes)
def test_a_layer_computes_what_a_float_one_with_its_values_does(name: str, format: Any) -> None:
    layer, value = packed(name, nn.Linear(64, 12), format=format)
    x = torch.randn(3, 64).bfloat16()
    assert isinstance(layer, GgufLinear)
    assert torch.equal(layer(x), nn.functional.linear(x, value, layer.bias))
    assert same_bits(format.values(layer), value)
    assert same_bits(format.values(copy.deepcopy(layer)), value)
    assert (format.is_frozen(layer), (GGUF if format is GGUF_FLOAT16 else GGUF_FLOAT16).is_frozen(layer)) == (
        True,
        False,
    )
    assert not QUANTO.owns(layer)
    assert format.shape(layer) == (12, 64)
    assert layer.compute_dtype is torch.bfloat16


def test_an_embedding_dequantizes_the_rows_it_reads() -> None:
    layer, value = packed("q4_1", nn.Embedding(12, 64))
    ids = torch.tensor([[3, 0, 3], [11, 5, 1]])
    assert isinstance(layer, GgufEmbedding)
    assert torch.equal(layer(ids), value[ids])


@pytest.mark.parametrize("like", [nn.Linear(64, 12), nn.Embedding(12, 64)], ids=["linear", "embedding"])
def test_a_layer_keeps_the_dtype_that_it_was_trained_for(like: nn.Module) -> None:
    layer, value = packed("q4_0", like)
    for change in (nn.Module.float, nn.Module.half, lambda module: module.to(torch.float64)):
        with pytest.raises(qat.StateError, match=r"trained for torch\.bfloat16, got torch\.float.*: load it again"):
            change(nn.Sequential(layer))
    nn.Sequential(layer).bfloat16().to("cpu")
    assert same_bits(layer.frozen_weight().dequantize(), value)
    assert layer.to("meta").weight.is_meta


def test_bytes_of_a_weight() -> None:
    sizes = {name: GGUF.nbytes(GGUF.types(name, None, torch.bfloat16), (4, 64)) for name in GGUF.qtypes}
    assert sizes == {"q8_0": 8 * 34, "q4_0": 8 * 18, "q4_1": 8 * 20}


@pytest.mark.parametrize(
    ("target", "weights", "known"),
    [
        ("gguf", "int8", r"\['q4_0', 'q4_1', 'q8_0'\]"),
        ("transformers", "q4_0", r"\['float8', 'int2', 'int4', 'int8'\]"),
    ],
)
def test_a_type_of_another_format_is_refused(target: str, weights: str, known: str) -> None:
    spec = qat.QuantSpec.model_validate({"weights": weights})
    with pytest.raises(qat.SpecError, match=f"has {known}, got {weights!r}"):
        qat.prepare(tiny_model("llama"), spec, target=target)


def test_activations_are_refused() -> None:
    with pytest.raises(qat.TargetError, match="activations='int8': format 'gguf' has none: use None, or another"):
        qat.prepare(tiny_model("llama"), qat.QuantSpec(weights="q8_0", activations="int8"), target="gguf")


def test_rows_that_are_no_whole_number_of_blocks_stay_float_embeddings_too() -> None:
    spec = qat.QuantSpec(weights="q8_0", overrides={"*embed_tokens": "q8_0"})
    with pytest.raises(qat.SpecError, match="blocks of 32, and its rows have 48 numbers"):
        qat.prepare(tiny_model("llama", hidden_size=48, intermediate_size=40), spec, target="gguf")
    report = qat.inspect(tiny_model("llama", intermediate_size=72), spec, target="gguf")
    reasons = {row.name: row.reason for row in report.layers if row.weights is None}
    assert reasons["model.layers.0.mlp.down_proj"] == "GGUF stores blocks of 32, and its rows have 72 numbers"
