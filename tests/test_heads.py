"""Output heads by choice: one override quantizes a head beside the default, for every loader that can hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from tests.architectures import ARCHITECTURES
from tests.helpers import same_bits

CASES = [
    ("LlamaForCausalLM", "lm_head", "transformers", False),
    ("LlamaForCausalLM", "lm_head", "quanto", False),
    ("GPT2LMHeadModel", "lm_head", "transformers", True),
    ("GPTJForCausalLM", "lm_head", "transformers", False),  # with a bias
    ("OPTForCausalLM", "lm_head", "quanto", True),
    ("BertForMaskedLM", "cls.predictions.decoder", "transformers", True),  # with a bias that is tied too
    ("BertForMaskedLM", "cls.predictions.decoder", "quanto", True),
    ("BartForConditionalGeneration", "lm_head", "transformers", True),
    ("BertForSequenceClassification", "classifier", "transformers", False),
    ("GPT2ForSequenceClassification", "score", "transformers", False),
]


@pytest.mark.parametrize("name", ["lm_head", "shared"])
def test_a_class_that_ties_on_every_load_is_untied_for_no_layer(name: str) -> None:
    model = ARCHITECTURES["T5ForConditionalGeneration"].build()
    spec = qat.QuantSpec(overrides={name: "int8"})
    reasons = {row.name: row.reason for row in qat.inspect(model, spec, target="transformers").layers}
    reason = "its model's class ties it on every load: include all layers that share the weight, or none"
    assert reasons[name] == reason
    assert qat.prepare(model, spec, target="transformers").untied == ()


@pytest.mark.parametrize(("name", "head", "target", "tied"), CASES)
def test_one_override_adds_a_head_to_the_default(tmp_path: Path, name: str, head: str, target: str, tied: bool) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build().eval()
    example: Any = architecture.example()
    plain = {row.name for row in qat.inspect(model, qat.QuantSpec(), target=target).layers if row.weights}
    spec = qat.QuantSpec(weights="int8", dtype="float32", overrides={head: "int4"})
    report = qat.prepare(model, spec, target=target, example_inputs=example)
    types = {row.name: row.weights for row in report.inspection.layers if row.weights}
    assert types.keys() == plain | {head}
    assert types[head] == "int4"
    assert report.untied == ((head,) if tied else ())
    model(**example).logits.square().mean().backward()
    assert model.get_submodule(head).weight.grad.any()
    qat.freeze(model)
    qat.export(model, tmp_path / "out", example_inputs=example)
    qat.verify(tmp_path / "out", reference=model)
    with torch.no_grad():
        assert same_bits(qat.load(tmp_path / "out")(**example).logits, model(**example).logits)
