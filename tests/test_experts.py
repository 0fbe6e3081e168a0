"""Models with experts in 3-D parameters through the whole line: prepared, trained, frozen, exported, reloaded."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qat
import qat.integrations.transformers
from qat.errors import SpecError, StateError, TargetError
from qat.files.evidence import frozen_record
from qat.layers import quantized_layers
from tests.helpers import WEIGHT_TYPES, same_bits

TOKENS = torch.arange(40).reshape(2, 20) % 64
QUICK = qat.Automatic(start="minmax")  # the usual start searches for its range
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4},
    "GptOssForCausalLM": {"num_local_experts": 4},
    "DeepseekV3ForCausalLM": {
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "Llama4ForCausalLM": {"num_local_experts": 4, "intermediate_size_mlp": 96, "num_experts_per_tok": 1},
    "JetMoeForCausalLM": {"num_local_experts": 4, "kv_channels": 16},
    "GraniteMoeForCausalLM": {"num_local_experts": 4},
    "OlmoeForCausalLM": {"num_experts": 4},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "LongcatFlashForCausalLM": {
        "num_layers": 1,
        "num_hidden_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 64,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "head_dim": 16,
        "moe_topk": 2,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = SIZES | (MODELS | OTHERS)[name] | changes
    if name in ("DeepseekV3ForCausalLM", "JetMoeForCausalLM"):
        sizes.pop("head_dim")
    return cls(cls.config_class(**sizes)).eval()


def train(model: Any, spec: qat.QuantSpec, tokens: Tensor = TOKENS, **options: Any) -> qat.PrepareReport:
    report = qat.prepare(model, spec, target="transformers", algorithm=QUICK, **options)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return report


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.loads(
    "transformers", "plug-in for transformers", layers=("experts",), weights=WEIGHT_TYPES, equal="codes, outputs"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_experts_reload_equal(name: str, weights: Any, dtype: Any, tmp_path: Path) -> None:
    model = build(name)
    aside = sum(
        p.numel()
        for n, p in model.named_parameters()
        if any(k in n for k in ("embed", "lm_head", "gate.", "router", "norm"))
    )
    report = train(model, qat.QuantSpec(weights=weights, dtype=dtype)).inspection
    assert report.quantized_parameters >= 0.95 * (report.parameters - aside)
    layers: dict[str, Any] = dict(quantized_layers(model))
    path = next(name for name in layers if name.endswith("experts.2.down_proj"))
    layer = layers[path]
    weight = layer.effective_weight(layer)
    trained = layer.weight_quantizer.quantize(weight, getattr(torch, dtype)).value.detach()
    qat.freeze(model)
    frozen: Any = model.get_submodule(path)
    assert same_bits(frozen.value(), trained)
    owner: Any = model.get_submodule(path.rsplit(".", 2)[0])
    assert {p.ndim for p in owner.parameters(recurse=False)} <= {2}  # biases of GPT-OSS
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": TOKENS})
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert same_bits(logits(loaded), logits(model))
    found = loaded.state_dict()
    for key, value in model.state_dict().items():
        assert not isinstance(value, Tensor) or same_bits(found[key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_every_other_way_to_load_gives_the_same(name: str, tmp_path: Path) -> None:
    model = build(name)
    train(model, qat.QuantSpec(weights="int4", overrides={"*down_proj": "int8"}))
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs={"input_ids": TOKENS})
    qat.verify(tmp_path / "out", reference=model)
    loaded: Any = qat.load(tmp_path / "out")
    assert same_bits(logits(loaded), logits(model))
    assert same_bits(logits(qat.load(tmp_path / "out", model=build(name))), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert same_bits(logits(type(model).from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_reload_equal(name: str, tmp_path: Path) -> None:
    model = build(name)
    report = train(model, qat.QuantSpec(weights="int4", dtype="float32")).inspection
    assert not [other for other in report.others if len(other.shape) == 3 and min(other.shape) > 1]
    before = logits(model)
    qat.freeze(model)
    assert same_bits(logits(model), before)
    qat.export(model, tmp_path / "out")
    assert same_bits(logits(qat.load(tmp_path / "out")), before)


@pytest.mark.parametrize("form", ["eager", "batched_mm", "grouped_mm"])
def test_frozen_experts_run_in_every_form(form: str, tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    model.set_experts_implementation(form)
    train(model, qat.QuantSpec(weights="int8", dtype="float32"))
    before = logits(model)
    qat.freeze(model)
    assert same_bits(logits(model), before)
    qat.export(model, tmp_path / "out")
    loaded: Any = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", experts_implementation=form)
    assert same_bits(logits(loaded), before)
    assert same_bits(logits(qat.load(tmp_path / "out")), before)  # which learns it from the manifest


def test_an_expert_that_never_saw_a_token_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("MixtralForCausalLM")
    train(model, qat.QuantSpec(weights="int4", dtype="float32"), TOKENS[:1, :1])
    layers = dict(quantized_layers(model))
    idle = sorted({n.rsplit(".", 1)[0] for n, layer in layers.items() if "experts" in n and not layer.reached})
    assert len(idle) == 2
    with caplog.at_level(logging.WARNING, logger="qat"):
        qat.freeze(model)
    record = frozen_record(model)
    (note,) = [note for note in record.notes if "never saw a token" in note]
    assert note in caplog.text
    for name in idle:
        above, _, number = name.rpartition(".")
        assert f"{above} (" in note
        assert number in note
    qat.export(model, tmp_path / "out")
    assert "never saw a token" in (tmp_path / "out" / "README.md").read_text()


def test_an_expert_in_a_list_that_never_saw_a_token_is_named_too(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    config = transformers.SwitchTransformersConfig(**sizes, vocab_size=64, num_experts=4, num_sparse_encoder_layers=1)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    qat.prepare(model, qat.QuantSpec(weights="int8"), target="transformers")
    with torch.no_grad():
        model(input_ids=TOKENS[:1, :1], decoder_input_ids=TOKENS[:1, :1])
    qat.freeze(model)
    assert "3 experts never saw a token at all: encoder.block.0.layer.1.mlp.experts (" in caplog.text


@pytest.mark.parametrize("gradients", [False, True])
def test_an_evaluation_gives_no_expert_a_token_of_training(
    gradients: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("MixtralForCausalLM", num_local_experts=8).train()
    train(model, qat.QuantSpec(weights="int4", dtype="float32"), TOKENS[:1, 3:6])
    layers = [layer for name, layer in quantized_layers(model) if "experts" in name]
    idle = sum(not layer.reached for layer in layers) // 2
    with torch.set_grad_enabled(gradients):
        model.eval()(TOKENS)
    assert sum(not layer.reached for layer in layers) < 2 * idle
    monkeypatch.setattr("qat.freezing.several_processes", lambda: gradients)
    with caplog.at_level(logging.WARNING, logger="qat"):
        qat.freeze(model)
    known = ", as far as this rank knows" if gradients else ""
    assert f"{idle} experts never saw a token in training, and so learned nothing{known}: " in caplog.text
    assert "training never changed" not in caplog.text


def test_experts_that_were_gone_around_are_refused() -> None:
    model = build("MixtralForCausalLM", num_hidden_layers=2)
    qat.prepare(model, qat.QuantSpec(weights="int8"), target="transformers")
    model.model.layers[1].mlp.forward = lambda x: x
    logits(model)
    with pytest.raises(StateError, match=r"never ran with their quantized weight .*layers\.1\.mlp\.experts"):
        qat.freeze(model)


class _Largest(TorchDispatchMode):
    """The largest float tensor that operations make, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if type(leaf) is Tensor and leaf.is_floating_point() and leaf.device.type != "meta":
                self.nbytes = max(self.nbytes, leaf.nbytes)
        return made


