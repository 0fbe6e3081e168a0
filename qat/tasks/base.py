"""The shape of a task, and how a model is judged by one.

A task never calls the model: whoever trains decides about autocast, teachers and gradients, calls the model with
`Task.inputs` and hands the outputs back. So one task serves a Lightning module, a plain loop and an evaluation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

__all__ = ["Batch", "Task", "evaluate"]

Batch: TypeAlias = Mapping[str, Tensor]


class Task(ABC):
    """The loss and the metrics of one task."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the keyword arguments that the model's forward takes for this batch."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch, teacher_outputs: Any = None) -> Tensor:
        """Return the training loss, a float32 scalar with a gradient.

        Args:
            outputs: what the model returned for `inputs`.
            batch: the batch that they were made from.
            teacher_outputs: what a teacher returned for the same inputs, for tasks that distil.
        """

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return fresh metrics, one of them called ``loss``: the task's own, without any distillation term."""

    @abstractmethod
    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch to ``metrics``."""


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Judge a model by a task over batches, in evaluation mode, on the device where the model is.

    The model's training mode is restored afterwards.

    Args:
        task: what to judge by.
        model: any module that takes `Task.inputs`: float, prepared, frozen or reloaded.
        batches: mappings of tensors; wrap the iterable to show progress.

    Returns:
        Metric name to value.

    Raises:
        ValueError: there was no batch.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    metrics = task.metrics().to(device)
    training, seen = model.training, False
    model.eval()
    try:
        for batch in batches:
            seen = True
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            task.update(metrics, model(**task.inputs(moved)), moved)
    finally:
        model.train(training)
    if not seen:
        raise ValueError("batches: expected at least one batch to evaluate on, got none")
    return {name: float(value) for name, value in metrics.compute().items()}
