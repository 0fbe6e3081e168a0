"""Tiny random models of many architectures through the whole line, to what the target's own loader gives back.

`scripts.architecture_matrix` compares: every code, scale, shift, other parameter and buffer, and every output, bit for
bit. Its larger table, with every architecture of `tests.architectures`, is in docs/results/architectures.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qat
from scripts.architecture_matrix import ACTIVATION_CASES, CASES, Case, run_case
from tests.architectures import ARCHITECTURES

TESTED = list(ARCHITECTURES)[:18]
NOTHING_TO_QUANTIZE = {"GPT2LMHeadModel"}  # its maps are Conv1D, and its head is tied
# Without a token axis an int4 kernel in bfloat16 raises: these read one token of each sequence.
READS_ONE_TOKEN = {
    "BertForSequenceClassification": "bert.pooler.dense",
    "RobertaForSequenceClassification": "classifier.dense",
    "DistilBertForSequenceClassification": "pre_classifier",
}

pytestmark = pytest.mark.filterwarnings("ignore")  # what foreign models say while they are built is not ours


@pytest.mark.parametrize("name", TESTED)
def test_the_target_loads_what_was_frozen(name: str, tmp_path: Path) -> None:
    expected = "float" if name in NOTHING_TO_QUANTIZE else "equal"
    for number, case in enumerate(CASES):
        outcome = run_case(ARCHITECTURES[name], case, tmp_path / str(number))
        assert outcome.result == expected, outcome
        assert outcome.fake_gap is None or outcome.fake_gap < 1e-5, outcome
        assert all(outcome.left_float.values()), outcome


@pytest.mark.parametrize("name", ["OPTForCausalLM", "BertForSequenceClassification", "LlamaForCausalLM"])
def test_the_target_loads_quantized_activations(name: str, tmp_path: Path) -> None:
    for number, case in enumerate(ACTIVATION_CASES):
        outcome = run_case(ARCHITECTURES[name], case, tmp_path / str(number))
        assert outcome.result == "equal", outcome
