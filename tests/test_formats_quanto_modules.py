"""Frozen modules that are not quanto's linear layer: rows of a table bit for bit, and quanto's own convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimum.quanto import freeze as freeze_by_quanto
from optimum.quanto import quantize
from optimum.quanto.nn import QConv2d
from torch import nn

import qat
from qat.formats import QUANTO, FrozenLayer
from qat.formats.quanto_modules import FrozenEmbedding, FrozenExpertMatrix
from qat.formats.quanto_types import QUANTO_NAMES
from qat.layers import ExpertMatrix, layer_class
from qat.layers.expert_forms import Form
from tests.helpers import DTYPES, WEIGHT_TYPES, same_bits
from tests.test_layers_embedding import embedding

SHAPES = [(64, 256), (80, 256), (50, 64), (33, 384), (16, 130), (1, 64), (208, 640)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_frozen_rows_are_those_of_the_dequantized_table(weights: str, dtype: torch.dtype) -> None:
    for rows, dim in SHAPES:
        layer, one = embedding(weights, rows=max(rows, 4), dim=dim, dtype=dtype), torch.ones((), dtype=dtype)
        if rows == 1:
            layer = embedding(weights, dim=dim, dtype=dtype)
            layer.weight.data, layer.num_embeddings, layer.padding_idx = layer.weight.data[:1], 1, None
            layer.weight_quantizer = qat.StraightThrough().make(layer.weight, QUANTO.qtypes[weights], dtype)
        types, shape = QUANTO.types(weights, None, dtype), (rows, dim)
        frozen = FrozenLayer(layer.weight_quantizer.final_codes(layer.weight), None, types, one, one)
        module = QUANTO.build(types, shape, QUANTO.pack(frozen), like=layer)
        ids = torch.arange(3 * rows).view(3, rows).flip(1) % rows
        assert type(module) is FrozenEmbedding
        assert same_bits(module(ids), QUANTO.values(module)[ids])
        assert same_bits(module(ids[:, :1]), layer(ids[:, :1]).detach().to(dtype))
        assert module(ids[:0]).shape == (0, rows, dim)


def test_a_weight_in_a_kernels_own_class_is_brought_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, one = embedding("int4", rows=64, dtype=torch.bfloat16), torch.ones((), dtype=torch.bfloat16)
    types = QUANTO.types("int4", None, torch.bfloat16)
    packed = QUANTO.pack(FrozenLayer(layer.weight_quantizer.final_codes(layer.weight), None, types, one, one))
    module: Any = QUANTO.build(types, (64, 256), packed, like=layer)
    wanted, calls = module(torch.arange(64)), []
    from qat.formats import quanto_modules

    plain = quanto_modules.plain
    monkeypatch.setattr(quanto_modules, "rows_of_tinygemm", lambda *_: None)  # as on a GPU
    monkeypatch.setattr(quanto_modules, "plain", lambda weight: calls.append(1) or plain(weight))
    assert all(same_bits(module(torch.arange(64)), wanted) for _ in range(2))
    assert len(calls) == 1
    module.weight = nn.Parameter(plain(module.weight).optimize(), requires_grad=False)
    assert same_bits(module(torch.arange(64)), wanted)
    assert len(calls) == 2


def test_quantos_own_quantize_goes_on_to_leave_embeddings_alone() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    quantize(model, weights="qint8")
    assert type(model[0]) is nn.Embedding


CONVOLUTIONS = [
    nn.Conv2d(3, 8, 3, stride=2, padding=1),
    nn.Conv2d(16, 8, (4, 2), groups=2, bias=False, padding_mode="circular", padding=1),
    nn.Conv2d(64, 16, 2, dilation=2),
    nn.Conv2d(16, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_a_convolution_has_the_very_form_that_quanto_gives_it(weights: Any, dtype: torch.dtype) -> None:
    for conv in CONVOLUTIONS:
        options = {key: getattr(conv, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
        made = [
            nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None, **options)
            for _ in range(2)
        ]
        made[1].load_state_dict(made[0].state_dict())
        stock, ours = (nn.Sequential(one) for one in made)
        quantize(stock.to(dtype), weights=QUANTO_NAMES[weights])
        freeze_by_quanto(stock)
        spec = qat.QuantSpec(weights=weights, dtype=str(dtype).removeprefix("torch."), include="0")
        qat.prepare(ours, spec, algorithm=qat.StraightThrough())
        x = torch.randn(2, conv.in_channels, 9, 8, generator=torch.Generator().manual_seed(0))
        expected = ours(x).detach()
        qat.freeze(ours)
        assert type(ours[0]) is QConv2d
        forms = [{k: (v.dtype, v.shape) for k, v in one.state_dict().items()} for one in (stock, ours)]
        assert forms[0] == forms[1]
        assert vars(ours[0])["stride"] == conv.stride
        found = ours(x.to(dtype)).float()
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_its_matrix_is_read_back_from_any_form() -> None:
    for conv in CONVOLUTIONS:
        cls = layer_class(conv)
        assert cls is not None
        model = nn.Sequential(conv)
        for weights in WEIGHT_TYPES:
            weight = cls.effective_weight(conv).detach()
            quantizer = qat.StraightThrough().make(weight, QUANTO.qtypes[weights], torch.float32)
            codes, one = quantizer.final_codes(weight), torch.ones(())
            types = QUANTO.types(weights, None, torch.float32)
            types = type(types)(types.weights, None, torch.float32, kernel=conv.kernel_size)
            bias = None if conv.bias is None else conv.bias.detach()
            frozen = FrozenLayer(codes, bias, types, one, one)
            module = QUANTO.build(types, tuple(weight.shape), QUANTO.pack(frozen), like=model[0])
            again = QUANTO.read(module)
            assert QUANTO.declared(module).kernel == conv.kernel_size
            assert QUANTO.shape(module) == weight.shape
            assert torch.equal(again.weight.codes.float(), codes.codes.float())
            assert torch.equal(again.weight.scale, codes.scale)
            assert torch.equal(QUANTO.values(module), codes.dequantize())
            assert torch.equal(torch.cat([*QUANTO.value_blocks(module, again)]), codes.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_value_of_an_experts_matrix_is_that_of_its_codes(weights: str, dtype: torch.dtype) -> None:
    types, weight = QUANTO.types(weights, None, dtype), torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    frozen, one = (
        qat.StraightThrough().make(weight, types.weights, dtype).final_codes(weight),
        torch.ones((), dtype=dtype),
    )
    like = ExpertMatrix(nn.Module(), "down_proj", 0, Form(("down_proj",)))
    tensors = QUANTO.pack(FrozenLayer(frozen, None, types, one, one))
    module: Any = QUANTO.build(types, (32, 256), tensors, like=like)
    assert type(module) is FrozenExpertMatrix
    assert type(module.weight.data).__name__ in ("WeightQBitsTensor", "WeightQBytesTensor")
    assert QUANTO.is_settled(module, plain_on_cpu=False)
    QUANTO.settle(module, plain_on_cpu=False)
    assert same_bits(module.value(), frozen.dequantize())
    assert same_bits(QUANTO.values(module), frozen.dequantize())
