"""What tasks on logits share: a cross entropy, mixed with the divergence from a teacher's distribution.

Both terms are computed in float32 whatever the model's dtype: in bfloat16 a log-softmax over thousands of classes
keeps two digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection

from recipes.tasks.evaluation import Batch

__all__ = ["LogitTask", "divergence", "logits_of"]


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of the predicted distributions, mean over the rows, in float32.

    Both logits are divided by the temperature T and the divergence is multiplied by T², which keeps the gradient's
    size independent of T (Hinton 2015, "Distilling the knowledge in a neural network", section 2).

    Args:
        logits: (rows, classes), the student's, any float dtype.
        teacher_logits: the same shape; no gradient flows into it.
        temperature: above 1 softens both distributions.

    >>> import torch
    >>> float(divergence(torch.zeros(2, 3), torch.zeros(2, 3)))
    0.0
    """
    student = functional.log_softmax(logits.float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of what a model returned: a tensor, or an object with ``logits``.

    Raises:
        TypeError: it is neither.
    """
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"outputs: expected a tensor or an object with logits, got {type(outputs).__name__}")
    return logits


@dataclass(frozen=True, kw_only=True)
class LogitTask(ABC):
    """A task whose model returns logits, optionally distilled from a teacher. Batches may hold ``labels``."""

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

    @abstractmethod
    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy against the labels, in float32."""

    @abstractmethod
    def distance(self, logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """Return the divergence from a teacher where the labels count, in float32."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return fresh metrics."""

    @abstractmethod
    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch to ``metrics``."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return everything but the labels, which only the loss needs."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        """Return the cross entropy, mixed with the distillation term where its weight is above 0."""
        logits, weight = logits_of(outputs), self.distillation_weight
        if weight == 0.0:
            return self.cross_entropy(logits, batch)
        if teacher_outputs is None:
            raise ValueError(f"distillation_weight={weight} needs a teacher's outputs, got none: pass a teacher")
        distance = self.distance(logits, logits_of(teacher_outputs), batch)
        return distance if weight == 1.0 else (1.0 - weight) * self.cross_entropy(logits, batch) + weight * distance
