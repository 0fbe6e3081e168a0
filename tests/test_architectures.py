"""Tiny random models of many architectures through the whole line, to what the target's own loader gives back.

`scripts.architecture_matrix` compares: every code, scale, shift, other parameter and buffer, and every output, bit for
bit. Its larger table, with every architecture of `tests.architectures`, is in docs/results/architectures.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from scripts._architecture_course import Outcome
from scripts.architecture_matrix import (
    ACTIVATION_CASES,
    CASES,
    WEIGHTS,
    load,
    output_faults,
    outputs_of,
    run_case,
    state_faults,
)
from tests.architectures import ARCHITECTURES

TESTED = list(ARCHITECTURES)[:16]
KERNEL_GAPS = {"float32": 1e-5, "bfloat16": 5e-2}


@pytest.mark.loads("transformers", "plug-in for transformers", weights=WEIGHTS)
@pytest.mark.loads("quanto", "QuantizedModelForCausalLM", weights=WEIGHTS)
@pytest.mark.parametrize("name", TESTED)
def test_the_target_loads_what_was_frozen(name: str, tmp_path: Path) -> None:
    """Two types, each in one of both dtypes, by turns: four models take all; the script takes all of each."""
    turn = TESTED.index(name)
    for number, case in enumerate(case for n, case in enumerate(CASES) if (n + n // 4 + turn) % 4 == 0):
        outcome = run_case(ARCHITECTURES[name], case, tmp_path / str(number))
        assert outcome.result == "equal", outcome
        assert_small_gaps(outcome, case.dtype)
        assert all(outcome.left_float.values()), outcome


@pytest.mark.loads("transformers", "plug-in for transformers", weights=("int8", "float8"), activations="same")
@pytest.mark.loads("quanto", "QuantizedModelForCausalLM", weights=("int8", "float8"), activations="same")
@pytest.mark.parametrize("name", ["OPTForCausalLM", "BertForSequenceClassification", "LlamaForCausalLM"])
def test_the_target_loads_quantized_activations(name: str, tmp_path: Path) -> None:
    for number, case in enumerate(ACTIVATION_CASES):
        outcome = run_case(ARCHITECTURES[name], case, tmp_path / str(number))
        assert outcome.result == "equal", outcome


def assert_small_gaps(outcome: Outcome, dtype: str) -> None:
    assert outcome.fake_gap is None or outcome.fake_gap < 1e-5, outcome
    assert outcome.kernel_gap is None or outcome.kernel_gap < KERNEL_GAPS[dtype], outcome


# These read the first token of each sequence, a strided slice that the int4 kernel in bfloat16 refuses.
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("BertForSequenceClassification", "bert.pooler.dense"),
        ("RobertaForSequenceClassification", "classifier.dense"),
        ("DistilBertForSequenceClassification", "pre_classifier"),
    ],
)
def test_a_layer_whose_input_no_kernel_reads_stays_float_and_is_named(name: str, layer: str) -> None:
    architecture = ARCHITECTURES[name]
    report = qat.inspect(architecture.build(), qat.QuantSpec(weights="int4"), example_inputs=architecture.example())
    (row,) = [row for row in report.layers if row.name == layer]
    assert row.weights is None
    assert "not contiguous" in row.reason
    assert layer in str(report)
    report = qat.inspect(architecture.build(), qat.QuantSpec(weights="int2"), example_inputs=architecture.example())
    assert layer in [row.name for row in report.layers if row.weights]


def test_inspection_with_an_example_changes_nothing() -> None:
    architecture = ARCHITECTURES["BertForSequenceClassification"]
    model = architecture.build()
    model.get_submodule("bert.embeddings").eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    qat.inspect(model, qat.QuantSpec(), example_inputs=architecture.example())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_whose_weight_is_read_without_a_call_stays_float_and_is_named() -> None:
    architecture = ARCHITECTURES["MambaForCausalLM"]
    report = qat.inspect(architecture.build(), qat.QuantSpec(), example_inputs=architecture.example())
    reasons = {row.name.rpartition(".")[2]: row.reason for row in report.layers if row.weights is None}
    assert reasons["dt_proj"] == "MambaMixer reads the weight without calling the layer"
    assert reasons.keys() == {"dt_proj", "lm_head"}


# Gemma's embedding scale takes the serving dtype; Llama's rotary tables are float32 whatever is served; GPT-J's are
# too, but quanto's loader computes them in the serving dtype.
@pytest.mark.parametrize("target", ["transformers", "quanto"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPTJForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_that_no_file_holds_are_the_loaders(name: str, dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build().to(torch.bfloat16)  # as Lightning's bf16-true does, rotary tables included
    qat.prepare(model, qat.QuantSpec(dtype=str(dtype).removeprefix("torch.")), target=target)
    qat.freeze(model, allow_unreached=True)
    frozen = outputs_of(model, architecture.example())
    qat.export(model, tmp_path / target)
    loaded = load(type(model), tmp_path / target, target, dtype)
    assert state_faults(model, loaded) == []
    assert output_faults(frozen, outputs_of(loaded, architecture.example())) == []


def test_an_export_for_a_loader_that_computes_other_buffers_is_refused(tmp_path: Path) -> None:
    model: Any = ARCHITECTURES["GPTJForCausalLM"].build()
    qat.prepare(model, qat.QuantSpec(), target="transformers")
    qat.freeze(model, allow_unreached=True)
    with pytest.raises(qat.TargetError, match="embed_positions"):
        qat.export(model, tmp_path / "out", target="quanto")
