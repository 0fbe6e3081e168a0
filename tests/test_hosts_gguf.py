"""GGUF files of language models: four-way equality, seven architectures, and what verification finds."""

from __future__ import annotations

import struct
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
from tests.exports import forge_files
from tests.helpers import same_bits, tiny_model, tokens

TYPES = ("q8_0", "q4_0", "q4_1")
IDS = {"input_ids": tokens()}
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "Qwen2ForCausalLM": _SIZES,
    "Qwen3ForCausalLM": _SIZES | {"head_dim": 32},
    "Phi3ForCausalLM": _SIZES | {"rope_parameters": _ROTARY},
    "Starcoder2ForCausalLM": _SIZES,
    "StableLmForCausalLM": _SIZES | {"use_qkv_bias": True},
    "GPT2LMHeadModel": {"vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def prepared(model: nn.Module, algorithm: qat.Algorithm | None = None, **spec: Any) -> nn.Module:
    qat.prepare(model, qat.QuantSpec(**spec), target="gguf", algorithm=algorithm or qat.StraightThrough())
    return model


def exported(directory: Path, model: nn.Module | None = None, **spec: Any) -> nn.Module:
    model = prepared(model or tiny_model("llama"), **({"weights": "q4_1"} | spec))
    qat.freeze(model, allow_unreached=True)
    qat.export(model, directory, example_inputs=IDS)
    return model


def stock(directory: Path, dtype: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    arguments = {"config": config, "dtype": getattr(torch, dtype)}
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", **arguments)


def stored(directory: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(directory / "model.gguf").tensors}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**IDS).logits  # type: ignore[no-any-return]


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


@pytest.mark.parametrize("ties", ["tied", "untied", "tied and quantized"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(tmp_path: Path, name: str, ties: str) -> None:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**ARCHITECTURES[name], tie_word_embeddings=ties != "untied")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # which are zeros and ones
                parameter.add_(0.1 * torch.randn(parameter.shape))
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
        (lambda: nn.Sequential(nn.Linear(64, 64)), "got a Sequential: use target 'transformers'"),
        (
            lambda: tiny_model("llama", hidden_act="relu"),
            "its config has hidden_act='relu', and GGUF's 'llama' computes",
        ),
        (
            lambda: tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "its config has rope_type='linear'",
        ),
    ],
    ids=["architecture", "plain module", "activation function", "rotary scaling"],
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


def forge(directory: Path, content: bytes) -> None:
    """Another content of the file, with its size and hash in the manifest."""
    (directory / "model.gguf").write_bytes(content)
    forge_files(directory)


@pytest.mark.parametrize(
    ("tensor", "byte", "finds"),
    [
        ("blk.0.ffn_up.weight", 5, "model.layers.0.mlp.up_proj: codes, weight differ"),
        ("blk.1.attn_k.weight", 0, "model.layers.1.self_attn.k_proj: scale, weight differ"),
        ("blk.1.attn_q.weight", 2, "model.layers.1.self_attn.q_proj: shift, weight differ"),
        ("output_norm.weight", 2, "model.norm.weight differs from what was exported"),
        ("token_embd.weight", 0, "model.embed_tokens.weight differs from what was exported"),
    ],
)
def test_a_changed_byte_is_found_behind_forged_hashes(tmp_path: Path, tensor: str, byte: int, finds: str) -> None:
    exported(tmp_path)
    at = stored(tmp_path)[tensor].data_offset + byte
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[at] ^= 1
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(qat.VerifyError, match=r"model.gguf has another content \(sha256\)"):
        qat.verify(tmp_path)
    forge(tmp_path, bytes(content))
    with pytest.raises(qat.VerifyError, match=finds):
        qat.verify(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_found_behind_forged_hashes(tmp_path: Path, share: float) -> None:
    exported(tmp_path)
    content = (tmp_path / "model.gguf").read_bytes()
    forge(tmp_path, content[: int(share * len(content))])
    with pytest.raises(qat.VerifyError, match=r"model\.gguf in .* is not a whole GGUF file"):
        qat.verify(tmp_path)
    with pytest.raises(qat.LoadError, match="is not a whole GGUF file"):
        qat.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "finds"),
    [
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_up.weighs", r"blk.0.ffn_up.weighs is unexpected"),
        (b"general.architecture", b"general.architecturf", r"does not say where its tensors lie"),
        (b"llama.attention.head_count_kv", b"llama.attention.head_count_kw", r"does not say where its tensors lie"),
    ],
    ids=["tensor", "architecture", "heads"],
)
def test_other_metadata_is_found_behind_forged_hashes(tmp_path: Path, old: bytes, new: bytes, finds: str) -> None:
    exported(tmp_path)
    forge(tmp_path, (tmp_path / "model.gguf").read_bytes().replace(old, new))
    with pytest.raises(qat.VerifyError, match=finds):
        qat.verify(tmp_path)


def test_the_card_shows_a_load_that_works(tmp_path: Path) -> None:
    model = exported(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"directory": str(tmp_path)}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))


@pytest.mark.parametrize(
    ("place", "form", "value"),
    [
        (0, "<I", 0),
        (4, "<I", 9),
        (8, "<Q", 1 << 60),
        (16, "<Q", 1 << 60),
        (24, "<Q", (1 << 64) - 1),
        (24, "<Q", 1 << 40),
    ],
    ids=["magic", "version", "tensors", "fields", "longest name", "long name"],
)
def test_a_header_that_tells_of_more_than_the_file_has(tmp_path: Path, place: int, form: str, value: int) -> None:
    exported(tmp_path)
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    struct.pack_into(form, content, place, value)
    forge(tmp_path, bytes(content))
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=r"model\.gguf in .* is not a whole GGUF file"):
            verb(tmp_path)


@pytest.mark.parametrize("kind", [8, 9, 4, 77], ids=["texts", "arrays", "numbers", "unknown"])
def test_an_array_without_end(tmp_path: Path, kind: int) -> None:
    """The package gguf would read 2^40 elements of nothing from the end of the file."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, kind, 1 << 40)
    exported(tmp_path)
    forge(tmp_path, header)
    with pytest.raises(qat.VerifyError, match="is not a whole GGUF file"):
        qat.verify(tmp_path)
