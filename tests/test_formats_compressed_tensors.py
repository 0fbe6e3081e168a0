"""The target compressed-tensors from end to end: trained, frozen, exported, and loaded by stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
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
from tests.exports import IDS, altered, forge_hashes, rewrite, small_llama, stored_tensors
from tests.helpers import tiny_model

TARGET = "compressed-tensors"
MIXED: dict[str, Any] = {
    "weights": "int8",
    "overrides": {"*.mlp.*": "int4_g32", "*.o_proj": "int2_g64", "*.k_proj": "float8"},
}
TYPES = tuple(dict.fromkeys(qtype.name for qtype in COMPRESSED_TENSORS.qtypes.values()))
PACKED = tuple(name for name in TYPES if not name.endswith("_zp"))
ZERO_POINTS = tuple(name for name in TYPES if name.endswith("_zp"))
SPECS: dict[str, dict[str, Any]] = {
    **{name: {"weights": name} for name in TYPES},
    "int8 W8A8": {"weights": "int8", "activations": "int8"},
    "float8 W8A8": {"weights": "float8", "activations": "float8"},
    "mixed": MIXED,
}


def llama() -> Any:
    return small_llama(hidden_size=128, intermediate_size=128, num_attention_heads=2)


def exported(directory: Path, steps: int = 1, **spec: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model that was trained, frozen and exported, and what its layers' weights were in training."""
    model, wanted = llama(), qat.QuantSpec(**spec)
    qat.prepare(model, wanted, algorithm=qat.LearnedAffine(), target=TARGET)
    if wanted.activations:
        qat.calibrate(model, [{"input_ids": IDS}])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-3))
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_quantizer")}
    trained = {
        name: layer.weight_quantizer.quantize(layer.weight, wanted.torch_dtype).value for name, layer in layers.items()
    }
    qat.freeze(model, allow_unreached=not steps)
    qat.export(model, directory, example_inputs={"input_ids": IDS})
    return model, trained


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.loads("compressed-tensors", "stock transformers", weights=PACKED)
@pytest.mark.loads("compressed-tensors", "stock transformers", weights=ZERO_POINTS, holds="equal floats")
@pytest.mark.loads("compressed-tensors", "stock transformers", weights=("int8", "float8"), activations="same")
@pytest.mark.loads(
    "compressed-tensors", "stock transformers", weights=("int8", "float8", "int4_g32", "int2_g64"), mixed=True
)
@pytest.mark.loads("compressed-tensors", "qat.load", weights=TYPES)
@pytest.mark.loads("compressed-tensors", "qat.load", weights=("int8", "float8"), activations="same")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
    assert [group["weights"]["num_bits"] for group in groups] == [8, 2, 8, 4]
    assert groups[0]["targets"] == ["model.layers.0.self_attn.k_proj"]
    assert groups[-1] == {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    }
    assert "dequantize" not in fields


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


@pytest.mark.parametrize(
    ("kind", "key", "step"),
    [
        ("int4_g32", "weight_packed", 16),
        ("int4_g32", "weight_scale", 0.5),
        ("int4_g32_zp", "weight_packed", 1),
        ("int4_g32_zp", "weight_zero_point", 16),
        ("int8 W8A8", "weight", 1),
        ("int8 W8A8", "input_scale", 0.25),
    ],
)
def test_a_changed_number_is_found_behind_forged_hashes(kind: str, key: str, step: float, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS[kind])
    rewrite(directory / "model.safetensors", altered(f"model.layers.0.self_attn.q_proj.{key}", step))
    with pytest.raises(qat.VerifyError, match=r"model\.safetensors has another content"):
        qat.verify(directory)
    forge_hashes(directory)
    with pytest.raises(qat.VerifyError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        qat.verify(directory)


@pytest.mark.parametrize("kind", ["int4_g32", "int4_g32_zp", "int8 W8A8"])
def test_a_truncated_or_incomplete_directory_is_found(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS[kind])
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=r"has \d+ bytes instead of"):
            verb(directory)
    path.write_bytes(whole)
    rewrite(path, lambda tensors: {key: value for key, value in tensors.items() if ".q_proj.weight_scale" not in key})
    forge_hashes(directory)
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=r"q_proj\.weight_scale is missing"):
            verb(directory)


def test_a_changed_configuration_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    exported(directory, 0, **MIXED)
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"]["config_groups"]["group_3"]["weights"]["group_size"] = 64
    (directory / "config.json").write_text(json.dumps(fields))
    forge_hashes(directory, tensors=False)
    with pytest.raises(qat.VerifyError):
        qat.verify(directory)


def forge_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json, with its hash in the manifest."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    forge_hashes(directory, tensors=False)


@pytest.mark.parametrize("field", ["weights", "input_activations"])
@pytest.mark.parametrize(
    "change", [{"symmetric": False}, {"num_bits": 3}, {"dynamic": True}, None], ids=lambda change: str(change)
)
@pytest.mark.parametrize("kind", ["int8", "int8 W8A8", "int4_g32"])
def test_a_scheme_of_no_type_is_an_error_of_ours(kind: str, change: Any, field: str, tmp_path: Path) -> None:
    """The loader's own arithmetic fails on layers that such a scheme made."""
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS[kind])

    def edit(fields: dict[str, Any]) -> None:
        (group,) = fields["quantization_config"]["config_groups"].values()
        group[field] = None if change is None else group["weights"] | change

    forge_config(directory, edit)
    if change is not None or field == "weights" or kind == "int8 W8A8":
        with pytest.raises(qat.VerifyError):
            qat.verify(directory)
    try:
        model = qat.load(directory)  # by the types of the manifest
    except qat.LoadError:
        return
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored_value(directory))


def stored_value(directory: Path) -> torch.Tensor:
    """The weight of a layer as a directory's tensors have it, by the package alone."""
    tensors, name = stored_tensors(directory), "model.layers.0.mlp.up_proj"
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].to(scale.dtype) * scale
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    bits = 32 * tensors[f"{name}.weight_packed"].shape[1] // shape[1]
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], bits, shape)
    size = shape[1] // scale.shape[1]
    return codes.to(scale.dtype) * scale.repeat_interleave(size, 1)


def test_a_stored_shape_that_is_wrong_is_found(tmp_path: Path) -> None:
    directory, key = tmp_path / "out", "model.layers.0.self_attn.q_proj.weight_shape"
    exported(directory, 0, **SPECS["int4_g32"])
    rewrite(directory / "model.safetensors", lambda tensors: tensors | {key: torch.zeros_like(tensors[key])})
    forge_hashes(directory)
    with pytest.raises(qat.VerifyError, match="what was loaded cannot be compared: RuntimeError"):
        qat.verify(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_that_the_configuration_breaks_is_found_by_a_load(tied: bool, tmp_path: Path) -> None:
    """The loader leaves a head random that no file holds."""
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS["int8"])
    forge_config(directory, lambda fields: fields.update(tie_word_embeddings=tied))
    if tied:
        assert qat.load(directory).lm_head.weight is not None
        return
    with pytest.raises(qat.LoadError, match=r"the model has lm_head\.weight, which the files have not"):
        qat.load(directory)


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


def test_a_load_that_loses_activations_is_found(tmp_path: Path) -> None:
    exported(tmp_path / "out", 0, **SPECS["int8 W8A8"])
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    fields["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(fields))
    forge_hashes(tmp_path / "out", tensors=False)
    with pytest.raises(qat.VerifyError, match="is not a quantized layer after loading"):
        qat.verify(tmp_path / "out")
