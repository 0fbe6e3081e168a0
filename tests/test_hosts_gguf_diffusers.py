"""GGUF files of diffusion transformers, loaded by diffusers' own ``from_single_file``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from diffusers.loaders import single_file_model, single_file_utils
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from torch import nn

import qat
from qat.files.manifest import read_manifest
from qat.hosts import get_target, gguf_diffusers
from qat.layers import quantized_layers
from tests.diffusion_architectures import ARCHITECTURES
from tests.gguf_files import flipped, forge, gguf_file, rewritten, stored
from tests.helpers import same_bits, tiny_model

TYPES = ("q8_0", "q4_0", "q4_1")
WIDTH = 64  # of the tiny Flux


def prepared(name: str, weights: str = "q4_1", dtype: str = "bfloat16", **spec: Any) -> Any:
    model = ARCHITECTURES[name].build()
    qat.prepare(
        model,
        qat.QuantSpec.model_validate({"weights": weights, "dtype": dtype, **spec}),
        target="gguf-diffusers",
        algorithm=qat.StraightThrough(),
    )
    return model


def exported(directory: Path, model: Any, dtype: str = "bfloat16") -> Any:
    qat.freeze(model, allow_unreached=True)
    example = ARCHITECTURES[type(model).__name__].example(getattr(torch, dtype))
    qat.export(model, directory, example_inputs=example)
    return model


def stock(directory: Path, name: str, dtype: torch.dtype) -> Any:
    config = GGUFQuantizationConfig(compute_dtype=dtype)
    path = str(directory / "diffusion_pytorch_model.gguf")
    return getattr(diffusers, name).from_single_file(
        path, config=str(directory), quantization_config=config, dtype=dtype
    )


@pytest.fixture
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the published names be for a Flux of 64, on both sides: diffusers' conversion has the width as a number."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), names)
    entry = {"checkpoint_mapping_fn": names["convert_flux_transformer_checkpoint_to_diffusers"]}
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel", entry)
    monkeypatch.setattr(gguf_diffusers, "_FLUX_WIDTH", WIDTH)


@pytest.mark.loads("gguf-diffusers", "GGUFQuantizationConfig", weights=TYPES)
@pytest.mark.loads("gguf-diffusers", "qat.load", weights=TYPES, equal="outputs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", TYPES)
def test_flux_by_its_published_names_is_equal_in_all_four_forms(
    tmp_path: Path, narrow_flux: None, weights: str, dtype: str
) -> None:
    model, serving = prepared("FluxTransformer2DModel", weights, dtype), getattr(torch, dtype)
    layers = dict(quantized_layers(model))
    assert {"norm_out.linear", "transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.0.proj_mlp"} <= set(
        layers
    )
    trained = {name: layer.weight_quantizer.quantize(layer.weight, serving).value for name, layer in layers.items()}
    exported(tmp_path, model, dtype)
    loaded = stock(tmp_path, "FluxTransformer2DModel", serving)
    for name, value in trained.items():
        assert same_bits(model.get_submodule(name).frozen_weight().dequantize(), value)
        held = loaded.get_submodule(name)
        assert type(held).__name__ == "GGUFLinear"
        assert same_bits(dequantize_gguf_tensor(held.weight).to(serving), value)
    example = ARCHITECTURES["FluxTransformer2DModel"].example(serving)
    with torch.no_grad():
        assert torch.equal(loaded(**example)[0], model(**example)[0])
        assert torch.equal(qat.load(tmp_path)(**example)[0], model(**example)[0])
    assert qat.verify(tmp_path, reference=model).ok
    files = stored(tmp_path)
    assert files["double_blocks.0.img_attn.qkv.weight"].tensor_type.name == weights.upper()
    assert {"single_blocks.0.linear1.bias", "final_layer.adaLN_modulation.1.weight"} <= set(files)
    assert not any("transformer_blocks" in name for name in files)


@pytest.mark.parametrize(
    "name",
    ["QwenImageTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel"],
)
def test_other_classes_have_the_names_of_diffusers(tmp_path: Path, name: str) -> None:
    model = exported(tmp_path, prepared(name, "q4_0"))
    assert qat.verify(tmp_path, reference=model).ok
    config = gguf.GGUFReader(tmp_path / "diffusion_pytorch_model.gguf").fields["general.architecture"].contents()
    assert config == ("qwen_image" if "Qwen" in name else "diffusers")


@pytest.mark.loads("gguf-diffusers", "GGUFQuantizationConfig", weights=("q8_0", "q4_0"), mixed=True)
def test_a_flux_of_another_width_has_the_names_of_diffusers_too(tmp_path: Path) -> None:
    model = exported(tmp_path, prepared("FluxTransformer2DModel", "q8_0", overrides={"*.to_q": "q4_0"}))
    assert qat.verify(tmp_path, reference=model).ok
    assert "transformer_blocks.0.attn.to_q.weight" in stored(tmp_path)


def test_layers_of_one_published_tensor_are_float_together(narrow_flux: None) -> None:
    with pytest.raises(qat.SpecError, match=r"holds these layers in one tensor, so excluding .*attn.to_q.* would also"):
        prepared("FluxTransformer2DModel", exclude=("transformer_blocks.0.attn.to_q",))
    model = prepared("FluxTransformer2DModel", exclude=("single_transformer_blocks.0.*[qkvp]",))
    layers = {name for name, _ in quantized_layers(model) if name.startswith("single")}
    assert layers == {"single_transformer_blocks.0.norm.linear", "single_transformer_blocks.0.proj_out"}


def test_layers_of_one_published_tensor_have_one_type(narrow_flux: None) -> None:
    with pytest.raises(qat.SpecError, match=r"must be of one type: override 'transformer_blocks.0.attn.to_\[qkv\]'"):
        prepared("FluxTransformer2DModel", overrides={"transformer_blocks.0.attn.to_q": "q8_0"})
    model = prepared("FluxTransformer2DModel", overrides={"transformer_blocks.0.attn.to_[qkv]": "q8_0"})
    kinds = {name: layer.weight_quantizer.qtype.name for name, layer in quantized_layers(model)}
    assert kinds["transformer_blocks.0.attn.to_k"] == "q8_0"


def test_diffusers_rounds_in_float16_and_the_package_gguf_does_not(tmp_path: Path) -> None:
    """Why this target trains on a grid of its own. When it fails, diffusers computes like all others: drop the grid."""
    model = exported(tmp_path, prepared("FluxTransformer2DModel", "q4_1", "float32"), "float32")
    tensor = stored(tmp_path)["proj_out.weight"]
    wide = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    served = model.proj_out.frozen_weight().dequantize()
    assert not torch.equal(wide, served)
    assert torch.allclose(wide, served, rtol=0, atol=float(2**-10 * wide.abs().max()))


def test_what_cannot_be_loaded_is_refused() -> None:
    for model, match in (
        (
            ARCHITECTURES["DiTTransformer2DModel"].build(),
            "needs a class that diffusers loads from a single file, got a DiT",
        ),
        (nn.Sequential(nn.Linear(32, 32)), "got a Sequential: use target 'quanto'"),
        (tiny_model("llama"), "got a LlamaForCausalLM: use target 'gguf'"),
    ):
        with pytest.raises(qat.TargetError, match=match):
            qat.prepare(model, qat.QuantSpec(weights="q8_0"), target="gguf-diffusers")
    with pytest.raises(qat.TargetError, match="activations='int8': format 'gguf-float16' has none"):
        prepared("FluxTransformer2DModel", "q8_0", activations="int8")


def test_the_card_shows_a_load_that_works(tmp_path: Path) -> None:
    model = exported(tmp_path, prepared("FluxTransformer2DModel"))
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"directory": str(tmp_path)}
    exec(code, names)
    example = ARCHITECTURES["FluxTransformer2DModel"].example(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(names["model"](**example)[0], model(**example)[0])


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.999])
def test_a_truncated_file_is_found(tmp_path: Path, share: float, forged: bool) -> None:
    exported(tmp_path, prepared("FluxTransformer2DModel"))
    path = gguf_file(tmp_path)
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    if forged:
        forge(tmp_path, content)
    path.write_bytes(content)
    with pytest.raises(qat.VerifyError, match="is not a whole GGUF file" if forged else "bytes instead of"):
        qat.verify(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "byte", "finds"),
    [
        ("double_blocks.0.img_mlp.0.weight", 5, "transformer_blocks.0.ff.net.0.proj: codes, weight differ"),
        ("double_blocks.0.img_mlp.0.weight", 0, "transformer_blocks.0.ff.net.0.proj: scale, weight differ"),
        ("double_blocks.0.img_mlp.0.weight", 2, "transformer_blocks.0.ff.net.0.proj: shift, weight differ"),
        ("double_blocks.0.img_attn.qkv.weight", 4, "transformer_blocks.0.attn.to_q: codes, weight differ"),
        ("double_blocks.0.img_attn.qkv.weight", -1, "transformer_blocks.0.attn.to_v: codes, weight differ"),
        ("final_layer.adaLN_modulation.1.weight", 4, "norm_out.linear: codes, weight differ"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", 2, "attn.norm_q.weight differs from what was exported"),
    ],
)
def test_a_changed_byte_is_found_behind_forged_hashes(
    tmp_path: Path, narrow_flux: None, tensor: str, byte: int, finds: str
) -> None:
    exported(tmp_path, prepared("FluxTransformer2DModel"))
    forge(tmp_path, flipped(tmp_path, tensor, byte % stored(tmp_path)[tensor].n_bytes))
    with pytest.raises(qat.VerifyError, match=finds):
        qat.verify(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "finds"),
    [
        ("qat.original_names", False, "time_text_embed.timestep_embedder.linear_1.weight.blocks is missing"),
        ("general.architecture", "sd3", "time_text_embed.timestep_embedder.linear_1.weight.blocks is missing"),
        ("general.name", "Other", "general.name of .* is 'Other', and config.json"),
        ("general.file_type", 7, "general.file_type of .* is 7, and config.json"),
    ],
)
def test_other_metadata_is_found_behind_forged_hashes(
    tmp_path: Path, narrow_flux: None, key: str, value: Any, finds: str
) -> None:
    exported(tmp_path, prepared("FluxTransformer2DModel"))
    rewritten(tmp_path, lambda fields: fields.update({key: (value, *fields[key][1:])}))
    with pytest.raises(qat.VerifyError, match=finds):
        qat.verify(tmp_path)


def test_a_manifest_of_two_files_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, prepared("FluxTransformer2DModel"))
    manifest = read_manifest(tmp_path)
    name, kept = next(iter(manifest.tensors.items()))
    two = manifest.model_copy(
        update={"tensors": manifest.tensors | {name: kept.model_copy(update={"file": "other.gguf"})}}
    )
    container = get_target("gguf-diffusers").host.container
    with pytest.raises(qat.LoadError, match=r"one GGUF file, and its manifest names \['diffusion.*', 'other.gguf'\]"):
        container.reader(tmp_path, two)


def test_a_tensor_without_a_place_is_named_at_the_models_top_too() -> None:
    model = ARCHITECTURES["SD3Transformer2DModel"].build()
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    with pytest.raises(qat.TargetError, match="its tensor 'scale' has no place in a GGUF file"):
        qat.prepare(model, qat.QuantSpec(weights="q8_0"), target="gguf-diffusers")
