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
from torch.utils._pytree import tree_map
from torchmetrics import MetricCollection

__all__ = ["Batch", "Task", "evaluate", "move"]

Batch: TypeAlias = Mapping[str, Any]
"""Names to tensors, or to nested dictionaries, lists and tuples of tensors and plain values."""


class Task(ABC):
    """The loss and the metrics of one task."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
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


def move(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return a batch with its tensors on a device, however deep they lie.

    Args:
        batch: names to anything; what is no tensor stays as it is.
        device: where to.
        dtype: also what floating tensors of two and more dimensions are cast to, as whoever serves a model brings
            them. One number an example (a timestep, a guidance scale) keeps its dtype, as with most pipelines; the few
            that round timesteps to the dtype of the latents first (Flux, QwenImage) have models that would do it next.

    >>> move({"a": [torch.ones(2, 2)], "b": None}, torch.device("cpu"), torch.bfloat16)["a"][0].dtype
    torch.bfloat16
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        cast = dtype is not None and leaf.is_floating_point() and leaf.ndim > 1
        return leaf.to(device, dtype) if cast else leaf.to(device)

    return {name: tree_map(moved, value) for name, value in batch.items()}


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Batch], dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Judge a model by a task over batches, in evaluation mode, on the device where the model is.

    The training mode of each of the model's modules is restored afterwards.

    Args:
        task: what to judge by.
        model: any module that takes `Task.inputs`: float, prepared, frozen or reloaded.
        batches: what the task takes; wrap the iterable to show progress.
        dtype: what floating inputs are cast to (see `move`), for a model that serves in a narrow dtype; none: nothing.

    Returns:
        Metric name to value.

    Raises:
        ValueError: there was no batch.
    """
    # Of packed weights that stock code loaded, the wrapper may say meta where the numbers lie on the CPU.
    devices = (tensor.device for tensor in model.parameters() if not tensor.is_meta)
    device = next(devices, torch.device("cpu"))
    metrics = task.metrics().to(device)
    modes, seen = [(module, module.training) for module in model.modules()], False
    model.eval()
    try:
        for batch in batches:
            seen = True
            moved = move(batch, device)
            task.update(metrics, model(**move(task.inputs(moved), device, dtype)), moved)
    finally:
        for module, training in modes:  # one by one: a part that the user keeps in evaluation mode stays there
            module.training = training
    if not seen:
        raise ValueError("batches: expected at least one batch to evaluate on, got none")
    return {name: float(value) for name, value in metrics.compute().items()}
