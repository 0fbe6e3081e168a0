from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import qat
from qat.errors import ExportError, LoadError, QatError, TargetError
from qat.files.manifest import MANIFEST_NAME, read_manifest
from qat.hosts import get_target
from qat.hosts.targets import TARGETS
from qat.loading import fill, skeleton
from tests.diffusion_architectures import ARCHITECTURES
from tests.exports import IDS, frozen, small_llama


def exported(path: Path, target: str, **spec: Any) -> Path:
    model = frozen(small_llama(tie_word_embeddings=False, intermediate_size=64), target, **spec)
    qat.export(model, path, example_inputs={"input_ids": IDS}, config={"recipe": "mine"})
    return path


def values(path: Path) -> dict[str, torch.Tensor]:
    """What each layer of a directory dequantizes to, by its format, and every other tensor."""
    manifest = read_manifest(path)
    model = skeleton(path, manifest)
    fill(model, path, manifest, torch.device("cpu"))
    format = get_target(manifest.target).format
    layers = {name: format.values(model.get_submodule(name)) for name in manifest.frozen.layers}
    inside = tuple(f"{name}." for name in layers)
    return layers | {name: t for name, t in model.state_dict().items() if not name.startswith(inside)}


@pytest.mark.parametrize(
    ("source", "weights", "dtype", "target", "becomes"),
    [
        ("transformers", "int8", "bfloat16", "compressed-tensors", "int8"),
        ("quanto", "int8", "float16", "compressed-tensors", "int8"),
        ("transformers", "float8", "float32", "compressed-tensors", "float8"),
        ("compressed-tensors", "int8", "bfloat16", "transformers", "int8"),
        ("compressed-tensors", "float8", "bfloat16", "quanto", "float8"),
        ("transformers", "int8", "bfloat16", "gguf", "q8_0"),
        ("compressed-tensors", "int4_g32", "bfloat16", "gguf", "q4_0"),
        ("gguf", "q4_0", "float16", "compressed-tensors", "int4_g32"),
        ("transformers", "int4", "bfloat16", "quanto", "int4"),
        ("quanto", "int2", "bfloat16", "transformers", "int2"),
    ],
)
def test_every_value_is_the_trained_one(
    tmp_path: Path, source: str, weights: str, dtype: str, target: str, becomes: str
) -> None:
    first = exported(tmp_path / "a", source, weights=weights, dtype=dtype)
    qat.convert(first, tmp_path / "b", target=target)
    assert qat.verify(tmp_path / "b").ok
    before, after = read_manifest(first), read_manifest(tmp_path / "b")
    assert {layer.weights for layer in after.frozen.layers.values()} == {becomes}
    assert after.frozen.spec.weights == becomes
    for name, layer in before.frozen.layers.items():
        assert after.frozen.layers[name].weight == layer.weight, name  # the digest of the trained value
    old, new = values(first), values(tmp_path / "b")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name].float(), new[name].float()) for name in old)
    assert after.config == {"recipe": "mine"}
    assert any(f"converted from an export for target {source!r}" in note for note in after.notes)


