"""The target compressed-tensors from end to end: trained, frozen, exported, and loaded by stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qat
from qat.formats import COMPRESSED_TENSORS
from qat.formats.compressed_modules import FrozenLinear
from tests.architectures import ARCHITECTURES
from tests.compressed_exports import MIXED, PACKED, SPECS, TARGET, TYPES, ZERO_POINTS, exported, llama, logits
from tests.exports import IDS, small_llama, stored_tensors
from tests.helpers import tiny_model


@pytest.mark.loads("compressed-tensors", "stock transformers", weights=PACKED)
@pytest.mark.loads("compressed-tensors", "stock transformers", weights=ZERO_POINTS, holds="equal floats")
@pytest.mark.loads("compressed-tensors", "stock transformers", weights=("int8", "float8"), activations="same")
@pytest.mark.loads(
    "compressed-tensors", "stock transformers", weights=("int8", "float8", "int4_g32", "int2_g64"), mixed=True
)
@pytest.mark.loads("compressed-tensors", "qat.load", weights=TYPES)
@pytest.mark.loads("compressed-tensors", "qat.load", weights=("int8", "float8"), activations="same")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", SPECS)
def test_trained_frozen_exported_and_reloaded_are_one(kind: str, dtype: str, tmp_path: Path) -> None:
    model, trained = exported(tmp_path / "out", dtype=dtype, **SPECS[kind])
    assert all(torch.equal(model.get_submodule(name).weight, value) for name, value in trained.items())
    report = qat.verify(tmp_path / "out", reference=model)
    assert {check.name for check in report.checks} >= {"layers", "outputs", "reference layers", "reference outputs"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    held = stock.get_submodule("model.layers.0.self_attn.q_proj").state_dict()  # until the first forward
    assert ("weight_scale" in held) is not kind.endswith("_zp")
    assert torch.equal(logits(stock), logits(model))
    assert all(torch.equal(stock.get_submodule(name).weight, value) for name, value in trained.items())
    loaded = qat.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert all(isinstance(loaded.get_submodule(name), FrozenLinear) for name in trained)
    qat.export(loaded, tmp_path / "again", example_inputs={"input_ids": IDS})
    first, second = stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.loads("compressed-tensors", "CompressedTensorsConfig", weights=("float8", "int4_g32", "int4_g32_zp"))
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", ["int4_g32", "float8", "int4_g32_zp"])
def test_a_load_that_dequantizes_has_equal_weights_and_outputs(kind: str, tmp_path: Path) -> None:
    model, trained = exported(tmp_path / "out", weights=kind)
    config = CompressedTensorsConfig(dequantize=True)
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=config)
    assert all(torch.equal(floats.get_submodule(name).weight, value) for name, value in trained.items())
    assert torch.equal(logits(floats), logits(model))


def test_a_fresh_process_without_qat_loads_it(tmp_path: Path) -> None:
    model, _ = exported(tmp_path / "out", weights="int4_g64")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; torch.set_num_threads(int(sys.argv[3]));"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval();"
        "y = model(torch.arange(24).reshape(2, 12)).logits; assert 'qat' not in sys.modules; torch.save(y, sys.argv[2])"
    )
    arguments = [str(tmp_path / "out"), str(tmp_path / "y"), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y"), logits(model))


def test_what_config_json_says(tmp_path: Path) -> None:
    exported(tmp_path / "out", 0, **MIXED)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (fields["quant_method"], fields["format"], fields["ignore"]) == (
        "compressed-tensors",
        "mixed-precision",
        ["lm_head"],
    )
    groups = list(fields["config_groups"].values())
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert [group["targets"] for group in groups] == [
        [f"{attention}.q_proj", f"{attention}.v_proj"],
        [f"{attention}.k_proj"],
        [f"{attention}.o_proj"],
        [f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj"],
    ]
    assert [group["weights"]["num_bits"] for group in groups] == [8, 8, 2, 4]
    assert groups[-1]["format"] == "pack-quantized"
    assert groups[-1]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    }
    assert "dequantize" not in fields


def test_vllm_finds_the_type_of_its_fused_layers(tmp_path: Path) -> None:
    """By its rule: a layer's class name is looked for before the names of the layers that it fuses."""
    kinds = {"*.q_proj": "int4_g32", "*.k_proj": "int4_g32", "*.v_proj": "int4_g32"}
    exported(tmp_path / "out", 0, weights="int8", overrides=kinds)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = list(fields["config_groups"].values())
    assert not [target for group in groups for target in group["targets"] if target in "QKVParallelLinear"]
    parts = {f"model.layers.0.self_attn.{key}_proj" for key in "qkv"}
    (bits,) = {group["weights"]["num_bits"] for group in groups if parts & set(group["targets"])}
    assert bits == 4
    exported(tmp_path / "one", 0, weights="int8")
    fields = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in fields["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("spec", [MIXED, {"weights": "int8", "activations": "int8"}, {"weights": "int4_g32_zp"}])
def test_the_card_shows_a_load_that_works_without_qat(tmp_path: Path, spec: dict[str, Any]) -> None:
    model, _ = exported(tmp_path / "out", 0, **spec)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "qat" not in code
    names: dict[str, Any] = {"directory": str(tmp_path / "out")}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(model))