def test_a_load_never_holds_the_float_experts(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM", num_local_experts=8, hidden_size=128, intermediate_size=128)
    whole = model.model.layers[0].mlp.experts.down_proj.nbytes // 2  # in bfloat16
    qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers", algorithm=QUICK)
    qat.freeze(model)
    qat.export(model, tmp_path / "out")
    for load in (qat.load, transformers.MixtralForCausalLM.from_pretrained):
        with _Largest() as largest:
            load(tmp_path / "out")
        assert largest.nbytes < whole, load


def test_an_unknown_forward_stays_float_and_is_named_with_its_share() -> None:
    model = build("MixtralForCausalLM")

    class MyExperts(nn.Module):
        def __init__(self, experts: Any) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    model.model.layers[0].mlp.experts = MyExperts(model.model.layers[0].mlp.experts)
    report = qat.inspect(model, qat.QuantSpec(weights="int8"), target="transformers")
    assert any("MyExperts" in note and "%" in note for note in report.notes), report.notes
    assert report.left_float["model.layers.0.mlp.experts.down_proj"] == (
        "3-D weight of MyExperts, whose forward is unknown: no quantized form"
    )
    assert "MyExperts, stays float" in str(report)


def test_routers_stay_float_by_default() -> None:
    report = qat.inspect(build("Llama4ForCausalLM"), qat.QuantSpec(weights="int8"), target="transformers")
    rows = {row.name: row for row in report.layers}
    router = rows["model.layers.0.feed_forward.router"]
    assert router.reason.startswith(("router: decides which expert a token goes to, float by default", "Llama4Router"))
    report = qat.inspect(build("Qwen2MoeForCausalLM"), qat.QuantSpec(weights="int8"), target="transformers")
    gate = {row.name: row for row in report.layers}["model.layers.0.mlp.shared_expert_gate"]
    assert gate.weights is None
    assert gate.reason == (
        "router: decides which expert a token goes to, float by default (include it by name to quantize it)"
    )
    named = qat.QuantSpec(weights="int8", include=("*shared_expert_gate",))
    report = qat.inspect(build("Qwen2MoeForCausalLM"), named, target="transformers")
    assert {row.name for row in report.layers if row.weights} == {"model.layers.0.mlp.shared_expert_gate"}


def test_all_experts_of_a_parameter_are_quantized_or_none() -> None:
    spec = qat.QuantSpec(weights="int8", exclude=("*experts.1.down_proj",))
    with pytest.raises(SpecError, match=r"1 of 4 experts of one parameter would stay float \(.*experts\.1\.down_proj"):
        qat.inspect(build("MixtralForCausalLM"), spec, target="transformers")


def test_types_may_differ_between_experts(tmp_path: Path) -> None:
    model = build("MixtralForCausalLM")
    train(model, qat.QuantSpec(weights="int4", dtype="float32", overrides={"*experts.[01].*": "int8"}))
    before = logits(model)
    qat.freeze(model)
    qat.export(model, tmp_path / "out")
    assert same_bits(logits(qat.load(tmp_path / "out")), before)


def test_target_quanto_refuses_experts_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = qat.inspect(build("MixtralForCausalLM"), qat.QuantSpec(weights="int8"))
    row = next(row for row in report.layers if "experts" in row.name)
    remedy = "use target 'transformers' or 'compressed-tensors'"
    assert row.reason == f"the loader of target 'quanto' replaces no experts in one parameter: {remedy}"
    llama4 = qat.inspect(build("Llama4ForCausalLM"), qat.QuantSpec(weights="int8")).layers
    assert {row.reason.rpartition(": ")[2] for row in llama4 if "experts" in row.name} == {"use target 'transformers'"}
    with pytest.raises(TargetError, match=r"overrides: '\*experts\*' names .*gate_up_proj and 5 more, but the loader"):
        qat.inspect(build("MixtralForCausalLM"), qat.QuantSpec(overrides={"*experts*": "int8"}))
    model = build("MixtralForCausalLM")
    qat.prepare(copy.deepcopy(model), qat.QuantSpec(weights="int8"))
    assert f"77.9% of the parameters stay float: {row.reason}" in caplog.text
    qat.prepare(model, qat.QuantSpec(weights="int8"), target="transformers")
    with pytest.raises(TargetError, match="its loader replaces no ExpertMatrix"):
        qat.freeze(model, target="quanto")
    qat.freeze(model)
    with pytest.raises(TargetError, match=r"cannot hold 8 of the quantized layers \(.*experts\.0\.gate_up_proj"):
        qat.export(model, tmp_path / "out", target="quanto")


def test_a_prepared_checkpoint_goes_on(tmp_path: Path) -> None:
    model, other = build("MixtralForCausalLM"), build("MixtralForCausalLM")
    train(model, qat.QuantSpec(weights="int4"))
    qat.prepare(other, qat.QuantSpec(weights="int4"), target="transformers", algorithm=QUICK)
    other.load_state_dict(model.state_dict())
    assert same_bits(logits(other), logits(model))


def test_a_checkpoint_under_the_names_of_original_files_is_refused(tmp_path: Path) -> None:
    model = build("Qwen3MoeForCausalLM")
    qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers")
    model.save_pretrained(tmp_path)
    with pytest.raises(StateError, match=r"quantizer of '.*experts.0.gate_up_proj', but not the parameter of its exp"):
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert not model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).missing_keys


