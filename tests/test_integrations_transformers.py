"""The plug-in: what it loads, what it saves, and which arguments it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from optimum import quanto
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, QuantoConfig
from transformers.quantizers.quantizer_quanto import QuantoHfQuantizer

import qat.integrations.transformers  # noqa: F401 (registers the plug-in)
from qat.errors import LoadError
from tests.architectures import Architecture
from tests.packed_directories import (
    DTYPES,
    LLAMA,
    PACKED,
    T5,
    TYPES,
    UP,
    VIT,
    assert_same_model,
    assert_same_state,
    edit_config,
    edit_modules,
    edit_tensors,
    frozen,
    load,
    write,
)

BY_NAME = pytest.mark.parametrize("architecture", PACKED, ids=lambda architecture: architecture.model)


@BY_NAME
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_load_bit_exactly(
    architecture: Architecture, weights: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = frozen(architecture, weights, dtype)
    loaded = load(architecture, write(reference, tmp_path))
    assert_same_model(loaded, reference, architecture)


@BY_NAME
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static_activations_load_bit_exactly(
    architecture: Architecture, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = frozen(architecture, kind, dtype, activations=kind)
    loaded = load(architecture, write(reference, tmp_path))
    assert_same_model(loaded, reference, architecture)
    layer = next(module for module in loaded.modules() if isinstance(module, quanto.QLinear))
    assert set(layer._quantize_hooks) == {"input", "output"}
    assert layer.output_scale != 1


def test_auto_class_with_quanto_config_and_device_map(tmp_path: Path) -> None:
    reference = frozen(weights="int4", dtype=torch.bfloat16)
    directory = write(reference, tmp_path)
    for options in (
        {"quantization_config": QuantoConfig(weights="int4")},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": "cpu", "dtype": torch.bfloat16, "quantization_config": QuantoConfig(weights="int4")},
        {"dtype": "auto"},
        {"dtype": "bfloat16"},
    ):
        loaded = AutoModelForCausalLM.from_pretrained(directory, **options)
        assert_same_model(loaded, reference, LLAMA)


def test_int4_that_tinygemm_cannot_hold_stays_plain(tmp_path: Path) -> None:
    # freeze() raises on such a layer in bfloat16, so it is made in float32 and its scales are cast.
    reference = frozen(weights="int4", intermediate_size=392)
    directory = write(reference, tmp_path)

    def cast(state: dict[str, torch.Tensor]) -> None:
        state.update({key: value.bfloat16() for key, value in state.items() if value.dtype == torch.float32})

    edit_tensors(directory, cast)
    edit_config(directory, lambda config: config["quantization_config"]["qat"].update(dtype="bfloat16"))
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    classes = {
        name.rpartition(".")[2]: type(module.weight.data).__name__
        for name, module in loaded.named_modules()
        if isinstance(module, quanto.QLinear)
    }
    assert classes["gate_proj"] == "WeightQBitsTensor"
    assert classes["q_proj"] == "TinyGemmWeightQBitsTensor"
    assert torch.isfinite(loaded(**LLAMA.example(torch.bfloat16)).logits).all()


def test_exactly_the_declared_modules_are_replaced(tmp_path: Path) -> None:
    # No rule on names: one of two modules with the same last name, and a head that stock code skips.
    reference = frozen(
        weights="int8",
        overrides={"*.down_proj": "int4", "model.layers.1.mlp.up_proj": "float8"},
        exclude=("model.layers.0.self_attn.q_proj",),
    )
    loaded = AutoModelForCausalLM.from_pretrained(write(reference, tmp_path))
    assert_same_model(loaded, reference, LLAMA)
    assert type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert isinstance(loaded.lm_head, quanto.QLinear)


def test_a_base_model_and_a_model_with_a_head_load_each_other(tmp_path: Path) -> None:
    reference = frozen(weights="int8", exclude=())
    base = AutoModel.from_pretrained(write(reference, tmp_path / "with_head"))
    assert_same_state(base, reference.model)

    directory = write(base, tmp_path / "base")
    assert_same_state(AutoModel.from_pretrained(directory), base)
    headed = AutoModelForCausalLM.from_pretrained(directory)
    assert_same_state(headed.model, base)
    assert type(headed.lm_head) is torch.nn.Linear


def test_key_mapping_renames_packed_keys(tmp_path: Path) -> None:
    reference = frozen(weights="int4")
    directory = write(reference, tmp_path)

    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            state[key.replace("model.layers.", "model.blocks.")] = state.pop(key)

    edit_tensors(directory, rename)
    with pytest.raises(LoadError, match=r"do not hold what config\.json declares"):
        load(LLAMA, directory)
    assert_same_model(load(LLAMA, directory, key_mapping={r"^model\.blocks\.": "model.layers."}), reference, LLAMA)


def test_renamings_of_original_checkpoints_leave_own_names_alone(tmp_path: Path) -> None:
    # Llava's class has renamings for the names of its original checkpoint.
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=16,
            patch_size=8,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        text_config=transformers.LlamaConfig(**LLAMA.sizes),
        image_token_index=63,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    quanto.quantize(model, weights=quanto.qint8, exclude=["lm_head", "*embed*"])
    quanto.freeze(model)
    directory = write(model, tmp_path / "first")
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(directory)
    assert_same_state(loaded, model)
    loaded.save_pretrained(tmp_path / "second")
    assert_same_state(transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "second"), model)


def test_sharded_files(tmp_path: Path) -> None:
    reference = frozen(weights="int2")
    directory = write(reference, tmp_path)
    state = sorted(load_file(directory / "model.safetensors").items())
    (directory / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {}
    for index, name in enumerate(names):
        part = dict(state[index::2])
        save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_model(load(LLAMA, directory), reference, LLAMA)


@pytest.mark.parametrize("offset", [1, 24, 40])
def test_misaligned_codes_are_cloned(offset: int, tmp_path: Path) -> None:
    reference = frozen(weights="int8", dtype=torch.bfloat16)
    directory = write(reference, tmp_path)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    padding = b" " * ((offset - start) % 64)  # a longer header moves every tensor of the file
    path.write_bytes((start - 8 + len(padding)).to_bytes(8, "little") + content[8:start] + padding + content[start:])
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    for module in loaded.modules():
        if isinstance(module, quanto.QLinear):
            assert module.weight._data.data_ptr() % 64 == 0
    assert_same_model(loaded, reference, LLAMA)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_classes_are_those_of_the_loader_of_quanto(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = frozen(weights=weights, dtype=dtype)
    loaded = load(LLAMA, write(reference, tmp_path))
    other = frozen(weights=weights, dtype=dtype, exclude=("*",))
    quanto.requantize(other, load_file(tmp_path / "model.safetensors"), quanto.quantization_map(reference))
    assert_same_model(loaded, other, LLAMA)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [LLAMA, VIT], ids=["llama", "vit"])
def test_saving_again_keeps_everything(
    architecture: Architecture, weights: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = frozen(architecture, weights, dtype)
    first = write(reference, tmp_path / "first")
    load(architecture, first).save_pretrained(tmp_path / "second", max_shard_size="200KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert_same_model(load(architecture, tmp_path / "second"), reference, architecture)
    configs = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_layer_under_two_names_stays_one_object(tmp_path: Path) -> None:
    reference = frozen(weights="int8")
    directory = write(reference, tmp_path)

    class Shared(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.alias = self.model.layers[0].mlp.up_proj

    def twice(state: dict[str, torch.Tensor]) -> None:
        state.update({key.replace(UP, "alias"): value.clone() for key, value in state.items() if UP in key})

    for _ in range(2):
        loaded = Shared.from_pretrained(directory)
        assert loaded.alias is loaded.model.layers[0].mlp.up_proj
        assert_same_state(loaded.model, reference.model)
        # Once more with the layer stored and declared under both of its names.
        edit_tensors(directory, twice)
        edit_modules(directory, lambda modules: modules.update(alias=modules[UP]))


def test_outputs_stay_float_when_the_group_says_so(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8", activations="int8"), tmp_path)
    edit_config(directory, lambda config: config["quantization_config"]["qat"].update(quantize_outputs=False))
    layer = load(LLAMA, directory).model.layers[0].mlp.up_proj
    assert type(layer(torch.ones(2, 256))) is torch.Tensor


def test_float_models_go_to_the_stock_quantizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.sizes))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    assert type(loaded.hf_quantizer) is QuantoHfQuantizer
    assert type(loaded.config.quantization_config) is QuantoConfig
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    assert_same_state(loaded, model)
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="activations"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(activations="int8"))


def test_without_the_plug_in_a_load_fails_and_names_it(tmp_path: Path) -> None:
    directory = write(frozen(weights="int4"), tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "import qat.integrations.transformers" in done.stderr.splitlines()[-1]


def test_nothing_of_a_packed_layer_is_cast(tmp_path: Path) -> None:
    # T5's class keeps "wo" in float32 when it is served in float16.
    reference = frozen(T5, "int8", torch.float16, exclude=("lm_head",))
    assert_same_state(load(T5, write(reference, tmp_path)), reference)


def test_the_serving_dtype_is_that_of_the_group(tmp_path: Path) -> None:
    # save_pretrained writes the dtype of the first parameter into config.json, which may be kept in float32.
    reference = frozen(weights="int8", dtype=torch.bfloat16)
    directory = write(reference, tmp_path)
    edit_config(directory, lambda config: config.update(dtype="float32"))
    assert_same_model(AutoModelForCausalLM.from_pretrained(directory), reference, LLAMA)


@pytest.mark.parametrize("dtype", [torch.float32, "float16"], ids=str)
def test_another_dtype_is_refused(dtype: Any, tmp_path: Path) -> None:
    directory = write(frozen(weights="int8", dtype=torch.bfloat16), tmp_path)
    with pytest.raises(LoadError, match=r"dtype=torch\.float\d+: scales are packed in torch\.bfloat16"):
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with pytest.raises(LoadError, match="dtype"):
        load(LLAMA, directory, dtype=dtype)


def test_scales_of_another_dtype_are_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)
    edit_tensors(directory, lambda state: state.update({f"{UP}.weight._scale": state[f"{UP}.weight._scale"].half()}))
    with pytest.raises(LoadError, match=rf"{UP}\.weight\._scale is F16"):
        load(LLAMA, directory)


def test_a_packed_head_that_is_still_tied_is_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8", exclude=()), tmp_path)
    edit_config(directory, lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(LoadError, match="tie_word_embeddings"):
        load(LLAMA, directory)


def test_offloading_is_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)
    with pytest.raises(LoadError, match="device_map"):
        load(LLAMA, directory, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_packed_configuration_for_a_float_directory_is_refused(tmp_path: Path) -> None:
    packed = load(LLAMA, write(frozen(weights="int8"), tmp_path / "packed")).config.quantization_config
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.sizes)).save_pretrained(tmp_path / "float")
    with pytest.raises(LoadError, match="that of a packed directory, but this one is not"):
        load(LLAMA, tmp_path / "float", quantization_config=packed)


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"])
def test_a_float_tensor_that_no_file_holds_does_not_begin_afresh(key: str, tmp_path: Path) -> None:
    directory = write(frozen(), tmp_path)
    edit_tensors(directory, lambda state: state.pop(key))
    with pytest.raises(LoadError, match=f"{key} is in no file, and would begin afresh"):
        load(LLAMA, directory)


def test_another_class_may_have_a_part_that_no_file_holds(tmp_path: Path) -> None:
    directory = write(frozen(), tmp_path)
    model = transformers.LlamaForSequenceClassification.from_pretrained(directory)
    assert model.score.weight.shape[0] == 2
