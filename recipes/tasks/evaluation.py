"""How a model is judged by a task.

A task never calls the model: whoever trains decides about autocast, teachers and gradients, calls the model with the
task's inputs and hands the outputs back. So one task serves a Lightning module, a plain loop and an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from recipes.data.tensors import move

if TYPE_CHECKING:
    from qat.training.task import Task

__all__ = ["Batch", "evaluate"]

Batch: TypeAlias = Mapping[str, Any]
"""Names to tensors, or to nested dictionaries, lists and tuples of tensors and plain values."""


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    dtype: torch.dtype | None = None,
    losses: list[float] | None = None,
) -> dict[str, float]:
    """Judge a model by a task over batches, in evaluation mode, on the device where the model is.

    The training mode of each of the model's modules is restored afterwards.

    Args:
        task: what to judge by.
        model: any module that takes the task's inputs: float, prepared, frozen or reloaded.
        batches: what the task takes; wrap the iterable to show progress.
        dtype: what floating inputs are cast to (see `move`), for a model that serves in a narrow dtype; none: nothing.
        losses: a list that gets the task's loss of each batch, to compare models batch by batch.

    Returns:
        Metric name to value.

    Raises:
        ValueError: there was no batch.
    """
    # Of packed weights that stock code loaded, the wrapper may say meta where the numbers lie on the CPU.
    devices = (tensor.device for tensor in model.parameters() if not tensor.is_meta)
    device = next(devices, torch.device("cpu"))
    metrics = task.metrics().to(device)
    for metric in metrics.values():
        metric.distributed_available_fn = bool  # false: each process sees all batches, and at the end one judges alone
    modes, seen = [(module, module.training) for module in model.modules()], False
    model.eval()
    try:
        for batch in batches:
            seen = True
            moved = move(batch, device)
            outputs = model(**move(task.inputs(moved), device, dtype))
            task.update(metrics, outputs, moved)
            if losses is not None:
                losses.append(float(task.loss(outputs, moved)))
    finally:
        for module, training in modes:  # one by one: a part that the user keeps in evaluation mode stays there
            module.training = training
    if not seen:
        raise ValueError("batches: expected at least one batch to evaluate on, got none")
    return {name: float(value) for name, value in metrics.compute().items()}