def test_static_activations_in_config_json_and_in_the_files(tmp_path: Path) -> None:
    exported(tmp_path / "out", 0, weights="int8", activations="int8", dtype="float16", overrides={"*.mlp.*": "float"})
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = fields["config_groups"].values()
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    assert [name.rpartition(".")[2] for name in fields["ignore"]] == ["gate_proj", "up_proj", "down_proj", "lm_head"]
    stored = stored_tensors(tmp_path / "out")
    below = {key.removeprefix("model.layers.0.self_attn.q_proj.") for key in stored if ".q_proj." in key}
    assert below == {"weight", "weight_scale", "input_scale"}
    assert stored["model.layers.0.self_attn.q_proj.input_scale"].shape == (1,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"weights": "int8", "activations": "int8", "quantize_outputs": True}, "quantize_outputs=True: loaders of"),
        ({"weights": "int4", "activations": "int8"}, r"int8 inputs beside int8 weights alone, got weights='int4'"),
        ({"weights": "float8", "activations": "int8"}, r"int8 inputs beside int8 weights alone, got weights='float8'"),
        ({"weights": "int4_g32_zp", "overrides": {"*.mlp.*": "int8"}}, "weights='int4_g32_zp': transformers reads"),
        ({"weights": "int4_g32_zp", "activations": "int8"}, "with one weight type and float activations alone"),
    ],
    ids=["outputs", "int4 with activations", "two kinds", "mixed zero points", "zero points with activations"],
)
@pytest.mark.parametrize("verb", [qat.inspect, qat.prepare])
def test_what_no_loader_reads_is_refused_before_training(verb: Any, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(qat.QatError, match=message):
        verb(llama(), qat.QuantSpec(**spec), target=TARGET)


@pytest.mark.parametrize("target", ["quanto", "transformers", "diffusers"])
@pytest.mark.parametrize("name", ["int4_g32", "int2_g64_zp"])
def test_other_targets_refuse_its_types_by_name(target: str, name: Any) -> None:
    message = rf"format 'quanto' has .*, got '{name}': choose one, or use target 'compressed-tensors'$"
    for spec in (qat.QuantSpec(weights=name), qat.QuantSpec(overrides={"*.q_proj": name})):
        with pytest.raises(qat.SpecError, match=message):
            qat.prepare(llama(), spec, target=target)


def test_a_row_that_its_group_does_not_divide_stays_float_and_is_named() -> None:
    report = qat.inspect(small_llama(), qat.QuantSpec(weights="int4_g64"), target=TARGET)
    reasons = {row.name.rpartition(".")[2]: row.reason for row in report.layers if row.weights is None}
    assert reasons["down_proj"] == "in_features (48) is not a multiple of the group size of int4_g64, 64"
    assert reasons.keys() == {"down_proj", "lm_head"}


def test_what_it_cannot_hold_stays_float_and_is_named() -> None:
    with pytest.raises(
        qat.TargetError, match="loads models of transformers alone, got a Sequential: use target 'quanto'"
    ):
        qat.prepare(nn.Sequential(nn.Linear(64, 64)), qat.QuantSpec(), target=TARGET)
    spec = qat.QuantSpec(overrides={"model.embed_tokens": "int8"})
    with pytest.raises(qat.TargetError, match="replaces no Embedding: use target 'transformers' or 'gguf'"):
        qat.inspect(llama(), spec, target=TARGET)


def test_a_quantized_head_is_untied(tmp_path: Path) -> None:
    model, trained = exported(tmp_path / "out", weights="int8", overrides={"lm_head": "int8"})
    assert "lm_head" in trained
    qat.verify(tmp_path / "out", reference=model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_trained_model_is_not_frozen_for_another_format(tmp_path: Path) -> None:
    model = tiny_model("llama")
    qat.prepare(model, qat.QuantSpec(weights="int8"), target=TARGET)
    with pytest.raises(qat.TargetError, match="its format 'quanto' has another arithmetic"):
        qat.freeze(model, target="transformers", allow_unreached=True)
    qat.freeze(model, allow_unreached=True)
    with pytest.raises(qat.TargetError, match="target 'transformers' would hold"):
        qat.export(model, tmp_path / "out", target="transformers")


@pytest.mark.parametrize("verb", [qat.inspect, qat.prepare])
def test_a_missing_package_is_named_before_training(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(qat.TargetError, match=r"needs a package that is missing: pip install 'qat\[compressed-tensors"):
        verb(model, qat.QuantSpec(weights="int4_g32"), target=TARGET)


def test_prepared_and_frozen_layers_are_told_from_float_ones() -> None:
    model = llama()
    qat.prepare(model, qat.QuantSpec(weights="int4_g32"), target=TARGET)
    qat.freeze(model, allow_unreached=True)
    layer = model.model.layers[0].mlp.up_proj
    assert COMPRESSED_TENSORS.owns(layer)
    assert "weights=int4_g32" in repr(layer)
    with pytest.raises(qat.StateError, match="prepared or frozen already"):
        qat.inspect(model, qat.QuantSpec(weights="int4_g32"), target=TARGET)


class TestClassesThatTheLoaderCannotHoldPacked:
    """Their ``_init_weights`` reads ``weight`` of linear layers, which packed ones have not."""

    def test_one_type_is_loaded_as_equal_floats(self, tmp_path: Path) -> None:
        model: Any = tiny_model("t5")
        qat.prepare(model, qat.QuantSpec(weights="int4_g32"), target=TARGET)
        qat.freeze(model, allow_unreached=True)
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
        qat.export(model, tmp_path / "out", example_inputs=inputs)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dequantize"] is True
        report = qat.verify(tmp_path / "out", reference=model)
        assert [check.name for check in report.checks if check.name in ("layers", "values")] == ["layers", "values"]
        with torch.no_grad():
            assert torch.equal(qat.load(tmp_path / "out")(**inputs).logits, model(**inputs).logits)

    def test_types_that_differ_are_refused_before_training(self) -> None:
        spec = qat.QuantSpec(weights="int4_g32", overrides={"*.q": "int8"})
        with pytest.raises(qat.TargetError, match=r"packed weights of several types .*: use one type, or float8"):
            qat.prepare(tiny_model("t5"), spec, target=TARGET)
        with pytest.raises(qat.TargetError, match="packed weights of several types"):
            qat.prepare(tiny_model("t5"), qat.QuantSpec(overrides={"*.q": "float8"}), target=TARGET)


def test_a_class_whose_checkpoints_the_loader_splits_is_refused() -> None:
    model = ARCHITECTURES["Dinov2ForImageClassification"].build()
    with pytest.raises(qat.TargetError, match=r"since it splits 'mlp\.weights_in\.weight' of checkpoints"):
        qat.inspect(model, qat.QuantSpec(), target=TARGET)
