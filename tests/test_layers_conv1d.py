"""GPT-2's layers: every projection quantized, trained, exported, and reloaded by the plug-in with equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import qat
from qat.errors import ExportError, SpecError
from qat.formats import QUANTO
from qat.layers import layer_class
from qat.layers.conv1d import QConv1D
from qat.quantizers.activation import ActivationQuantizer
from tests.helpers import WEIGHT_TYPES, same_bits

TOKENS = torch.arange(24).reshape(2, 12) % 64


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 64, **changes}
    return GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0)).eval()


def test_it_is_what_a_linear_layer_with_the_transposed_weight_is() -> None:
    torch.manual_seed(0)
    conv, linear = Conv1D(48, 64), nn.Linear(64, 48)
    linear.weight.data, linear.bias.data = conv.weight.data.t().clone(), conv.bias.data.normal_()
    models, x = (nn.Sequential(conv), nn.Sequential(linear)), torch.randn(2, 5, 64)
    found = []
    for model in models:
        # Target transformers takes models of transformers alone: so the layers are made by hand.
        cls: Any = layer_class(model[0])
        types = QUANTO.types("int8", "int8", torch.float32)
        weight = cls.effective_weight(model[0])
        quantizers = [ActivationQuantizer(types.activations, torch.float32, qat.Best()) for _ in range(2)]
        layer = cls.adopt(model[0], qat.LearnedAffine().make(weight, types.weights, torch.float32), *quantizers)
        quantizers[0].observe(x, weight)
        quantizers[1].observe(layer.compute(x, None))
        for quantizer in quantizers:
            quantizer.refresh()
        y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), cls.effective_weight(layer), layer))
    (y, weight, conv), (z, other, linear) = found
    assert type(conv) is QConv1D
    assert torch.equal(y, z)
    assert torch.equal(weight, other)
    assert torch.equal(conv.weight.grad.t(), linear.weight.grad)
    assert torch.equal(conv.bias.grad, linear.bias.grad)


@pytest.mark.loads("transformers", "plug-in for transformers", layers=("Conv1D",), weights=WEIGHT_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_gpt2_reloads_equal(tmp_path: Path, weights: Any, dtype: Any) -> None:
    model = gpt2()
    spec = qat.QuantSpec(weights=weights, dtype=dtype)
    report = qat.inspect(model, spec, target="transformers")
    assert {row.class_name for row in report.layers if row.weights} == {"Conv1D"}
    assert sum(row.weights is not None for row in report.layers) == 8
    qat.prepare(model, spec, target="transformers")
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = model.transformer.h[0].mlp.c_fc
    trained = layer.weight_quantizer.quantize(layer.weight.t(), torch.float32).value.detach()
    qat.freeze(model)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight.dequantize().float(), trained)
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": TOKENS})
    qat.verify(tmp_path / "out", reference=model)
    loaded = qat.load(tmp_path / "out")
    with torch.no_grad():
        assert same_bits(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.loads(
    "transformers", "qat.load", layers=("Conv1D",), weights=("int8",), activations="same", equal="outputs"
)
def test_activations_are_served_as_they_were_trained(tmp_path: Path) -> None:
    model, batches = gpt2(), [{"input_ids": TOKENS}]
    qat.calibrate(model, batches, spec=qat.QuantSpec(weights="int8", activations="int8"), target="transformers")
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits.float()
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=batches[0])
    with torch.no_grad():
        found = qat.load(tmp_path / "out")(input_ids=TOKENS).logits.float()
        assert same_bits(found, model(input_ids=TOKENS).logits.float())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("start", ["minmax", "clip", "output", "gptq", "best"])
def test_starts_read_the_transposed_weight(start: Any) -> None:
    model = gpt2()
    qat.prepare(model, qat.QuantSpec(weights="int4"), algorithm=qat.LearnedAffine(start=start), target="transformers")
    if start in ("output", "gptq", "best"):
        assert len(qat.calibrate(model, [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]).starts) == 8
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
    qat.freeze(model)
    with torch.no_grad():
        after = model.to(torch.bfloat16)(input_ids=TOKENS).logits.float()
    assert (after - before).abs().max() < 0.1 * before.abs().max()


def test_outliers_fold_into_the_norms_before() -> None:
    model = gpt2().double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.weight[3] *= 40
        expected = model(input_ids=TOKENS).logits
    report = qat.fold_outliers(
        model, [{"input_ids": TOKENS}], spec=qat.QuantSpec(activations="int8"), target="transformers"
    )
    assert len(report.groups) >= 4
    with torch.no_grad():
        assert (model(input_ids=TOKENS).logits - expected).abs().max() < 1e-9


def test_stock_loaders_cannot_hold_it() -> None:
    with pytest.raises(SpecError, match="the loader of target 'quanto' replaces no Conv1D: use target 'transformers'"):
        qat.inspect(gpt2(), qat.QuantSpec(weights="int8"))


def test_a_float_grid_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    qat.prepare(model, qat.QuantSpec(weights="int8", dtype="float32"), target="transformers")
    qat.freeze(model)
    with pytest.raises(ExportError, match=r"float_grid=True: a stock load replaces nn.Linear alone, not .*c_attn"):
        qat.export(model, tmp_path / "out", float_grid=True)
    assert not (tmp_path / "out").exists()
