"""CAGE: towards the end of training, weights are pulled to the values that they will be served with.

Straight-through gradients ignore the error of rounding. CAGE (https://arxiv.org/abs/2510.18784) adds it to the step of
the optimizer, decoupled as weight decay is: after the step, ``w -= lr * strength * (w - Q(w))``. Masters then end near
their codes, where the loss was measured. `QuantizationSchedule.cage_at` is the strength, which rises from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from qat.errors import TrainingError
from qat.layers import quantized_layers
from qat.training.schedule import QuantizationSchedule

__all__ = ["cage_step", "pull_after_steps"]


@torch.no_grad()
def cage_step(model: nn.Module, optimizer: Optimizer, strength: float) -> int:
    """Pull masters to their quantized values: ``w -= lr * strength * (w - Q(w))``, right after ``optimizer.step()``.

    lr is that of the group which holds the weight, and lr * strength counts as 1 at most: a weight stops at Q(w).
    Layers that do not fake-quantize now, weights that are not trained and those of other optimizers stay.

    Args:
        model: anything that contains prepared layers.
        optimizer: that has just stepped, before a scheduler changes its rates.
        strength: the factor lambda of arXiv 2510.18784, such as `QuantizationSchedule.cage_at` gives it; from 0.

    Returns:
        How many weights it is for.

    Raises:
        TrainingError: a weight is sharded (DTensor): its groups may lie on other devices.

    >>> import qat
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> _ = qat.prepare(model, qat.QuantSpec(weights="int4"))
    >>> optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.1))
    >>> cage_step(model, optimizer, strength=10.0)  # all the way
    1
    >>> quantizer, weight = model[0].weight_quantizer, model[0].weight.detach()
    >>> torch.equal(weight, quantizer.quantize(weight, torch.float32).value)
    True
    """
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    pulled, seen = 0, set[int]()
    for name, layer in quantized_layers(model):
        weight = layer.effective_weight(layer)
        owner = _owner(weight)
        if not layer.mode.weights or id(owner) not in rates or not owner.requires_grad:
            continue
        if hasattr(weight, "to_local"):
            raise TrainingError(
                f"cage: the weight of layer {name!r} is sharded: use a strategy that keeps weights whole"
            )
        if weight.data_ptr() in seen:  # a tied one is pulled once
            continue
        seen.add(weight.data_ptr())
        pulled += 1
        share = min(1.0, rates[id(owner)] * strength)
        if share > 0:
            weight.lerp_(layer.weight_quantizer.quantize(weight, weight.dtype).value, share)
    return pulled


def _owner(weight: Tensor) -> Tensor:
    """The parameter that a weight is, or is a view of; itself, where it is computed from several."""
    return weight if weight._base is None else weight._base


def pull_after_steps(
    model: nn.Module,
    schedule: QuantizationSchedule,
    optimizers: Sequence[Optimizer],
    step: Callable[[], int],
    steps: int | None,
    sharded: str | None = None,
) -> list[RemovableHandle]:
    """Have every optimizer be followed by `cage_step`, until the handles are removed; none without ``cage``.

    ``step`` tells how many of all ``steps`` are done before the one that an optimizer does; ``sharded`` names what
    shards parameters.

    Raises:
        TrainingError: the number of steps is not known, parameters are sharded, or no optimizer trains a master.
    """
    if not schedule.cage:
        return []
    given = f"schedule: cage={schedule.cage}"
    if steps is None:
        raise TrainingError(f"{given} needs the number of steps: set max_steps or max_epochs of the Trainer")
    if sharded is not None:
        raise TrainingError(f"{given} needs whole weights, which {sharded} shards: use ddp")
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    layers = [layer for _, layer in quantized_layers(model)]
    owners = [_owner(layer.effective_weight(layer)) for layer in layers]
    if not any(id(owner) in held and owner.requires_grad for owner in owners):
        raise TrainingError(
            f"{given} pulls trained weights of prepared layers, but no optimizer holds one: leave it out"
        )

    def pull(optimizer: Optimizer, *_: Any) -> None:
        cage_step(model, optimizer, schedule.cage_at(step(), steps))

    return [optimizer.register_step_post_hook(pull) for optimizer in optimizers]
