"""Starts from data under LoRA: the base is compensated where it is the weight, and no file loses that silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qat
from qat.errors import StateError
from qat.layers import quantized_layers
from tests.helpers import same_bits
from tests.test_adapters import INT4, TOKENS, Q, adapted, llama, logits, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


def fresh(**config: Any) -> Any:
    """With an adapter that is zero still, as peft makes it."""
    model = adapted(**config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return model


def started(start: Any, **config: Any) -> tuple[Any, dict[str, str]]:
    model = fresh(**config)
    qat.prepare(model, INT4, algorithm=qat.LearnedAffine(start=start), target="transformers")
    found = qat.calibrate(model, [TOKENS]).starts
    return model, {name: report.start for name, report in found.items()}


def bases(model: Any) -> dict[str, Tensor]:
    """By the names of the plain model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = inner.state_dict()
    return {
        name.replace(".base_layer", ""): tensor for name, tensor in state.items() if name.endswith("proj.weight")
    } | {name.replace(".base_layer", ""): t for name, t in state.items() if name.endswith("base_layer.weight")}


@pytest.mark.parametrize("start", ["gptq", "best"])
def test_the_base_is_compensated_as_a_plain_weight_is(start: str, caplog: pytest.LogCaptureFixture) -> None:
    model, found = started(start)
    plain = llama()
    qat.prepare(plain, INT4, algorithm=qat.LearnedAffine(start=start), target="transformers")  # type: ignore[arg-type]
    told = qat.calibrate(plain, [TOKENS]).starts
    assert found == {name: report.start for name, report in told.items()}
    assert found[Q] == "gptq"
    assert not same_bits(bases(model)[f"{Q}.weight"], llama().get_parameter(f"{Q}.weight"))
    assert all(same_bits(value, bases(plain)[name]) for name, value in bases(model).items())
    assert same_bits(logits(model), logits(plain))
    assert "14 weights that do not train" in caplog.text


@pytest.mark.parametrize(
    "why", ["output", "adapter that is not zero", "second adapter that is not zero", "dora", "packed base"]
)
def test_a_base_is_kept_where_it_is_not_the_weight(why: str) -> None:
    model = fresh(use_dora=why == "dora")
    if "second" in why:
        model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and ("other" in name if "second" in why else "not zero" in why):
                parameter.fill_(0.1)
    before = {name: tensor.clone() for name, tensor in bases(model).items()}
    start: Any = "output" if why == "output" else "gptq"
    qat.prepare(model, INT4, algorithm=qat.LearnedAffine(start=start), target="transformers")
    if why == "packed base":
        qat.pack_base(model)
    found = qat.calibrate(model, [TOKENS]).starts
    assert found[Q].start == "output"
    assert found["model.layers.0.mlp.down_proj"].start == start  # no adapter
    kept = [name for name, tensor in bases(model).items() if "q_proj" in name or "up_proj" in name]
    assert why == "packed base" or len(kept) == 4
    assert all(same_bits(bases(model)[name], before[name]) for name in kept)


def test_an_adapters_file_does_not_load_over_another_base(tmp_path: Path) -> None:
    model, _ = started("gptq", target_modules="all-linear")
    state = model.state_dict()
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    other = fresh(target_modules="all-linear")
    qat.prepare(other, INT4, algorithm=qat.LearnedAffine(start="gptq"), target="transformers")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(StateError, match=r"its start \(gptq or best\) had changed, and the state lacks this weight"):
        other.load_adapter(tmp_path / "adapter", "default")
    assert all(same_bits(tensor, before[name]) for name, tensor in other.state_dict().items())
    other.load_state_dict(state)  # the model as it was calibrated
    other.load_adapter(tmp_path / "adapter", "default")
    assert same_bits(logits(other), logits(model))


def test_a_failed_calibration_restores_the_base() -> None:
    model = fresh()
    qat.prepare(model, qat.QuantSpec(weights="int4", activations="int8"), algorithm=qat.LearnedAffine(start="gptq"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def batches() -> Any:
        yield TOKENS
        raise RuntimeError("the data ended")

    with pytest.raises(RuntimeError, match="the data ended"):
        qat.calibrate(model, batches())
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_trained_over_a_compensated_base_is_exported(tmp_path: Path) -> None:
    model, _ = started("gptq")
    losses = train(model)
    assert losses[-1] < losses[0]
    inner = model.get_base_model()
    trained = {
        name: layer.weight_quantizer.quantize(layer.effective_weight(layer), torch.bfloat16).value.detach()
        for name, layer in quantized_layers(inner)
    }
    qat.freeze(model)
    assert all(same_bits(inner.get_submodule(n).weight.dequantize(), value) for n, value in trained.items())
    qat.export(model, tmp_path / "out", example_inputs=TOKENS)
    assert same_bits(logits(qat.load(tmp_path / "out")), logits(model))
