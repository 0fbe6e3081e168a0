"""What tasks on logits share: a cross entropy, in float32 whatever the model's dtype.

In bfloat16 a log-softmax over thousands of classes keeps two digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection

from recipes.tasks.evaluation import Batch

__all__ = ["LogitTask", "logits_of"]


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
    """A task whose model returns logits. Batches may hold ``labels``."""

    @abstractmethod
    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy against the labels, in float32."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return fresh metrics."""

    @abstractmethod
    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch to ``metrics``."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return everything but the labels, which only the loss needs."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def counted(self, batch: Batch) -> Tensor | None:
        """Return which rows of logits a distillation compares, bool; none: all."""
        return None

    def predictions(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return what a distillation compares: the logits, and which rows of them count."""
        return logits_of(outputs), self.counted(batch)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the cross entropy."""
        return self.cross_entropy(logits_of(outputs), batch)
