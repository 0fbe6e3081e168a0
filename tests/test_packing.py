"""The base under LoRA as packed codes: what is held, what is trained, and that it is served."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.errors import SpecError, StateError
from qat.formats import QUANTO
from qat.layers.packed import PackedForm, PackedLinear
from tests.helpers import kept_by, same_bits
from tests.test_adapters import INT4, TOKENS, Q, adapted, llama, logits, train
from tests.test_layers_lora import KINDS, TYPES, layer_of, prepared

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


@pytest.mark.parametrize("shape", [(48, 128), (5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("weights", TYPES)
def test_codes_come_back_as_they_were(weights: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    types, weight = QUANTO.types(weights, None, torch.bfloat16), torch.randn(shape)
    frozen = qat.LearnedAffine().make(weight, types.weights, types.dtype).final_codes(weight)
    form = PackedForm(frozen.qtype, frozen.shape, frozen.dtype, torch.float32)
    packed = form.pack(frozen.codes)
    assert packed.numel() == -(-weight.numel() * types.weights.bits // 8)
    assert torch.equal(form.weight(packed, frozen.scale, frozen.shift), frozen.dequantize().float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", TYPES)
def test_it_trains_as_over_a_float_base_of_the_same_values(kind: str, weights: Any) -> None:
    model = prepared("int4", **KINDS[kind])
    other, x = copy.deepcopy(model), torch.randn(6, 128)
    report = qat.pack_base(model, weights)
    assert report.layers == ("0",)
    layer, plain = layer_of(model), layer_of(other)
    assert isinstance(layer.base_layer, PackedLinear)
    plain.base_layer.weight.data = layer.base_layer.weight
    found = []
    for one in (model, other):
        y = one(x)
        y.square().sum().backward()
        found.append((y.detach(), *(p.grad for p in one.parameters() if p.requires_grad)))
    assert all(map(torch.equal, *found))
    with model.disable_adapter(), other.disable_adapter():
        assert torch.equal(model(x), other(x))
    for one in (model, other):
        qat.freeze(one)
    assert same_bits(*(one.get_base_model()[0].weight.dequantize() for one in (model, other)))


def test_nothing_but_the_codes_is_held() -> None:
    model = prepared("int4")
    report = qat.pack_base(model)
    assert report.nbytes_before == 48 * 128 * 4
    assert sum(t.nbytes for t in layer_of(model).base_layer.buffers()) == report.nbytes == 48 * 128 // 2 + 48 * 8
    kept, _ = kept_by(lambda: model(torch.randn(2, 128)))
    assert max(kept.storages.values()) < 48 * 128


def test_a_packed_model_is_trained_exported_and_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other = adapted(), adapted()
    for one in (model, other):
        qat.prepare(one, INT4, target="transformers")
        qat.pack_base(one, "int8")
    assert "10 quantized layers without an adapter keep their float weight" in caplog.text
    qat.calibrate(model, [TOKENS])
    losses = train(model)
    assert losses[-1] < losses[0]
    other.load_state_dict(model.state_dict())
    assert same_bits(logits(other), logits(model))
    model.save_pretrained(tmp_path / "adapter")
    layer = model.get_base_model().get_submodule(Q)
    made = layer.weight_quantizer.quantize(layer.effective_weight(layer), torch.bfloat16).value.detach()
    qat.freeze(model)
    assert same_bits(model.get_base_model().get_submodule(Q).weight.dequantize(), made)
    qat.export(model, tmp_path / "out", example_inputs=TOKENS)
    qat.verify(tmp_path / "out", reference=model)
    assert same_bits(logits(qat.load(tmp_path / "out")), logits(model))


def test_codes_of_another_type_are_refused() -> None:
    model, other = prepared("int4"), prepared("int4")
    qat.pack_base(model, "int8")
    qat.pack_base(other, "float8")
    with pytest.raises(
        StateError, match=r"base_layer' are quanto.int8, .* quanto.float8: call qat.pack_base with the t"
    ):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_packed_model_may_be_cast(dtype: torch.dtype) -> None:
    model = prepared("int4", dtype="bfloat16")
    qat.pack_base(model)
    before = layer_of(model).base_layer.weight
    model.to(dtype)
    assert same_bits(layer_of(model).base_layer.weight, before.to(dtype))
    model(torch.randn(2, 128, dtype=dtype)).sum().backward()
    qat.freeze(model)


def test_what_cannot_be_packed_is_refused() -> None:
    model = llama()
    with pytest.raises(StateError, match="was not prepared"):
        qat.pack_base(model)
    qat.prepare(model, INT4)
    with pytest.raises(StateError, match="has no float base under LoRA"):
        qat.pack_base(model)
    lora = prepared("int4")
    with pytest.raises(SpecError, match="weights: format 'quanto' has"):
        qat.pack_base(lora, "int3")
    layer_of(lora).base_layer.weight.requires_grad_()
    with pytest.raises(StateError, match=r"the bases of 1 layers train, and cannot be packed: 0"):
        qat.pack_base(lora)
    assert type(layer_of(lora).base_layer) is nn.Linear
    layer_of(lora).base_layer.weight.requires_grad_(False)
    qat.pack_base(lora)
    with pytest.raises(StateError, match="pack it once"):
        qat.pack_base(lora)
    with pytest.raises(StateError, match=r"its base is packed.*qat.freeze merges it"):
        lora.merge_adapter()


def test_a_trained_model_is_not_packed() -> None:
    model = adapted()
    qat.prepare(model, INT4)
    train(model, 1)
    with pytest.raises(StateError, match="was trained over its float base, which packing changes"):
        qat.pack_base(model)
