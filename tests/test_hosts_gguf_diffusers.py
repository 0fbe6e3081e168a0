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
from qat.hosts import gguf_diffusers
from qat.layers import quantized_layers
from tests.diffusion_architectures import ARCHITECTURES
from tests.exports import forge_files
from tests.helpers import same_bits

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


def stored(directory: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(directory / "diffusion_pytorch_model.gguf").tensors}


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["q8_0", "q4_0", "q4_1"])
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
        (nn.Sequential(nn.Linear(32, 32)), "got a Sequential"),
    ):
        with pytest.raises(qat.TargetError, match=match):
            qat.prepare(model, qat.QuantSpec(weights="q8_0"), target="gguf-diffusers")
    with pytest.raises(qat.TargetError, match="activations='int8': GGUF files hold none"):
        prepared("FluxTransformer2DModel", "q8_0", activations="int8")


def test_the_card_shows_a_load_that_works(tmp_path: Path) -> None:
    model = exported(tmp_path, prepared("FluxTransformer2DModel"))
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"directory": str(tmp_path)}
    exec(code, names)
    example = ARCHITECTURES["FluxTransformer2DModel"].example(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(names["model"](**example)[0], model(**example)[0])


@pytest.mark.parametrize("share", [0.02, 0.999])
def test_a_truncated_file_is_found(tmp_path: Path, share: float) -> None:
    exported(tmp_path, prepared("FluxTransformer2DModel"))
    path = tmp_path / "diffusion_pytorch_model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(qat.VerifyError, match="bytes instead of"):
        qat.verify(tmp_path)
    forge_files(tmp_path)
    with pytest.raises(qat.VerifyError, match="is not a whole GGUF file"):
        qat.verify(tmp_path)
