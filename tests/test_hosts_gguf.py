"""GGUF files of language models: four-way equality, seven architectures, and what verification finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qat
from qat.layers import quantized_layers
from tests.exports import small_flux
from tests.gguf_files import stored
from tests.gguf_models import ARCHITECTURES, IDS, exported, of_class, prepared
from tests.helpers import same_bits, tiny_model, tokens

TYPES = ("q8_0", "q4_0", "q4_1")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def stock(directory: Path, dtype: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    arguments = {"config": config, "dtype": getattr(torch, dtype)}
    arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", **arguments)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**IDS).logits  # type: ignore[no-any-return]


@pytest.mark.loads("gguf", "gguf_file", weights=TYPES)
@pytest.mark.loads("gguf", "qat.load", weights=TYPES, equal="values, outputs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", TYPES)
def test_trained_frozen_exported_and_reloaded_are_equal(tmp_path: Path, weights: str, dtype: str) -> None:
    model: Any = prepared(tiny_model("llama"), qat.LearnedAffine(), weights=weights, dtype=dtype)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-2))
    for seed in range(2):
        model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    serving = getattr(torch, dtype)
    trained = {
        name: layer.weight_quantizer.quantize(layer.weight, serving).value for name, layer in quantized_layers(model)
    }
    qat.freeze(model)
    qat.export(model, tmp_path, example_inputs=IDS)
    loaded, again, files = qat.load(tmp_path), stock(tmp_path, dtype), stored(tmp_path)
    for name, value in trained.items():
        for held in (model, loaded):
            assert same_bits(held.get_submodule(name).frozen_weight().dequantize(), value)
        assert same_bits(again.get_submodule(name).weight.detach(), value)
    # Of the file, by the package alone, where no rows have another order.
    tensor = files["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == weights.upper()
    value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).to(serving)
    assert same_bits(value, trained["model.layers.1.mlp.down_proj"])
    assert torch.equal(logits(model), logits(loaded))
    assert torch.equal(logits(model), logits(again))
    report = qat.verify(tmp_path, reference=model)
    assert {"values", "layers", "outputs", "reference outputs"} <= {check.name for check in report.checks}


@pytest.mark.loads("gguf", "gguf_file", layers=("Conv1D",), weights=("q4_1",))
@pytest.mark.loads("gguf", "gguf_file", layers=("Linear", "embedding"), weights=("q8_0", "q4_1"), mixed=True)
@pytest.mark.parametrize(
    ("name", "ties"),
    [
        (name, ties)
        for name in ARCHITECTURES
        for ties in ("tied", "untied", "tied and quantized")
        if name != "StableLmForCausalLM" or ties == "untied"  # of which llama.cpp demands the head
    ],
)
def test_architectures(tmp_path: Path, name: str, ties: str) -> None:
    model = of_class(name, tie_word_embeddings=ties != "untied")
    overrides = {"*embed_tokens" if "GPT2" not in name else "*wte": "q8_0", "lm_head": "q8_0"}
    exported(tmp_path, model, overrides=overrides if ties == "tied and quantized" else {})
    assert qat.verify(tmp_path, reference=model).ok
    assert torch.equal(logits(stock(tmp_path, "bfloat16")), logits(model))
    files = stored(tmp_path)
    assert ("output.weight" in files) == (ties == "untied")
    assert all(tensor.tensor_type.name == "F32" for key, tensor in files.items() if len(tensor.shape) == 1)


def test_metadata_is_that_of_llama_cpp(tmp_path: Path) -> None:
    exported(tmp_path, tiny_model("llama", rope_theta=5000.0))
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF")}
    assert found == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "LlamaForCausalLM",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": pytest.approx(5000.0),
        "llama.vocab_size": 64,
        "tokenizer.ggml.model": "none",
    }


def test_rows_of_llamas_query_are_interleaved_as_llama_cpp_rotates_them(tmp_path: Path) -> None:
    model: Any = exported(tmp_path, dtype="float32")
    tensor, value = (
        stored(tmp_path)["blk.0.attn_q.weight"],
        model.model.layers[0].self_attn.q_proj.frozen_weight().dequantize(),
    )
    by_file = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    heads = value.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)  # convert_hf_to_gguf.py, LlamaModel.permute
    assert torch.equal(by_file, heads)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: tiny_model("opt"), "knows the conversion of GPT2LMHeadModel, LlamaForCausalLM.*got a OPTForCausalLM"),
        (lambda: small_flux(), "got a FluxTransformer2DModel: use target 'gguf-diffusers'"),
        (lambda: nn.Sequential(nn.Linear(64, 64)), "got a Sequential: use target 'quanto'"),
        (
            lambda: tiny_model("llama", hidden_act="relu"),
            "its config has hidden_act='relu', and GGUF's 'llama' computes",
        ),
        (
            lambda: tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "its config has rope_type='linear'",
        ),
        (
            lambda: of_class("Phi3ForCausalLM", sliding_window=32),
            "has sliding_window=32, and GGUF's 'phi3' computes None alone: .* or train the model with sliding_window=N",
        ),
        (lambda: of_class("StableLmForCausalLM", tie_word_embeddings=True), "its config has tie_word_embeddings=True"),
        (lambda: of_class("Qwen2ForCausalLM", head_dim=32), "its config has head_dim=32, .* computes 16 alone"),
    ],
    ids=[
        "architecture",
        "diffusers",
        "plain module",
        "activation function",
        "rotary scaling",
        "window",
        "no head",
        "size of heads",
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_at_prepare(model: Any, match: str) -> None:
    with pytest.raises(qat.TargetError, match=match):
        qat.prepare(model(), qat.QuantSpec(weights="q8_0"), target="gguf")


def test_a_float_grid_is_refused(tmp_path: Path) -> None:
    model = prepared(tiny_model("llama"), weights="q8_0", dtype="float32")
    qat.freeze(model, allow_unreached=True)
    with pytest.raises(qat.ExportError, match="no stock load of this target quantizes"):
        qat.export(model, tmp_path / "out", float_grid=True)
    assert not (tmp_path / "out").exists()


def test_another_target_serves_other_values(tmp_path: Path) -> None:
    model = prepared(tiny_model("llama"), weights="q8_0")
    with pytest.raises(qat.TargetError, match="its format 'quanto' has another arithmetic"):
        qat.freeze(model, target="transformers")


def test_an_export_again_of_what_was_loaded_is_the_same_file(tmp_path: Path) -> None:
    exported(tmp_path / "one")
    qat.export(qat.load(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "one" / "model.gguf").read_bytes() == (tmp_path / "two" / "model.gguf").read_bytes()


def test_a_load_asks_for_floats_whatever_kernels_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    exported(tmp_path)
    asked, read = [], GgufHfQuantizer.read_header

    def noting(self: Any, file: str) -> None:
        asked.append(self.quantization_config.dequantize)
        read(self, file)

    monkeypatch.setattr(GgufHfQuantizer, "read_header", noting)
    assert qat.verify(tmp_path).ok
    stock(tmp_path, "bfloat16")
    transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert asked == [True, True, False]


def test_the_card_shows_a_load_that_works(tmp_path: Path) -> None:
    model = exported(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"directory": str(tmp_path)}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))
