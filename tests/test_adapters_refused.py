"""What is refused of adapters, or told, before a run is lost: other bases and types, wrong order, wrong patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import qat
from qat.errors import SpecError, StateError
from tests.test_adapters import INT4, TOKENS, Q, adapted, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


def test_another_adapter_than_that_of_the_ranges_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    qat.prepare(model, INT4)
    model.set_adapter("other")
    qat.freeze(model)
    assert "ranges were found for the adapters ['default'], but now ['other'] are active" in caplog.text


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_a_pattern_of_what_peft_holds_is_told_so(config: dict[str, Any]) -> None:
    name = "lm_head" if "modules_to_save" in config else "model.embed_tokens"
    with pytest.raises(SpecError, match=rf"only {name} and the like: a layer under peft: leave it out of the adapter"):
        qat.prepare(adapted(**config), qat.QuantSpec(overrides={name: "int8"}), target="transformers")
    with pytest.raises(SpecError) as raised:
        qat.prepare(adapted(**config), qat.QuantSpec(overrides={"embed_tokens_": "int8", "lm_heads": "int8"}))
    assert "base_layer" not in str(raised.value)


@pytest.mark.parametrize("theirs", [None, "int4", "int8"])
@pytest.mark.parametrize("ours", [None, "int4", "int8"])
def test_an_adapter_goes_over_no_other_base(theirs: str | None, ours: str | None, tmp_path: Path) -> None:
    models = []
    for packed in (theirs, ours):
        model = adapted(target_modules=["q_proj"])
        qat.prepare(model, INT4)
        if packed is not None:
            qat.pack_base(model, packed)
        models.append(model)
    models[0].save_pretrained(tmp_path)
    if theirs == ours:
        models[1].load_adapter(tmp_path, "default")
        return
    was = "in float" if theirs is None else f"packed as {theirs}"
    with pytest.raises(StateError, match=rf"trained over a base {was}, but here it is .*, which the adapter alone"):
        models[1].load_adapter(tmp_path, "default")


def test_an_adapter_of_another_type_is_refused(tmp_path: Path) -> None:
    model = adapted()
    qat.prepare(model, INT4)
    model.save_pretrained(tmp_path)
    other = adapted()
    qat.prepare(other, qat.QuantSpec(weights="int2"))
    with pytest.raises(StateError, match=r"int4 there, int2 here.*\): prepare the model"):
        other.load_adapter(tmp_path, "default")


def test_an_adapter_over_a_prepared_layer_is_refused() -> None:
    inner = llama()
    qat.prepare(inner, INT4)
    model = adapted(inner)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**TOKENS).logits.sum().backward()
    calls = (lambda: qat.calibrate(model, [TOKENS]), lambda: qat.parameter_groups(inner, 0.1), optimizer.step)
    for call in (*calls, lambda: qat.freeze(inner)):
        with pytest.raises(StateError, match=rf"the adapter '{Q}' was put over a prepared layer"):
            call()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # peft's own
def test_experts_under_an_adapter_of_their_parameters_are_told_with_a_remedy(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, **sizes)
    qat.prepare(adapted(MixtralForCausalLM(config), target_modules="all-linear"), INT4, target="transformers")
    told = "% of the parameters stay float: experts under an adapter of their parameters: leave them out of the "
    assert told in caplog.text
    caplog.clear()
    model = adapted(MixtralForCausalLM(config), target_modules=["q_proj", "v_proj"])
    assert sum("experts" in name for name in qat.prepare(model, INT4, target="transformers").layers) == 4
    assert "stay float" not in caplog.text


def test_bases_of_other_shapes_stay_float_and_are_merged() -> None:
    """transformers' Conv1D is stored as ``(in, out)``, and a base of packed codes has no shape of its own."""

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 64)
            self.weight = nn.Parameter(torch.zeros(2048, 1, dtype=torch.uint8), requires_grad=False)

    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    model = adapted(GPT2LMHeadModel(config).eval(), target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
    report = qat.prepare(model, qat.QuantSpec(dtype="float32"), target="transformers").inspection
    reason = "under its adapter, Conv1D is not exactly nn.Linear: its own forward would be lost"
    assert report.left_float["transformer.h.0.attn.c_attn"] == reason
    before = logits(model)
    qat.freeze(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    inner = get_peft_model(nn.Sequential(Packed(), nn.Linear(64, 64)), LoraConfig(target_modules=["0"]))  # type: ignore[arg-type]
    assert qat.prepare(inner, INT4).layers == ("1",)
