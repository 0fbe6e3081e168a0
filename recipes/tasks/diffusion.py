"""Diffusion: say of noised latents which way the noise lies, whatever the scheduler means by that.

The loss is the mean squared error against the batch's target (noise, velocity, sample or flow: the data's affair),
computed in float32 whatever the model's dtype. A distillation compares with what the teacher says of the same noised
latents: a target without the noise that the true one has, since the teacher's answer is an average over all images that
could have become these latents.

How hard the task is depends on the timestep, and so does what quantization costs. So the loss is also kept by timestep
bin; and where batches carry a reference model's outputs, the error against these, which is zero for that model itself,
where the loss never is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from recipes.tasks.evaluation import Batch

__all__ = ["Diffusion", "prediction"]


@dataclass(frozen=True)
class Diffusion:
    """Prediction of noise, velocity, sample or flow; judged by timestep, too.

    Batches hold ``inputs`` (the model's keyword arguments), ``target`` (batch, ...), ``fraction`` (batch,), the place
    of each timestep in [0, 1), and where models are compared ``reference``, of the target's shape or the output's.
    """

    bins: int = 10
    """Equal parts of the timesteps, each with a loss of its own."""
    compares: bool = False
    """Whether batches carry a reference, so that there is the metric ``output_mse``."""

    def __post_init__(self) -> None:
        """Reject values that no loss can be made of."""
        if self.bins < 1:
            raise ValueError(f"bins: must be at least 1, got {self.bins}")

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the model's keyword arguments."""
        return dict(batch["inputs"])

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the mean squared error against the target."""
        return _squared_error(prediction(outputs, batch["target"]), batch["target"]).mean()

    def predictions(self, outputs: Any, batch: Batch) -> tuple[Tensor, None]:
        """Return what a distillation compares: noise, velocity, sample or flow, all of it."""
        return prediction(outputs, batch["target"]), None

    def metrics(self) -> MetricCollection:
        """Return ``loss``, one ``loss_bin_0`` ... for each part of the timesteps (not a number where none fell), and,
        where models are compared, ``output_mse``.
        """
        names = ["loss", *(f"loss_bin_{number}" for number in range(self.bins))]
        # A loss that is not a number is shown, not left out ("disable" would do that and drop the weights, in 1.9).
        named = {name: MeanMetric(nan_strategy=float("nan")) for name in [*names, *["output_mse"] * self.compares]}
        return MetricCollection(dict(named))

    def update(self, metrics: MetricCollection, outputs: Any, batch: Batch) -> None:
        """Add one batch, each example with equal weight."""
        found = prediction(outputs, batch["target"]).detach()
        errors = _squared_error(found, batch["target"]).flatten(1).mean(1)
        metrics["loss"].update(errors)
        places = (batch["fraction"] * self.bins).long()
        for number in range(self.bins):
            inside = places == number
            # An error that is not a number counts in its own bin only.
            metrics[f"loss_bin_{number}"].update(errors.where(inside, 0.0), weight=inside.to(errors.dtype))
        if self.compares:
            reference = prediction(batch["reference"], batch["target"])
            metrics["output_mse"].update(_squared_error(found, reference).flatten(1).mean(1))


def prediction(outputs: Any, target: Tensor) -> Tensor:
    """Take the prediction out of what a diffusion model returned.

    Args:
        outputs: a tensor, a tuple that begins with it, or an object that has it as ``sample``.
        target: what it is compared with. A model with twice as many channels (dimension 1) also predicts variances in
            the second half, which are left out, as its pipeline does.

    Raises:
        ValueError: the shapes do not fit.

    >>> import torch
    >>> prediction((torch.ones(1, 8, 2, 2),), torch.ones(1, 4, 2, 2)).shape
    torch.Size([1, 4, 2, 2])
    """
    found = outputs[0] if isinstance(outputs, tuple | list) else getattr(outputs, "sample", outputs)
    if not isinstance(found, Tensor):
        raise TypeError(f"outputs: expected a tensor or an object with a sample, got {type(outputs).__name__}")
    if found.shape != target.shape and found.ndim > 1 and found.shape[1] == 2 * target.shape[1]:
        found = found.chunk(2, dim=1)[0]
    if found.shape != target.shape:
        raise ValueError(f"outputs: expected the target's shape {tuple(target.shape)}, got {tuple(found.shape)}")
    return found


def _squared_error(found: Tensor, target: Tensor) -> Tensor:
    return (found.float() - target.float()).square()
