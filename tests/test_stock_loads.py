"""Rows of docs/loaders.md that no other test proves: what loaders of other libraries hold is what was frozen.

Other rows are proven where their target or layer is tested; each has the mark `loads`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import GGUFQuantizationConfig
from optimum.quanto import QuantizedModelForCausalLM
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import qat
import qat.integrations.transformers
from tests.exports import IDS, TYPES, flux_inputs, small_flux, small_llama
from tests.helpers import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*[qQ]uanto.*deprecated:FutureWarning")


def plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def from_gguf(directory: Path) -> Any:
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", config=config, dtype=torch.bfloat16)


def flux(directory: Path) -> Any:
    return diffusers.AutoModel.from_pretrained(str(directory), dtype=torch.bfloat16)


def flux_from_gguf(directory: Path) -> Any:
    return diffusers.FluxTransformer2DModel.from_single_file(
        str(directory / "diffusion_pytorch_model.gguf"),
        config=str(directory),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),  # type: ignore[no-untyped-call]
        dtype=torch.bfloat16,
    )


@torch.no_grad()
def answer(model: Any) -> Tensor:
    if hasattr(model, "transformer_blocks"):
        return model(**flux_inputs("bfloat16")).sample  # type: ignore[no-any-return]
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def assert_equal(loaded: Any, model: Any) -> None:
    """Every stored tensor, codes included, and the outputs."""
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not same_bits(found[key], wanted[key])] == []
    assert same_bits(answer(loaded), answer(model))


@pytest.mark.loads("transformers", "QuantizedModelForCausalLM", weights=TYPES, mixed=True, equal="codes, outputs")
@pytest.mark.loads("quanto", "QuantizedModelForCausalLM", weights=TYPES, mixed=True, equal="codes, outputs")
@pytest.mark.loads("transformers", "plug-in for transformers", weights=TYPES, mixed=True, equal="codes, outputs")
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("target", ["transformers", "quanto"])
def test_a_language_model_of_two_types(target: str, weights: Any, tmp_path: Path) -> None:
    """An export of linear layers alone for `transformers` is read by quanto's own loader, too."""
    model: Any = small_llama()
    other = "int4" if weights == "int8" else "int8"
    spec = qat.QuantSpec(weights=weights, overrides={"*.down_proj": other})
    qat.prepare(model, spec, target=target, algorithm=qat.StraightThrough())
    qat.freeze(model, allow_unreached=True)
    qat.export(model, tmp_path / "out")
    assert_equal(QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "out"))._wrapped, model.eval())
    if target == "transformers":
        assert_equal(plain(tmp_path / "out"), model)


@pytest.mark.loads("compressed-tensors", "stock transformers", layers=("LoRA",), weights=("int8",), equal="outputs")
@pytest.mark.loads("gguf", "gguf_file", layers=("LoRA",), weights=("q8_0",), equal="outputs")
@pytest.mark.loads("diffusers", "stock diffusers", layers=("LoRA",), weights=("int8",), equal="outputs")
@pytest.mark.loads("gguf-diffusers", "GGUFQuantizationConfig", layers=("LoRA",), weights=("q8_0",), equal="outputs")
@pytest.mark.parametrize(
    ("target", "weights", "load"),
    [
        ("compressed-tensors", "int8", plain),
        ("gguf", "q8_0", from_gguf),
        ("diffusers", "int8", flux),
        ("gguf-diffusers", "q8_0", flux_from_gguf),
    ],
)
def test_a_merged_adapter(target: str, weights: Any, load: Callable[[Path], Any], tmp_path: Path) -> None:
    """Merged, a layer is stored as any other; that is seen for the loaders that `tests/test_adapters.py` leaves out."""
    model: Any = small_flux() if load in (flux, flux_from_gguf) else small_llama(intermediate_size=64)
    torch.manual_seed(1)
    before = answer(copy.deepcopy(model).eval().to(torch.bfloat16)).float()
    config = LoraConfig(r=4, target_modules=r".*\.(to_v|v_proj)", init_lora_weights="gaussian")
    inject_adapter_in_model(config, model, "ours")  # transformers' own add_adapter wants the newest peft
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    qat.prepare(model, qat.QuantSpec(weights=weights), target=target, algorithm=qat.StraightThrough())
    qat.freeze(model, allow_unreached=True)
    qat.export(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_bits(answer(loaded), answer(model.eval()))
    assert (answer(loaded).float() - before).abs().max() > 0.1 * before.abs().max()  # the adapter is in it
