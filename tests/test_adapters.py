"""Models with adapters through all verbs: what peft wraps is prepared, trained, merged, exported and reloaded equal."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import qat
from qat.adapters import adapters, without_peft
from qat.errors import SpecError, StateError
from qat.layers import QLinear
from qat.layers.lora import QLoraLinear
from tests.helpers import same_bits

TOKENS = {"input_ids": torch.arange(24).reshape(2, 12) % 64}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
INT4 = qat.QuantSpec(weights="int4")
SHAPES = {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (256, 64)}  # of layers of GPT-2
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False} | changes
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def adapted(model: Any = None, **config: Any) -> Any:
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": TaskType.CAUSAL_LM} | config
    model = get_peft_model(llama() if model is None else model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
    return model


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(steps):
        loss = model.train()(**TOKENS, labels=TOKENS["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.loads("transformers", "plug-in for transformers", layers=("LoRA",), weights=("int8",), activations="same")
@pytest.mark.loads("transformers", "plug-in for transformers", layers=("LoRA",), weights=("float8", "int4", "int2"))
@pytest.mark.loads("quanto", "QuantizedModelForCausalLM", layers=("LoRA",), weights=("int8",), activations="same")
@pytest.mark.loads("quanto", "QuantizedModelForCausalLM", layers=("LoRA",), weights=("float8", "int4", "int2"))
@pytest.mark.parametrize(
    ("types", "config"),
    [
        ({"weights": "int4"}, {}),
        ({"weights": "int8", "activations": "int8"}, {"target_modules": "all-linear"}),
        ({"weights": "int2"}, {"use_dora": True, "bias": "lora_only"}),
        ({"weights": "float8"}, {"use_rslora": True, "modules_to_save": ["lm_head"]}),
    ],
    ids=["int4", "int8-activations", "int2-dora", "float8-rslora-head"],
)
@pytest.mark.parametrize("target", ["transformers", "quanto"])
def test_a_trained_adapter_is_exported_merged(tmp_path: Path, target: Any, types: Any, config: Any) -> None:
    model = adapted(**config)
    qat.prepare(model, qat.QuantSpec(**types), target=target)
    if "activations" in types:
        qat.calibrate(model, [TOKENS])
    losses = train(model)
    assert losses[-1] < losses[0]
    inner = model.get_base_model()
    layers = {name: m for name, m in inner.named_modules() if isinstance(m, QLinear | QLoraLinear)}
    kinds = {name: type(m) for name, m in layers.items()}
    assert kinds[Q] is QLoraLinear
    assert kinds["model.layers.0.mlp.down_proj"] is (
        QLoraLinear if "all" in config.get("target_modules", "") else QLinear
    )
    assert not any(".base_layer" in name or "lora_" in name for name in kinds)
    with torch.no_grad():
        trained = {
            n: m.weight_quantizer.quantize(m.effective_weight(m), torch.bfloat16).value for n, m in layers.items()
        }
    report = qat.freeze(model)
    assert report.layers.keys() == kinds.keys()
    assert all(same_bits(inner.get_submodule(n).weight.dequantize(), value) for n, value in trained.items())
    assert {name.rpartition(".")[0] for name, _ in inner.named_parameters()} == {
        name.rpartition(".")[0] for name, _ in llama().named_parameters()
    } | {name for name in layers if name.endswith("proj")}
    with pytest.raises(StateError, match="this PeftModelForCausalLM is frozen"):
        model.save_pretrained(tmp_path / "adapter")
    qat.export(model, tmp_path / "out", example_inputs=TOKENS)
    qat.verify(tmp_path / "out", reference=model)
    loaded = qat.load(tmp_path / "out")
    assert type(loaded) is LlamaForCausalLM
    assert same_bits(logits(loaded), logits(model))
    if target == "transformers":
        importlib.import_module("qat.integrations.transformers")
        stock: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert same_bits(logits(stock), logits(model))


def test_the_export_is_that_of_the_model_which_peft_merges(tmp_path: Path) -> None:
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    for one in (model, merged):
        qat.prepare(one, INT4, algorithm=qat.StraightThrough(), target="transformers")
        qat.freeze(one)
    assert same_bits(logits(model), logits(merged))
    states = model.get_base_model().state_dict(), merged.state_dict()
    assert states[0].keys() == states[1].keys()


def test_what_is_wrong_with_runs_is_seen_through_the_peft_model() -> None:
    model = adapted()
    qat.prepare(model, INT4)
    inner = model.get_base_model()
    inner.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    model(**TOKENS)
    with pytest.raises(StateError, match=r"7 prepared layers never ran"):
        qat.freeze(model)


def test_training_that_leaves_the_adapters_alone_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    qat.prepare(model, INT4)
    ranges = [p for n, p in model.named_parameters() if "_quantizer" in n]
    optimizer = torch.optim.SGD(ranges, lr=0.1)
    model(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    optimizer.step()
    qat.freeze(model)
    (said,) = (r.getMessage() for r in caplog.records if "never changed the weights" in r.getMessage())
    assert "of 4 layers" in said


@pytest.mark.parametrize("exclude", [["*up_proj"], ["*up_proj", "*q_proj"]])
def test_an_adapter_over_a_float_layer_trains_in_float_and_is_merged(tmp_path: Path, exclude: list[str]) -> None:
    model = adapted(modules_to_save=["lm_head"])
    report = qat.prepare(model, qat.QuantSpec(weights="int8", exclude=tuple(exclude)), target="transformers")
    assert UP not in report.layers
    train(model)
    up = model.get_base_model().get_submodule(UP)
    assert type(up).__module__.startswith("peft")
    expected = (up.base_layer.weight + up.get_delta_weight("default")).detach()
    head = model.get_base_model().lm_head.modules_to_save["default"].weight.detach().clone()
    qat.freeze(model)
    inner = model.get_base_model()
    assert not list(adapters(inner))
    assert same_bits(inner.get_submodule(UP).weight, expected.bfloat16())
    assert same_bits(inner.lm_head.weight, head.bfloat16())
    qat.export(model, tmp_path / "out", example_inputs=TOKENS)
    qat.verify(tmp_path / "out", reference=model)


def test_a_broken_adapter_over_a_float_layer_changes_nothing() -> None:
    model = adapted()
    qat.prepare(model, qat.QuantSpec(weights="int8", exclude=("*up_proj",)))
    up = model.get_base_model().get_submodule(UP)
    up.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(StateError, match=rf"layer '{UP}' holds inf or NaN in its lora_B.default.weight"):
        qat.freeze(model)
    assert isinstance(model.get_base_model().get_submodule(Q), QLoraLinear)


@pytest.mark.parametrize("config", [LoHaConfig, IA3Config])
def test_other_adapters_stay_float_and_are_merged(config: Any) -> None:
    given = {"feedforward_modules": []} if config is IA3Config else {}
    model: Any = get_peft_model(llama(), config(target_modules=["q_proj"], **given))
    report = qat.prepare(model, INT4).inspection
    reasons = {row.name: row.reason for row in report.layers if row.weights is None}
    assert reasons[f"{Q}.base_layer"].startswith(f"belongs to the adapter {Q}: merge it")
    train(model)
    qat.freeze(model)
    assert type(model.get_base_model().get_submodule(Q)) is nn.Linear


def test_an_adapter_of_an_embedding_is_merged() -> None:
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    qat.prepare(model, INT4)
    embed = model.get_base_model().model.embed_tokens
    expected = (embed.base_layer.weight + embed.get_delta_weight("default")).detach()
    qat.freeze(model)
    assert same_bits(model.get_base_model().model.embed_tokens.weight, expected.bfloat16())


def test_merging_never_changes_a_tied_weight() -> None:
    inner = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie"):
        model = adapted(inner, target_modules=["lm_head", "q_proj"])
    embeddings = inner.model.embed_tokens.weight.detach().clone()
    with pytest.raises(StateError, match="the adapter 'lm_head' shares its weight"):
        qat.prepare(model, INT4)
    assert not isinstance(inner.get_submodule(Q), QLoraLinear)
    inner.config.tie_word_embeddings, inner.lm_head.base_layer.weight = False, nn.Parameter(embeddings.clone())
    qat.prepare(model, INT4)
    inner.lm_head.base_layer.weight = inner.model.embed_tokens.weight
    with pytest.raises(StateError, match="the adapter 'lm_head' shares its weight"):
        qat.freeze(model)
    assert torch.equal(inner.model.embed_tokens.weight, embeddings)


def test_a_tied_head_under_an_adapter_is_quantized_by_name(tmp_path: Path) -> None:
    inner = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie"):
        model = adapted(inner, target_modules=["lm_head", "q_proj"])
    report = qat.prepare(model, qat.QuantSpec(weights="int8", include=("lm_head",)), target="transformers")
    assert report.untied == ("lm_head",)
    assert inner.lm_head.base_layer.weight is not inner.model.embed_tokens.weight
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=TOKENS)
    assert same_bits(logits(qat.load(tmp_path / "out")), logits(model))


def test_adapters_are_saved_and_loaded_as_peft_does(tmp_path: Path) -> None:
    """The file holds the ranges of the layers under the adapter too; a float model takes the adapter alone."""
    model = adapted(target_modules="all-linear")
    qat.prepare(model, INT4)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = get_peft_model_state_dict(model)
    before = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    loaded = get_peft_model_state_dict(before)
    assert loaded.keys() == {key for key in saved if "lora_" in key}
    assert all(torch.equal(value, saved[key]) for key, value in loaded.items())
    qat.prepare(before, INT4)
    before.load_adapter(tmp_path / "adapter", "default")
    after = adapted(target_modules="all-linear")
    qat.prepare(after, INT4)
    after.load_adapter(tmp_path / "adapter", "trained")
    after.set_adapter("trained")
    for other in (before, after):
        assert same_bits(logits(other), logits(model))


def test_what_the_file_of_an_adapter_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    qat.prepare(model, INT4)
    model.save_pretrained(tmp_path / "adapter")
    assert "state_dict" not in caplog.text
    model.load_adapter(tmp_path / "adapter", "default")
    assert (
        "state_dict holds the quantizers of 4 layers, as an adapter's file does; those of 10 others stay" in caplog.text
    )


@pytest.mark.parametrize("small", [False, True], ids=["whole", "what-trains"])
def test_a_checkpoint_resumes(small: bool) -> None:
    model, other = adapted(), adapted()
    for one in (model, other):
        qat.prepare(one, INT4, algorithm=qat.LearnedAffine(start="clip"))
    train(model)
    state = model.state_dict()
    if small:  # a few numbers beside the base, which both have
        state = {key: value for key, value in state.items() if "lora_" in key or "_quantizer." in key}
    other.load_state_dict(state, strict=not small)
    assert same_bits(logits(model), logits(other))
    for one in (model, other):
        qat.freeze(one)
    assert same_bits(logits(model), logits(other))


def test_a_checkpoint_from_before_prepare_gives_fresh_ranges() -> None:
    model, trained = adapted(), adapted()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    qat.prepare(model, INT4)
    model.load_state_dict(trained.state_dict())
    qat.prepare(trained, INT4)
    assert same_bits(logits(model), logits(trained))


def test_a_prompt_is_refused() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(StateError, match="its PeftModel learns a prompt"):
        qat.prepare(model, INT4)


def test_bases_that_are_no_linear_layer_stay_float() -> None:
    class Other(nn.Linear):
        pass

    inner = nn.Sequential(Other(128, 128), nn.Linear(128, 128))
    model = get_peft_model(inner, LoraConfig(target_modules=["0", "1"]))  # type: ignore[arg-type]
    report = qat.prepare(model, INT4).inspection
    reason = "under its adapter, Other is not exactly nn.Linear: its own forward would be lost"
    assert {row.name: row.reason for row in report.layers if row.weights is None} == {"0": reason}
    lone = get_peft_model(nn.Sequential(Other(128, 128)), LoraConfig(target_modules=["0"]))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"under its adapter, Other is not exactly nn.Linear"):
        qat.prepare(lone, INT4)
    gpt2: Any = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64))
    gpt2 = get_peft_model(gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    rows = {row.name: row for row in qat.inspect(gpt2, INT4, target="transformers").layers}
    row = rows["transformer.h.0.attn.c_attn"]
    assert (row.shape, row.weights) == ((192, 64), None)
    assert row.reason == "under its adapter, Conv1D is not exactly nn.Linear: its own forward would be lost"


@pytest.mark.parametrize("names", [["c_attn", "c_fc"], ["attn.c_proj"]])
def test_adapters_over_conv1d_stay_float_and_are_merged(tmp_path: Path, names: list[str]) -> None:
    torch.manual_seed(0)
    inner = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, eos_token_id=1)).eval()
    model = adapted(inner, target_modules=names, fan_in_fan_out=True)
    report = qat.prepare(model, INT4, target="transformers").inspection
    floats = {row.name: row.shape for row in report.layers if row.weights is None and "under its adapter" in row.reason}
    assert floats == {f"transformer.h.0.{name}": SHAPES[name] for name in SHAPES if name.endswith(tuple(names))}
    train(model)
    expected = logits(model)
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=TOKENS)
    assert qat.verify(tmp_path / "out", reference=model)
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("call", ["merge_and_unload", "unload"])
def test_peft_takes_no_prepared_layer_away(call: str) -> None:
    model = adapted()
    qat.prepare(model, INT4)
    with pytest.raises(StateError, match=r"peft would put float layers in the place .*qat.freeze merges the adapters"):
        getattr(model, call)()
    assert len(qat.freeze(model).layers) == 14


def test_folding_comes_before_the_adapter() -> None:
    with pytest.raises(StateError, match=r"4 layers have adapters .*call qat.fold_outliers before get_peft_model"):
        qat.fold_outliers(adapted(), [TOKENS], spec=qat.QuantSpec(activations="int8"))


def test_blocks_are_reconstructed_by_their_adapters() -> None:
    model = adapted()
    qat.prepare(model, qat.QuantSpec(weights="int2"), algorithm=qat.LearnedAffine())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = qat.reconstruct(model, [TOKENS], steps=10, lr=1e-3)
    assert all(block.after < block.before for block in report.blocks.values())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_A" in name for name in changed)
    assert not any("base_layer.weight" in name for name in changed)


def test_types_are_searched_with_the_adapter_merged() -> None:
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    options: Any = {"budget": "int4", "types": ("int2", "int8"), "score": "output"}
    found = [qat.search(one, INT4, [TOKENS], **options) for one in (model, merged)]
    assert found[0].spec == found[1].spec
    assert type(model.get_base_model().get_submodule(Q)).__module__.startswith("peft")


def test_what_is_no_peft_model_is_handed_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert without_peft(model) is model
    assert without_peft(None) is None
    assert list(adapters(model)) == []


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_a_peft_model_around_another_is_one_model() -> None:
    model = get_peft_model(adapted(), LoraConfig(r=2, target_modules=["k_proj"]))
    assert type(without_peft(model)) is LlamaForCausalLM
    qat.prepare(model, INT4, target="transformers")
    kinds = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QLoraLinear)}
    assert kinds == {"q_proj", "k_proj", "up_proj"}
    train(model)
    assert len(qat.freeze(model).layers) == 14
