"""Classification: choose one class for an example, an image or a text.

The loss is the mean cross entropy. Accuracy says how often the model is right. Macro F1 counts every class alike,
however rare. The calibration error says whether the model is as sure as it should be, which quantization can change
while the accuracy stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from recipes.tasks.evaluation import Batch
from recipes.tasks.logits import LogitTask, logits_of

__all__ = ["Classification"]


@dataclass(frozen=True, kw_only=True)
class Classification(LogitTask):
    """One class of several.

    Batches hold ``labels`` (batch,), integers below ``classes``; anything else goes to the model, whose logits are
    (batch, classes).

    >>> import torch
    >>> task = Classification(classes=2)
    >>> batch = {"labels": torch.tensor([0, 1, 1, 1])}
    >>> metrics = task.metrics()
    >>> task.update(metrics, torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]]), batch)
    >>> float(metrics.compute()["accuracy"])
    0.75
    """

    classes: int
    """How many classes there are, at least two."""

    def __post_init__(self) -> None:
        """Reject values that no loss and no metric can be made of."""
        if self.classes < 2:
            raise ValueError(f"classes: must be at least 2, got {self.classes}")

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy over the examples, in float32."""
        return functional.cross_entropy(logits.float(), batch["labels"])

    def metrics(self) -> MetricCollection:
        """Return ``loss`` (nats an example), ``accuracy``, ``macro_f1`` and ``calibration_error``.

        The calibration error is the expected one, over 15 bins of the confidence (Guo 2017, "On calibration of modern
        neural networks", equation 3).
        """
        return MetricCollection(
            {
                # A loss that is not a number is shown, not left out.
                "loss": MeanMetric(nan_strategy=float("nan")),
                "accuracy": MulticlassAccuracy(self.classes, average="micro"),
                "macro_f1": MulticlassF1Score(self.classes, average="macro"),
                "calibration_error": MulticlassCalibrationError(self.classes, n_bins=15, norm="l1"),
            },
            compute_groups=False,  # which would share states that `update` fills one by one
        )

    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch, each example with equal weight."""
        logits, labels = logits_of(outputs).detach().float(), batch["labels"]
        metrics["loss"].update(functional.cross_entropy(logits, labels), weight=len(labels))
        probabilities = logits.softmax(dim=-1)
        for name in ("accuracy", "macro_f1", "calibration_error"):
            metrics[name].update(probabilities, labels)
