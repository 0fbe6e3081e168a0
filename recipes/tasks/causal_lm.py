"""Causal language modelling: predict the next token.

The loss is the mean cross entropy of every position but the last against the token that follows, computed in float32
whatever the model's dtype: in bfloat16 a log-softmax over thousands of tokens keeps two digits. With a teacher, a
share of the loss is the divergence of the student's next-token distribution from the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.text import Perplexity

from recipes.tasks.evaluation import Batch

__all__ = ["CausalLanguageModelling", "causal_lm_loss", "distillation_loss"]

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


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of the next-token distributions, mean over the positions that count, in float32.

    Both logits are divided by the temperature T and the divergence is multiplied by T², which keeps the gradient's
    size independent of T (Hinton 2015, "Distilling the knowledge in a neural network", section 2).

    Args:
        logits: (batch, length, vocabulary), the student's.
        teacher_logits: the same shape; no gradient flows into it.
        labels: (batch, length); -100 where a position does not count.
        temperature: above 1 softens both distributions.

    >>> import torch
    >>> logits, labels = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
    >>> abs(float(distillation_loss(logits, logits.clone(), labels))) < 1e-6
    True
    """
    counted = labels[:, 1:] != IGNORE
    student = functional.log_softmax(logits[:, :-1][counted].float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits.detach()[:, :-1][counted].float() / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class CausalLanguageModelling:
    """Next-token prediction, optionally distilled from a teacher; judged by loss and perplexity.

    Batches hold ``input_ids`` (batch, length); ``labels`` default to them; anything else goes to the model.
    """

    distillation_weight: float = 0.0
    """The share w of the distillation term: loss = (1 - w) * cross entropy + w * KL(teacher || student)."""
    temperature: float = 1.0
    """The temperature of the distillation term."""

    def __post_init__(self) -> None:
        """Reject values that no loss can be made of."""
        if not 0.0 <= self.distillation_weight <= 1.0:
            raise ValueError(f"distillation_weight: must be between 0 and 1, got {self.distillation_weight}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature: must be above 0, got {self.temperature}")

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return everything but the labels, which only the loss needs."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        """Return the cross entropy, mixed with the distillation term where its weight is above 0."""
        logits, labels = _logits(outputs), _labels(batch)
        weight = self.distillation_weight
        if weight == 0.0:
            return causal_lm_loss(logits, labels)
        if teacher_outputs is None:
            raise ValueError(f"distillation_weight={weight} needs a teacher's outputs, got none: pass a teacher")
        divergence = distillation_loss(logits, _logits(teacher_outputs), labels, self.temperature)
        if weight == 1.0:
            return divergence
        return (1.0 - weight) * causal_lm_loss(logits, labels) + weight * divergence

    def metrics(self) -> MetricCollection:
        """Return ``loss`` (nats a token, mean over all tokens seen) and ``perplexity``, its exponential."""
        # A loss that is not a number is shown, not left out ("disable" would do that and drop the weights, in 1.9).
        loss = MeanMetric(nan_strategy=float("nan"))
        return MetricCollection({"loss": loss, "perplexity": Perplexity(ignore_index=IGNORE)})

    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch, each token with equal weight."""
        logits, labels = _logits(outputs).detach(), _labels(batch)
        counted = (labels[:, 1:] != IGNORE).sum()
        metrics["loss"].update(causal_lm_loss(logits, labels), weight=counted)
        metrics["perplexity"].update(logits[:, :-1].float(), labels[:, 1:])


def _logits(outputs: Any) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"outputs: expected a tensor or an object with logits, got {type(outputs).__name__}")
    return logits


def _labels(batch: Batch) -> Tensor:
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels
