"""Tiny models that rules make of any class of transformers: some of them through the whole line, and the rules.

`scripts.architecture_matrix` takes them all; docs/results/architectures.md is its table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from scripts._architecture_table import Row, table
from scripts.architecture_matrix import COURSE, RULE_CASES, reason_against, run_case
from tests.tiny_configurations import shrunk
from tests.tiny_transformers import EXCEPTIONS, LEFT_OUT, TASKS, tiny_transformers

# Of each task one, by turns in the four cases; the last five once failed or came back unlike they were frozen: a table
# of MusicGen's grows, a mark on quantized models changes FalconMamba's arithmetic, RoCBert adds to a layer's output in
# place, OlmoHybrid builds a parameter in float32, and T5Gemma ties its head to the embedding of its decoder.
SAMPLE = {
    "AfmoeForCausalLM": "int4 bfloat16",
    "LlavaForConditionalGeneration": "int8 bfloat16",
    "DetrForObjectDetection": "int8 float32",
    "MusicgenMelodyForConditionalGeneration": "int4 float32",
    "FalconMambaForCausalLM": "int8 bfloat16",
    "RoCBertForMaskedLM": "int8 float32",
    "OlmoHybridForCausalLM": "int8 bfloat16",
    "T5GemmaForConditionalGeneration": "int8 bfloat16",
}


@pytest.mark.filterwarnings("ignore")  # of the models' own code
@pytest.mark.parametrize("name", SAMPLE)
def test_the_plug_in_loads_what_was_frozen(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in RULE_CASES if str(case) == SAMPLE[name])
    outcome = run_case(tiny_transformers()[name], case, tmp_path)
    assert outcome.result == "equal", outcome
    assert 0 < outcome.share < outcome.matrix_share < 1


def test_every_task_has_its_classes() -> None:
    found = tiny_transformers()
    for task in (*TASKS, "base"):
        assert sum(tiny.task == task for tiny in found.values()) > 25, task
    assert set(EXCEPTIONS) | set(LEFT_OUT) <= set(found)
    assert not set(EXCEPTIONS) & set(LEFT_OUT)


def test_the_first_layer_of_each_kind_is_kept() -> None:
    config = shrunk(transformers.Qwen3NextConfig, {})
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert shrunk(transformers.Qwen3NextConfig, {"vocab_size": 96}).vocab_size == 96


def test_special_tokens_are_small_distinct_and_the_same_in_nested_configurations() -> None:
    config = shrunk(transformers.Qwen2VLConfig, {})
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    assert len(special) == 4
    assert all(60 < token < config.text_config.vocab_size for token in special)


def test_images_have_as_many_tokens_as_features() -> None:
    tiny = tiny_transformers()["LlavaForConditionalGeneration"]
    example = tiny.example(torch.bfloat16)
    token = tiny.configuration.image_token_index
    assert (example["input_ids"] == token).sum(1).tolist() == [16, 16]
    assert example["pixel_values"].dtype is torch.bfloat16


def test_a_model_is_the_same_every_time() -> None:
    tiny = tiny_transformers()["AfmoeForCausalLM"]
    one, other = (dict(tiny.build().named_parameters()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)
    widths = [layer.in_features for layer in tiny.build().modules() if isinstance(layer, nn.Linear)]
    assert widths
    assert all(width % 32 == 0 for width in widths)


def test_a_class_that_is_not_run_has_a_reason() -> None:
    assert reason_against(tiny_transformers()["TimmBackbone"]) == "needs the package timm, which is not installed"
    assert reason_against(tiny_transformers()["ArceeForCausalLM"]) == ""


def test_a_run_of_some_classes_keeps_the_other_rows(tmp_path: Path) -> None:
    outcome: dict[str, Any] = {"case": "int8 float32", "detail": "", "share": 0.5, "matrix_share": 0.75}
    outcome |= {"fake_gap": None, "kernel_gap": 1e-6, "left_float": {"head": "tied"}}
    COURSE.write({"A": Row.of("causal", [outcome | {"result": "equal"}])}, ["A"], tmp_path)
    COURSE.write({"B": Row("causal", reason="needs a package")}, ["A", "B", "C"], tmp_path)
    text = (tmp_path / "architectures.md").read_text(encoding="utf-8")
    assert "| A | 50.0% | 75.0% | equal |" in text
    assert "- B: needs a package" in text
    assert "| causal | 2 | 1 | 1 | 0 | 0 | 0 |" in text


def test_faults_of_one_kind_are_one_line() -> None:
    outcomes = [
        {"case": case, "result": "error", "detail": "bad", "share": 0, "matrix_share": 0, "kernel_gap": None}
        for case in ("a float32", "b float32")
    ]
    text = table({"A": Row.of("causal", [outcome | {"left_float": {}} for outcome in outcomes])})
    assert "- A, a float32, b float32: error: bad" in text