def test_the_stock_loader_reads_a_converted_directory(tmp_path: Path) -> None:
    first = exported(tmp_path / "a", "transformers", weights="int8", dtype="float32")
    qat.convert(first, tmp_path / "b", target="compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    assert torch.allclose(loaded(IDS).logits, qat.load(first)(IDS).logits, atol=1e-5)


def test_mixed_types_and_float_layers_keep_their_place(tmp_path: Path) -> None:
    overrides = {"*.down_proj": "float8", "*.q_proj": "float", "lm_head": "int8"}
    first = exported(tmp_path / "a", "transformers", weights="int8", overrides=overrides)
    qat.convert(first, tmp_path / "b", target="compressed-tensors")
    assert qat.verify(tmp_path / "b").ok
    layers = read_manifest(tmp_path / "b").frozen.layers
    assert layers["model.layers.0.mlp.down_proj"].weights == "float8"
    assert layers["lm_head"].weights == "int8"
    assert "model.layers.0.self_attn.q_proj" not in layers


def test_layers_that_the_new_target_would_quantize_too_stay_float(tmp_path: Path) -> None:
    """quanto's kernel for bfloat16 on a CPU cannot run rows of 36; the other loader has no such kernel."""
    model = frozen(small_llama(tie_word_embeddings=False, intermediate_size=36), "transformers", weights="int8")
    qat.export(model, tmp_path / "a")
    qat.convert(tmp_path / "a", tmp_path / "b", target="compressed-tensors")
    assert qat.verify(tmp_path / "b").ok
    before, after = (read_manifest(tmp_path / name).frozen for name in "ab")
    assert before.layers.keys() == after.layers.keys()
    assert "model.layers.0.mlp.down_proj" not in after.layers
    assert "model.layers.0.mlp.down_proj" in qat.inspect(small_llama(intermediate_size=36), before.spec).left_float


@pytest.mark.parametrize(
    ("source", "weights", "dtype", "target", "becomes"),
    [
        ("diffusers", "int8", "bfloat16", "gguf-diffusers", None),  # whose float16 product rounds once more
        ("diffusers", "int8", "float16", "gguf-diffusers", "q8_0"),
        ("gguf-diffusers", "q4_0", "bfloat16", "gguf-diffusers", "q4_0"),
        ("gguf-diffusers", "q4_1", "float16", "diffusers", None),
    ],
)
def test_a_diffusion_transformer(
    tmp_path: Path, source: str, weights: str, dtype: str, target: str, becomes: str | None
) -> None:
    architecture = ARCHITECTURES["FluxTransformer2DModel"]
    short = ("*.linear_1", "x_embedder")  # rows that are no whole number of blocks, and their namesakes
    spec = qat.QuantSpec.model_validate({"weights": weights, "dtype": dtype, "exclude": short})
    model = architecture.build()
    qat.prepare(model, spec, target=source, algorithm=qat.StraightThrough())
    qat.freeze(model, allow_unreached=True)
    qat.export(model, tmp_path / "a", example_inputs=architecture.example(getattr(torch, dtype)))
    if becomes is None:
        with pytest.raises(TargetError, match="has no type with the values of"):
            qat.convert(tmp_path / "a", tmp_path / "b", target=target)
        return
    qat.convert(tmp_path / "a", tmp_path / "b", target=target)
    assert qat.verify(tmp_path / "b").ok
    assert {layer.weights for layer in read_manifest(tmp_path / "b").frozen.layers.values()} == {becomes}


def test_files_of_a_processor_are_copied_and_no_others(tmp_path: Path) -> None:
    class Processor:
        def save_pretrained(self, directory: str) -> None:
            (Path(directory) / "preprocessor_config.json").write_text("{}")

    model = frozen(small_llama(), "transformers", weights="int8")
    qat.export(model, tmp_path / "a", processor=Processor(), max_shard_size="100KB")
    qat.convert(tmp_path / "a", tmp_path / "b", target="compressed-tensors")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    fixed = {"README.md", "config.json", "generation_config.json", MANIFEST_NAME}
    assert names == {*fixed, "model.safetensors", "preprocessor_config.json"}
    assert qat.verify(tmp_path / "b").ok


def test_a_plain_module_and_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = frozen(BertForSequenceClassification(config), "compressed-tensors", weights="float8")
    qat.export(model, tmp_path / "a", example_inputs={"input_ids": IDS})
    qat.convert(tmp_path / "a", tmp_path / "b", target="transformers")
    assert qat.verify(tmp_path / "b").ok
    plain = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    qat.export(frozen(nn.Sequential(*plain), weights="int4"), tmp_path / "c")
    qat.convert(tmp_path / "c", tmp_path / "d", target="quanto", model=_plain())
    assert qat.verify(tmp_path / "d", model=_plain()).ok


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize(
    ("source", "spec", "target", "said"),
    [
        ("transformers", {"weights": "int4"}, "compressed-tensors", "has no type with the values of int4"),
        ("transformers", {"weights": "int4"}, "gguf", "has no type with the values of int4"),
        ("gguf", {"weights": "q4_1"}, "transformers", r"weights= one of \['float8', 'int2', 'int4', 'int8'\]"),
        ("gguf", {"weights": "q8_0"}, "compressed-tensors", "train the float model for its grid"),
        ("compressed-tensors", {"weights": "int4_g32_zp"}, "gguf", "has no type with the values of int4_g32_zp"),
        ("transformers", {"weights": "float8"}, "gguf", "has no type with the values of float8"),
        ("transformers", {"weights": "int8", "activations": "int8"}, "compressed-tensors", "int8 activations round"),
        ("transformers", {"weights": "int8"}, "diffusers", "loads models of diffusers, got a LlamaForCausalLM"),
        (
            "transformers",
            {"weights": "int8", "overrides": {"model.embed_tokens": "int8"}},
            "compressed-tensors",
            "model.embed_tokens",
        ),
    ],
)
def test_what_would_change_is_refused(
    tmp_path: Path, source: str, spec: dict[str, Any], target: str, said: str
) -> None:
    first = exported(tmp_path / "a", source, **spec)
    with pytest.raises(QatError, match=said):
        qat.convert(first, tmp_path / "b", target=target)
    assert not (tmp_path / "b").exists()


def test_a_scale_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Blocks of GGUF have float16 scales: that of a tiny weight would be another number there."""
    model = small_llama(tie_word_embeddings=False, intermediate_size=64)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-7)
    qat.export(frozen(model, "transformers", weights="int8"), tmp_path / "a")
    with pytest.raises(TargetError, match="has no type with the values of int8"):
        qat.convert(tmp_path / "a", tmp_path / "b", target="gguf")


def test_a_changed_directory_a_float_grid_and_a_full_destination_are_refused(tmp_path: Path) -> None:
    first = exported(tmp_path / "a", "transformers", weights="int8", dtype="float32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="full"):
        qat.convert(first, tmp_path / "full", target="quanto")
    data = bytearray((first / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (first / "model.safetensors").write_bytes(data)
    with pytest.raises(LoadError, match="another content"):
        qat.convert(first, tmp_path / "b", target="quanto")
    grid = frozen(small_llama(), "transformers", weights="int8", dtype="float32")
    qat.export(grid, tmp_path / "grid", float_grid=True)
    with pytest.raises(LoadError, match="float_grid=True"):
        qat.convert(tmp_path / "grid", tmp_path / "b", target="quanto")
    with pytest.raises(ExportError, match="is the directory itself"):
        qat.convert(first, first, target="quanto", overwrite=True)
    with pytest.raises(TargetError, match="must be one of"):
        qat.convert(first, tmp_path / "b", target="int8")
    assert not (tmp_path / "b").exists()


def test_the_target_may_be_the_same_and_every_target_answers(tmp_path: Path) -> None:
    first = exported(tmp_path / "a", "compressed-tensors", weights="int8", activations="int8")
    qat.convert(first, tmp_path / "b", target="compressed-tensors")
    assert qat.verify(tmp_path / "b").ok
    old, new = (json.loads((path / MANIFEST_NAME).read_text()) for path in (first, tmp_path / "b"))
    assert old["tensors"] == new["tensors"]
    for name in TARGETS.keys() - {"compressed-tensors"}:
        with pytest.raises(TargetError):
            qat.convert(first, tmp_path / "c", target=name)
