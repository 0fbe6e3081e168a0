"""Packed experts under the names of published checkpoints: what is written, and what stock transformers makes of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

import qat
from qat.formats.compressed_modules import FrozenExpert
from qat.hosts.compressed_transformers import Names
from qat.layers import QExpert, quantized_layers
from tests.exports import altered, forge_hashes, rewrite, stored_tensors
from tests.helpers import same_bits
from tests.test_experts import QUICK, TOKENS, build, logits
from tests.tiny_transformers import tiny_transformers

TARGET = "compressed-tensors"
MODELS = (
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "LongcatFlashForCausalLM",
)
SPECS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "float8": {"weights": "float8", "dtype": "float32"},
    "int4_g32": {"weights": "int4_g32"},
    "int2_g32": {"weights": "int2_g32"},
}
TYPES = ("int8", "float8", "int4_g32", "int2_g32")
ACTIVE: dict[str, dict[str, Any]] = {
    "int8 W8A8": {"weights": "int8", "activations": "int8"},
    "float8 W8A8": {"weights": "float8", "activations": "float8", "dtype": "float16"},
}
MIXED: dict[str, Any] = {"weights": "float8", "overrides": {"*.experts.*": "int4_g32", "*.o_proj": "int8"}}


def exported(model: Any, directory: Path, **spec: Any) -> dict[str, Tensor]:
    """Train, freeze and export a model; what the matrices of its experts were in training, by name."""
    wanted, options = qat.QuantSpec(**spec), {"max_shard_size": 2000} if directory.name == "shards" else {}
    qat.prepare(model, wanted, target=TARGET, algorithm=QUICK)
    if wanted.activations is not None:
        qat.calibrate(model, [{"input_ids": TOKENS}])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {
        name: layer.weight_quantizer.quantize(layer.effective_weight(layer), wanted.torch_dtype).value.detach()
        for name, layer in quantized_layers(model)
        if isinstance(layer, QExpert)
    }
    qat.freeze(model, allow_unreached=True)
    qat.export(model, directory, example_inputs={"input_ids": TOKENS}, **options)
    return trained


def settings(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return fields


@pytest.mark.loads("compressed-tensors", "stock transformers", layers=("experts",), weights=TYPES, holds="equal floats")
@pytest.mark.loads("compressed-tensors", "qat.load", layers=("experts",), weights=TYPES)
@pytest.mark.filterwarnings("ignore:.*never saw a token")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(MODELS, SPECS), *itertools.product(("MixtralForCausalLM", "LongcatFlashForCausalLM"), ACTIVE)],
)
def test_trained_frozen_exported_and_reloaded_are_one(name: str, kind: str, tmp_path: Path) -> None:
    model, out, spec = build(name), tmp_path / "out", (SPECS | ACTIVE)[kind]
    trained = exported(model, out, **spec)
    assert trained
    assert all(same_bits(model.get_submodule(layer).value(), value) for layer, value in trained.items())
    assert qat.verify(out, reference=model).ok
    dtype = qat.QuantSpec(**spec).torch_dtype
    stock, info = type(model).from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    for layer, value in trained.items():
        owner, index, key = layer.rsplit(".", 2)
        assert same_bits(getattr(stock.get_submodule(owner), key)[int(index)], value), layer
    assert same_bits(logits(stock), logits(model))
    loaded = qat.load(out)
    assert all(isinstance(loaded.get_submodule(layer), FrozenExpert) for layer in trained)
    assert same_bits(logits(loaded), logits(model))
    qat.export(loaded, tmp_path / "again", example_inputs={"input_ids": TOKENS})
    first, second = stored_tensors(out), stored_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(same_bits(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "block", "matrices", "others"),
    [
        ("MixtralForCausalLM", "block_sparse_moe", ("w1", "w2", "w3"), ()),
        ("Qwen3MoeForCausalLM", "mlp", ("gate_proj", "down_proj", "up_proj"), ()),
        (
            "DeepseekV3ForCausalLM",
            "mlp",
            ("gate_proj", "down_proj", "up_proj"),
            ("gate.e_score_correction_bias", "shared_experts.down_proj.weight_shape"),
        ),
    ],
    ids=["Mixtral", "Qwen3-MoE", "DeepSeek-V3"],
)
def test_names_are_those_that_vllm_reads(
    name: str, block: str, matrices: tuple[str, ...], others: tuple[str, ...], tmp_path: Path
) -> None:
    trained = exported(build(name), tmp_path / "out", weights="int4_g32")
    stored, above = stored_tensors(tmp_path / "out"), f"model.layers.0.{block}."
    parts = ("packed", "scale", "shape")
    wanted = {f"experts.{i}.{matrix}.weight_{part}" for i in range(4) for matrix in matrices for part in parts}
    found = {key.removeprefix(above) for key in stored if key.startswith(above)}
    assert {key for key in found if key.startswith("experts.")} == wanted
    assert {"gate.weight", *others} <= found
    assert not [key for key in stored if "gate_up_proj" in key]
    (group, *_) = settings(tmp_path / "out")["config_groups"].values()
    assert group["targets"] == [rf"re:model\.layers\.\d+\.{block}\.experts\.\d+\..*"]
    assert {layer.rpartition(".")[2] for layer in trained} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("kind", ["int8", "float8", "int4_g32", "int2_g32"])
def test_the_package_compresses_each_matrix_into_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """In float32, where its quantization loses nothing."""
    trained = exported(build("MixtralForCausalLM"), tmp_path / "out", weights=kind, dtype="float32")
    (group, *_) = settings(tmp_path / "out")["config_groups"].values()
    scheme = QuantizationScheme(**group)
    compressor, stored = BaseCompressor.get_value_from_registry(group["format"]), stored_tensors(tmp_path / "out")
    for layer, whole in trained.items():
        index, key = layer.split(".")[-2:]
        values = whole.chunk(2) if key == "gate_up_proj" else (whole,)
        for value, name in zip(values, ("w1", "w3") if len(values) == 2 else ("w2",), strict=True):
            prefix = f"model.layers.0.block_sparse_moe.experts.{index}.{name}."
            found = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            given = {"weight": value, "weight_scale": found["weight_scale"]}
            theirs = compressor.compress(given, scheme)
            assert found.keys() == theirs.keys()
            assert all(same_bits(found[key], theirs[key]) for key in found)


def test_a_fresh_process_without_qat_loads_it(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM", num_local_experts=12)  # "10" sorts before "2"
    exported(model, tmp_path / "out", weights="int4_g32")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; torch.set_num_threads(int(sys.argv[3]));"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval();"
        "y = model(torch.arange(40).reshape(2, 20) % 64).logits; assert 'qat' not in sys.modules;"
        "torch.save(y, sys.argv[2])"
    )
    arguments = [str(tmp_path / "out"), str(tmp_path / "y"), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y"), logits(model))
    assert qat.verify(tmp_path / "out").ok


def test_matrices_of_one_expert_may_lie_in_several_files(tmp_path: Path) -> None:
    model = build("Qwen3MoeForCausalLM")
    exported(model, tmp_path / "shards", weights="int8")
    weights = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    places = [weights[f"model.layers.0.mlp.experts.0.{key}.weight_packed"] for key in ("gate_proj", "up_proj")]
    assert places[0] != places[1]
    assert qat.verify(tmp_path / "shards", reference=model).ok
    assert same_bits(logits(qat.load(tmp_path / "shards", model=build("Qwen3MoeForCausalLM"))), logits(model))


def test_experts_have_a_group_of_their_own_before_all_others(tmp_path: Path) -> None:
    model = build("DeepseekV3ForCausalLM")
    exported(model, tmp_path / "out", **MIXED)
    assert qat.verify(tmp_path / "out", reference=model).ok
    fields = settings(tmp_path / "out")
    experts, *others = fields["config_groups"].values()
    named, rest = sorted(others, key=lambda group: len(group["targets"]))
    assert (experts["format"], experts["weights"]["num_bits"]) == ("pack-quantized", 4)
    assert named["targets"] == ["model.layers.0.self_attn.o_proj"]
    assert "model.layers.0.self_attn.kv_b_proj" in rest["targets"]
    assert rest["weights"]["type"] == "float"
    assert "dequantize" not in fields
    assert not [name for name in fields["ignore"] if "experts" in name]


def test_experts_alone_may_be_quantized(tmp_path: Path) -> None:
    model = build("OlmoeForCausalLM")
    exported(model, tmp_path / "out", weights="int4_g32", overrides={"*self_attn*": "float"})
    assert [group["targets"][0][:3] for group in settings(tmp_path / "out")["config_groups"].values()] == ["re:"]
    assert qat.verify(tmp_path / "out", reference=model).ok


def test_the_scale_of_an_input_of_experts_stays_out_and_is_told() -> None:
    report = qat.inspect(build("MixtralForCausalLM"), qat.QuantSpec(weights="int8", activations="int8"), target=TARGET)
    activations = {row.name: row.activations for row in report.layers if row.weights is not None}
    assert {kind for name, kind in activations.items() if ".experts." in name} == {None}
    assert {kind for name, kind in activations.items() if ".experts." not in name} == {"int8"}
    (note,) = (note for note in report.notes if "keep float activations" in note)
    assert "(the loader of target 'compressed-tensors' quantizes no inputs of experts)" in note


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "JetMoeForCausalLM", "GraniteMoeForCausalLM"])
def test_experts_that_no_load_merges_stay_float_and_are_named(name: str, tmp_path: Path) -> None:
    model = build(name)
    report = qat.inspect(model, qat.QuantSpec(weights="int8"), target=TARGET)
    reason = f"transformers merges no packed experts of a {name} (conversion_mapping.py): use target 'transformers'"
    assert {row.reason for row in report.layers if row.class_name == "ExpertMatrix"} == {reason}
    assert any(f"stay float: {reason}" in warning for warning in report.warnings)
    assert not exported(model, tmp_path / "out", weights="int8")
    assert qat.verify(tmp_path / "out", reference=model).ok
    assert any(name.startswith("re:model") for name in settings(tmp_path / "out")["ignore"])  # vLLM asks for experts


def test_zero_points_of_experts_stay_out_and_are_named() -> None:
    report = qat.inspect(build("MixtralForCausalLM"), qat.QuantSpec(weights="int4_g32_zp"), target=TARGET)
    reasons = {row.reason for row in report.layers if row.class_name == "ExpertMatrix"}
    assert reasons == {
        "transformers drops the zero points of experts: use a type without _zp, or target 'transformers'"
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.down_proj": "int4_g32"}, r"reads all experts of a model by one scheme, so .* must be of one type"),
        ({"*.experts.0.*": "int4_g32"}, r"must be of one type: override '\*\.experts\.\[0-9\]\*' as a whole"),
        ({"*.experts.*.down_proj": "float"}, r"so excluding .* would also exclude .*: exclude all of '\*\.experts"),
    ],
    ids=["of a matrix", "of an expert", "float"],
)
def test_experts_of_several_types_are_refused_before_training(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(qat.SpecError, match=message):
        qat.inspect(build("MixtralForCausalLM"), qat.QuantSpec(weights="int8", overrides=overrides), target=TARGET)


def test_a_class_whose_experts_a_quantized_load_replaces_is_refused() -> None:
    with pytest.raises(qat.TargetError, match="replaces a Llama4TextExperts in a quantized load"):
        qat.inspect(build("Llama4ForCausalLM"), qat.QuantSpec(weights="int8"), target=TARGET)


@pytest.mark.parametrize(
    ("kind", "key", "step"),
    [("int4_g32", "w1.weight_packed", 16), ("int4_g32", "w3.weight_scale", 0.5), ("float8", "w2.weight_scale", 0.5)],
)
def test_a_changed_number_is_found_behind_forged_hashes(kind: str, key: str, step: float, tmp_path: Path) -> None:
    directory, layer = tmp_path / "out", "gate_up_proj" if key[1] in "13" else "down_proj"
    exported(build("MixtralForCausalLM"), directory, weights=kind)
    rewrite(directory / "model.safetensors", altered(f"model.layers.0.block_sparse_moe.experts.2.{key}", step))
    with pytest.raises(qat.VerifyError, match=r"model\.safetensors has another content"):
        qat.verify(directory)
    forge_hashes(directory, tensors=False)
    with pytest.raises(qat.VerifyError, match=rf"layers .*FAILED .*model\.layers\.0\.mlp\.experts\.2\.{layer}"):
        qat.verify(directory)


@pytest.mark.parametrize(
    ("part", "rows"), [("weight_scale", 0), ("weight_packed", 4)], ids=["missing", "fewer rows than its partner"]
)
def test_a_part_that_does_not_fit_is_found_before_a_load(part: str, rows: int, tmp_path: Path) -> None:
    exported(build("MixtralForCausalLM"), tmp_path / "out", weights="int4_g32")

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = f"model.layers.0.block_sparse_moe.experts.1.w3.{part}"
        tensors[key] = tensors[key][:rows].contiguous()
        return {name: tensor for name, tensor in tensors.items() if len(tensor)}

    rewrite(tmp_path / "out" / "model.safetensors", changed)
    forge_hashes(tmp_path / "out", tensors=False)
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=rf"experts\.1\.gate_up_proj\.{part} is missing"):
            verb(tmp_path / "out")


def test_a_load_of_experts_by_another_scheme_is_found(tmp_path: Path) -> None:
    exported(build("MixtralForCausalLM"), tmp_path / "out", weights="int8", overrides={"*.experts.*": "int4_g32"})
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    groups = fields["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["re:.*nothing"]
    path.write_text(json.dumps(fields))
    forge_hashes(tmp_path / "out", tensors=False)
    with pytest.raises(qat.VerifyError):
        qat.verify(tmp_path / "out")


def test_a_search_leaves_experts_their_one_type() -> None:
    model = build("MixtralForCausalLM")
    spec = qat.QuantSpec(dtype="float32", overrides={"*experts*": "int4_g32"})
    batches = [{"input_ids": TOKENS}]
    report = qat.search(model, spec, batches, budget="int8", types=("int4_g32", "int8"), target=TARGET)
    rows = qat.inspect(model, report.spec, target=TARGET).layers
    assert {row.weights for row in rows if ".experts." in row.name} == {"int4_g32"}


class TestNames:
    def test_a_published_name_leads_back_to_the_tensor(self) -> None:
        names = Names.of(build("MixtralForCausalLM"))
        assert names.stored("model.layers.0.mlp.gate.weight") == "model.layers.0.block_sparse_moe.gate.weight"
        assert names.stored("model.norm.weight") == "model.norm.weight"
        above = "model.layers.0.block_sparse_moe.experts.7"
        gate_up = (f"{above}.w1.weight", f"{above}.w3.weight")
        assert names.experts("model.layers.0.mlp.experts.gate_up_proj", 7) == gate_up
        assert names.experts("model.layers.0.mlp.experts.down_proj", 7) == (f"{above}.w2.weight",)
        assert names.experts("model.layers.0.self_attn.q_proj.weight", 7) == ()

    def test_they_are_gathered_once_for_a_model_and_let_it_go(self) -> None:
        import gc
        import weakref

        model = build("Qwen3MoeForCausalLM")
        assert Names.of(model) is Names.of(model)
        seen = weakref.ref(model)
        del model
        gc.collect()
        assert seen() is None

    def test_conversions_that_do_more_than_merge_are_none(self) -> None:
        gpt_oss: Any = build("GptOssForCausalLM")
        assert Names.of(gpt_oss).experts("model.layers.0.mlp.experts.gate_up_proj", 0) == ()
        ernie = transformers.Ernie4_5_VLMoeForConditionalGeneration
        with torch.device("meta"):
            model = ernie(ernie.config_class())
        name = next(name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj"))
        assert Names.of(model).experts(name, 0) == ()


def test_zero_points_beside_a_weight_that_is_kept_in_float32_are_refused() -> None:
    """Verification finds the cast, and a refusal before training is better."""
    model = tiny_transformers()["BeamForCausalLM"].build()
    spec = qat.QuantSpec(weights="int4_g32_zp")
    with pytest.raises(qat.SpecError, match=r"zero points while it loads, and then casts model\.layers\.1\.mlp\.gate"):
        qat.inspect(model, spec, target=TARGET)
    assert qat.inspect(model, spec.model_copy(update={"dtype": "float32"}), target=TARGET).quantized_share > 0.2