def test_starts_from_data_leave_experts_at_clip(caplog: pytest.LogCaptureFixture) -> None:
    model = build("MixtralForCausalLM")
    report = qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers")
    assert "8 matrices of experts begin with 'clip'" in str(report)
    assert report.waiting == 4
    calibrated = qat.calibrate(model, [{"input_ids": TOKENS}])
    assert len(calibrated.starts) == 4
    with caplog.at_level(logging.WARNING, logger="qat"):
        qat.freeze(model, allow_unreached=True)
    assert "their own start needs data" not in caplog.text


def test_the_table_has_a_line_for_experts_that_are_alike() -> None:
    model = build("MixtralForCausalLM", num_hidden_layers=2)
    report = qat.inspect(model, qat.QuantSpec(weights="int4"), target="transformers")
    lines = [line.split() for line in str(report).splitlines() if ".mlp.experts" in line]
    assert [(line[0], line[1]) for line in lines] == [
        ("model.layers.*.mlp.experts.*.gate_up_proj", "x8"),
        ("model.layers.*.mlp.experts.*.down_proj", "x8"),
    ]
    assert len(report.layers) == 8 + 16 + 1
    assert json.dumps(report.to_json())


def test_experts_spread_over_processes_are_refused() -> None:
    model = build("MixtralForCausalLM")
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    report = qat.inspect(model, qat.QuantSpec(weights="int8"), target="transformers")
    assert {row.reason for row in report.layers if "experts" in row.name} == {
        "its experts are spread over processes (expert parallelism): prepare the model on one process"
    }
