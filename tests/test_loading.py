from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from qat.errors import LoadError, StateError
from qat.exporting import export
from qat.files.evidence import frozen_record
from qat.files.manifest import MANIFEST_NAME, file_record
from qat.loading import load
from tests.exports import (
    DTYPES,
    IDS,
    TYPES,
    frozen,
    small_llama,
    unpack_weight,
    unsealed,
)


def tiny_opt() -> OPTForCausalLM:
    """Here activations stay quantized from layer to layer."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=96,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    return OPTForCausalLM(config)


def plain(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    shared = nn.LayerNorm(21)
    return nn.Sequential(nn.Linear(37, 21, bias=bias), shared, nn.Linear(21, 21), shared, nn.Linear(21, 1))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(frozen(small_llama(), weights="int8", dtype="bfloat16"), tmp_path / "out")
    return tmp_path / "out"


def assert_same(live: nn.Module, loaded: nn.Module) -> None:
    """Every code, scale, shift, other tensor and buffer, and the outputs."""
    for name in frozen_record(live).layers:
        old, new = (model.get_submodule(name).weight for model in (live, loaded))
        assert type(old.data) is type(new.data), name
        for a, b in zip(unpack_weight(old), unpack_weight(new), strict=True):
            if a is None or b is None:
                assert a is b, name
            else:
                assert a.dtype == b.dtype, name
                assert torch.equal(a.float(), b.float()), name
    ours = dict(loaded.named_buffers())
    for name, buffer in live.named_buffers():
        assert buffer.dtype == ours[name].dtype, name
        assert torch.equal(buffer, ours[name]), name
    assert loaded.training is False
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    live.eval()
    with torch.no_grad():
        assert torch.equal(live(IDS).logits, loaded(IDS).logits)


@pytest.mark.loads("transformers", "qat.load", weights=TYPES, activations=("none", "int8"), equal="codes, outputs")
@pytest.mark.loads("quanto", "qat.load", weights=TYPES, activations=("none", "int8"), equal="codes, outputs")
@pytest.mark.parametrize("target", ["quanto", "transformers"])
@pytest.mark.parametrize("activations", [None, "int8"], ids=["weights-only", "activations"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", TYPES)
def test_a_loaded_model_is_the_frozen_one(
    tmp_path: Path, weights: str, dtype: str, activations: str | None, target: str
) -> None:
    model = frozen(small_llama(), target, weights=weights, dtype=dtype, activations=activations)
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out", verify_hashes=True)
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(model, loaded)


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_activations_that_stay_quantized_between_layers(tmp_path: Path, activations: str) -> None:
    model = frozen(tiny_opt(), weights=activations, dtype="bfloat16", activations=activations)
    export(model, tmp_path / "out")
    assert_same(model, load(tmp_path / "out"))


def test_shards(tmp_path: Path) -> None:
    model = frozen(small_llama(), weights="int8")
    export(model, tmp_path / "out", max_shard_size="40KB")
    assert_same(model, load(tmp_path / "out"))


def test_a_float_grid(tmp_path: Path) -> None:
    model = frozen(small_llama(), "transformers", weights="int8", dtype="float32")
    export(model, tmp_path / "out", float_grid=True)
    loaded = load(tmp_path / "out")
    for name in frozen_record(model).layers:
        codes = [unpack_weight(m.get_submodule(name).weight)[0] for m in (model, loaded)]
        assert torch.equal(*codes), name


@pytest.mark.loads("quanto", "qat.load, model", weights=TYPES, equal="outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", TYPES)
def test_a_plain_module_is_filled_in_place(tmp_path: Path, weights: str, dtype: str) -> None:
    model = frozen(plain(), weights=weights, dtype=dtype)
    export(model, tmp_path / "out")
    skeleton = plain()
    loaded = load(tmp_path / "out", model=skeleton)
    assert loaded is skeleton
    assert loaded[1] is loaded[3]  # type: ignore[index]
    x = torch.randn(5, 37).to(getattr(torch, dtype))
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_a_transformers_model_of_the_caller_is_filled_too(tmp_path: Path) -> None:
    model = frozen(small_llama(), "transformers", weights="int4", dtype="bfloat16")
    export(model, tmp_path / "out")
    assert_same(model, load(tmp_path / "out", model=small_llama()))


def test_the_record_comes_along(exported: Path, tmp_path: Path) -> None:
    loaded = load(exported)
    record = frozen_record(loaded)
    assert record.spec.weights == "int8"
    export(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_model_saves_again_only_if_its_librarys_own_loader_made_it(tmp_path: Path) -> None:
    for target in ("transformers", "quanto"):
        export(frozen(small_llama(), target, weights="int8"), tmp_path / target)
    stock, ours = (load(tmp_path / target) for target in ("transformers", "quanto"))
    stock.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert "quantization_config" in json.loads((tmp_path / "again" / "config.json").read_text())
    with pytest.raises(StateError, match="save_pretrained: this LlamaForCausalLM is frozen"):
        ours.save_pretrained(tmp_path / "random")  # type: ignore[operator]


def test_attention_and_generation_are_configured_as_exported(tmp_path: Path) -> None:
    model = small_llama(attn_implementation="eager")
    model.generation_config.max_new_tokens = 7
    export(frozen(model, weights="int8"), tmp_path / "out")
    loaded: Any = load(tmp_path / "out")
    assert loaded.config._attn_implementation == "eager"
    assert loaded.generation_config.max_new_tokens == 7


def test_codes_are_mapped_not_copied_and_misaligned_ones_are_copied(exported: Path) -> None:
    loaded = load(exported)
    for name in frozen_record(loaded).layers:
        assert loaded.get_submodule(name).weight._data.data_ptr() % 64 == 0


class TestErrors:
    def test_a_float_grid_fills_no_given_model(self, tmp_path: Path) -> None:
        export(
            frozen(small_llama(), "transformers", weights="int8", dtype="float32"), tmp_path / "out", float_grid=True
        )
        with pytest.raises(LoadError, match=r"float_grid=True.*leave model out"):
            load(tmp_path / "out", model=small_llama())

    def test_a_directory_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="is not a directory"):
            load(tmp_path / "nowhere")

    def test_a_directory_that_another_library_wrote(self, tmp_path: Path) -> None:
        small_llama().save_pretrained(tmp_path / "out")
        with pytest.raises(LoadError, match=f"has no {MANIFEST_NAME}.* a float model .* from_pretrained"):
            load(tmp_path / "out")

    @pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}'])
    def test_a_corrupt_manifest(self, exported: Path, text: str) -> None:
        (exported / MANIFEST_NAME).write_text(text)
        with pytest.raises(LoadError, match="is corrupt"):
            load(exported)

    def test_malformed_evidence(self, exported: Path) -> None:
        manifest = unsealed(exported)
        del manifest["frozen"]["layers"]["model.layers.0.mlp.up_proj"]["codes"]
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(LoadError, match=r"qat_manifest\.json .* is corrupt: frozen"):
            load(exported)

    def test_a_missing_file(self, exported: Path) -> None:
        (exported / "model.safetensors").unlink()
        with pytest.raises(LoadError, match=r"model\.safetensors is missing"):
            load(exported)

    def test_a_truncated_file(self, exported: Path) -> None:
        data = (exported / "model.safetensors").read_bytes()
        (exported / "model.safetensors").write_bytes(data[:-1])
        with pytest.raises(LoadError, match=f"has {len(data) - 1} bytes instead of {len(data)}"):
            load(exported)

    def test_another_content_of_a_small_file_is_found(self, exported: Path) -> None:
        path = exported / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(LoadError, match="another content"):
            load(exported)

    def test_keys_and_shapes_are_strict(self, exported: Path) -> None:
        manifest = unsealed(exported)
        manifest["tensors"]["extra"] = manifest["tensors"].pop("model.norm.weight")
        manifest["tensors"]["model.embed_tokens.weight"]["shape"] = [48, 512]
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(LoadError, match=r"(?s)extra is missing.*model\.norm\.weight is unexpected.*\[96, 256\]"):
            load(exported)

    def test_a_model_of_another_size(self, exported: Path) -> None:
        with pytest.raises(LoadError, match=r"layer model\.layers\.0\.mlp\.\w+ is .* in the model, .* in the files"):
            load(exported, model=small_llama(intermediate_size=64))

    def test_a_model_with_other_parts(self, exported: Path) -> None:
        with pytest.raises(LoadError, match="which the files have not"):
            load(exported, model=small_llama(num_hidden_layers=2))

    def test_a_bias_that_the_files_lack(self, tmp_path: Path) -> None:
        export(frozen(plain(bias=False), weights="int8"), tmp_path / "out")
        with pytest.raises(LoadError, match="has a bias in the model but none in the files"):
            load(tmp_path / "out", model=plain())

    def test_a_config_of_another_dtype(self, exported: Path) -> None:
        manifest = unsealed(exported)
        manifest["dtype"] = "float32"
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(LoadError, match=r"dtype is float32, and that of frozen\.spec bfloat16"):
            load(exported)

    def test_a_tensor_in_another_dtype_than_the_loader_holds_it_in(self, tmp_path: Path) -> None:
        model = frozen(small_llama(), weights="int8", dtype="bfloat16")
        model.get_submodule("model.norm").float()
        export(model, tmp_path / "out")
        with pytest.raises(LoadError, match=r"norm\.weight is F32 in the files, but the model holds it in torch"):
            load(tmp_path / "out")

    def test_a_directory_without_config_needs_the_model(self, tmp_path: Path) -> None:
        export(frozen(plain(), weights="int8"), tmp_path / "out")
        with pytest.raises(LoadError, match="pass the float model as model="):
            load(tmp_path / "out")

    def test_a_class_is_never_imported_by_a_name_in_a_file(self, exported: Path) -> None:
        manifest = unsealed(exported)
        manifest["model_class"] = "antigravity.Model"
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(LoadError, match=r"antigravity\.Model, which is neither"):
            load(exported)
        assert "antigravity" not in sys.modules

    def test_a_broken_config(self, exported: Path) -> None:
        config = json.loads((exported / "config.json").read_text())
        config["num_attention_heads"] = 7
        (exported / "config.json").write_text(json.dumps(config))
        manifest = unsealed(exported)
        manifest["files"]["config.json"] = file_record(exported / "config.json").model_dump()
        (exported / MANIFEST_NAME).write_text(json.dumps(manifest))
        with pytest.raises(LoadError):
            load(exported)

    def test_a_tensor_left_without_data(self, exported: Path) -> None:
        model = small_llama().to("meta")
        with pytest.raises(LoadError, match=r"rotary_emb\.inv_freq is still on the meta device"):
            load(exported, model=model)


def test_a_model_that_the_files_do_not_fill_is_refused(tmp_path: Path) -> None:
    """A model that lost layers: transformers builds those of the configuration, and leaves them random."""
    model: Any = small_llama(num_hidden_layers=2)
    model.model.layers = model.model.layers[:1]
    export(frozen(model, "transformers", weights="int8", dtype="float32"), tmp_path / "out")
    with pytest.raises(LoadError, match=r"model.layers.1.self_attn.q_proj.weight, which the files have not"):
        load(tmp_path / "out")
