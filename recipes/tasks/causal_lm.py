"""Causal language modelling: predict the next token.

The loss is the mean cross entropy of every position but the last against the token that follows. A distillation
compares the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.text import Perplexity

from recipes.tasks.evaluation import Batch
from recipes.tasks.logits import LogitTask, logits_of

__all__ = ["CausalLanguageModelling", "causal_lm_loss"]

IGNORE = -100  # the label of positions that do not count, as in torch and transformers


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each position against the next label, in float32.

    Args:
        logits: (batch, length, vocabulary), any float dtype.
        labels: (batch, length), the input tokens themselves; -100 where a position does not count.

    >>> import torch
    >>> logits = torch.zeros(1, 3, 4)
    >>> round(float(causal_lm_loss(logits, torch.tensor([[0, 1, 2]]))), 4) == round(float(torch.tensor(4.0).log()), 4)
    True
    """
    shifted = logits[:, :-1].float()
    return functional.cross_entropy(
        shifted.reshape(-1, shifted.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORE
    )


@dataclass(frozen=True)
class CausalLanguageModelling(LogitTask):
    """Next-token prediction, judged by loss and perplexity.

    Batches hold ``input_ids`` (batch, length); ``labels`` default to them; anything else goes to the model.
    """

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return `causal_lm_loss`."""
        return causal_lm_loss(logits, _labels(batch))

    def counted(self, batch: Batch) -> Tensor:
        """Return which positions have a next label that counts: (batch, length), never the last one."""
        following = _labels(batch)[:, 1:] != IGNORE
        return torch.cat([following, torch.zeros_like(following[:, :1])], 1)

    def metrics(self) -> MetricCollection:
        """Return ``loss`` (nats a token, mean over all tokens seen) and ``perplexity``, its exponential."""
        # A loss that is not a number is shown, not left out ("disable" would do that and drop the weights, in 1.9).
        loss = MeanMetric(nan_strategy=float("nan"))
        return MetricCollection({"loss": loss, "perplexity": Perplexity(ignore_index=IGNORE)})

    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch, each token with equal weight."""
        logits, labels = logits_of(outputs).detach(), _labels(batch)
        counted = (labels[:, 1:] != IGNORE).sum()
        metrics["loss"].update(causal_lm_loss(logits, labels), weight=counted)
        metrics["perplexity"].update(logits[:, :-1].float(), labels[:, 1:])


def _labels(batch: Batch) -> Tensor:
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels
