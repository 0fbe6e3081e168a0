from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.tasks import CausalLanguageModelling, evaluate
from recipes.tasks.causal_lm import causal_lm_loss


def by_hand(logits: Tensor, labels: Tensor) -> float:
    """The definition, position by position, in double precision."""
    terms = []
    for row, target in zip(logits.double(), labels, strict=True):
        for position in range(len(target) - 1):
            if target[position + 1] != -100:
                scores = row[position]
                terms.append(float(scores.exp().sum().log() - scores[target[position + 1]]))
    return sum(terms) / len(terms)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(3, 7, 11) * 3


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, 11, (3, 7))
    labels[1, 3:] = -100
    return labels


class Lookup(nn.Module):
    """Next-token scores from a table."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.dropout = nn.Dropout(0.9)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.dropout(self.table(input_ids)))


def test_the_loss_is_the_definition(logits: Tensor, labels: Tensor) -> None:
    assert float(causal_lm_loss(logits, labels)) == pytest.approx(by_hand(logits, labels), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_float32_for_narrow_logits(dtype: torch.dtype, logits: Tensor, labels: Tensor) -> None:
    loss = causal_lm_loss(logits.to(dtype), labels)
    assert loss.dtype is torch.float32
    assert float(loss) == pytest.approx(by_hand(logits.to(dtype), labels), rel=1e-6)


def test_a_distillation_compares_the_positions_that_the_loss_counts(logits: Tensor, labels: Tensor) -> None:
    task, batch = CausalLanguageModelling(), {"input_ids": labels.clamp(min=0), "labels": labels}
    found, counted = task.predictions(SimpleNamespace(logits=logits), batch)
    assert found is logits
    assert counted.tolist() == [[*(row[1:] != -100).tolist(), False] for row in labels]
    _, counted = task.predictions(logits, {"input_ids": labels})
    assert counted.shape == labels.shape


def test_labels_default_to_the_inputs_and_stay_out_of_the_forward(logits: Tensor) -> None:
    task, tokens = CausalLanguageModelling(), torch.randint(0, 11, (3, 7))
    assert set(task.inputs({"input_ids": tokens, "labels": tokens, "attention_mask": tokens})) == {
        "input_ids",
        "attention_mask",
    }
    assert float(task.loss(logits, {"input_ids": tokens})) == float(causal_lm_loss(logits, tokens))


def test_outputs_without_logits_are_an_error() -> None:
    with pytest.raises(TypeError, match="object with logits, got SimpleNamespace"):
        CausalLanguageModelling().loss(SimpleNamespace(logits=None), {"input_ids": torch.zeros(1, 2)})


def test_metrics_weigh_every_token_equally(labels: Tensor) -> None:
    task, model = CausalLanguageModelling(), Lookup()
    batches = [{"input_ids": labels[i : i + 1].clamp(min=0), "labels": labels[i : i + 1]} for i in range(3)]
    found = evaluate(task, model, batches)
    expected = by_hand(model.table(labels.clamp(min=0)).detach(), labels)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_is_shown(labels: Tensor) -> None:
    model = Lookup()
    nn.init.constant_(model.table.weight, float("nan"))
    assert math.isnan(evaluate(CausalLanguageModelling(), model, [{"input_ids": labels.clamp(min=0)}])["loss"])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_evaluation_restores_the_mode(training: bool) -> None:
    model = Lookup().train(training)
    evaluate(CausalLanguageModelling(), model, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    assert model.training is training


def test_an_evaluation_waits_for_no_other_process(labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end a run has one process, where there were several."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    assert evaluate(CausalLanguageModelling(), Lookup(), [{"input_ids": labels.clamp(min=0)}])["loss"] > 0


def test_evaluation_without_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(CausalLanguageModelling(), Lookup(), [])
