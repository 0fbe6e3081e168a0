"""What callbacks that average weights need of a prepared module.

An average of masters and of the moves of learned ranges is a model like any other: it is fake-quantized as a whole, so
validation judges it as it would be served, and freezing packs it. The starts of ranges, scales and statistics of
activations are buffers. They are no numbers to average, but must be copied as they are.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn

from qat.errors import TrainingError
from qat.layers import quantized_layers
from qat.starting import awaiting
from qat.training.schedule import QuantizationSchedule, planned_steps

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["come_first", "part_scales", "require_same_kind"]


def come_first(trainer: Trainer, callback: Callback) -> list[Callback]:
    """Move ``callback`` before those that average weights; return those that have copied the module by now.

    They copy it in ``setup``, which Lightning calls in the order of the callbacks, so theirs must be called again.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    earlier = callbacks[: callbacks.index(callback)]
    copied: list[Callback] = [
        other for other in earlier if isinstance(other, StochasticWeightAveraging | WeightAveraging)
    ]
    if copied:
        callbacks.remove(callback)
        callbacks.insert(callbacks.index(copied[0]), callback)
    return copied


def require_same_kind(trainer: Trainer, model: nn.Module, schedule: QuantizationSchedule) -> None:
    """Raise `TrainingError` when an average would mix what does not go together, or would never be one."""
    until = schedule.first_weights_until or 0
    # A start from data may change the masters, when quantization begins.
    from_step = schedule.settled_from if awaiting(model) else until
    setting = f"first_weights_until={until}" if from_step == until else f"start_step={from_step}"
    state = any(
        any(True for _ in child.buffers()) for _, layer in quantized_layers(model) for child in layer.children()
    )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if from_step and any(isinstance(other, StochasticWeightAveraging) for other in callbacks):
        raise TrainingError(
            f"callbacks: StochasticWeightAveraging starts by epochs, but ranges start again at {setting}: use "
            f"EMAWeightAveraging(use_buffers=False, update_starting_at_step={from_step})"
        )
    for other in _averages(trainer):
        name = type(other).__name__
        if other._use_buffers and state:
            raise TrainingError(
                f"callbacks: {name} would average buffers, such as starts of ranges and statistics: pass it "
                "use_buffers=False, which copies them"
            )
        if any(other.should_update(step_idx=step) for step in range(from_step)):
            raise TrainingError(
                f"callbacks: {name} averages from before {setting}, when ranges were others: let it start there "
                f"(EMAWeightAveraging(update_starting_at_step={from_step}))"
            )
        steps = planned_steps(trainer)
        if steps is not None and not _averages_within(other, steps, trainer):
            raise TrainingError(
                f"callbacks: {name} averages nothing in the {steps} steps of this fit (its update_starting_at_step is "
                f"{getattr(other, 'update_starting_at_step', None)}), and would end it with the weights from before: "
                "let it start earlier, train for more steps, or leave it out"
            )


def _averages_within(callback: WeightAveraging, steps: int, trainer: Trainer) -> bool:
    batches = steps * trainer.accumulate_grad_batches
    epochs = max(1, ceil(batches / trainer.num_training_batches)) if trainer.num_training_batches else 0
    return any(callback.should_update(step_idx=step) for step in reversed(range(steps))) or any(
        callback.should_update(epoch_idx=epoch) for epoch in reversed(range(epochs))
    )


def part_scales(trainer: Trainer, model: nn.Module) -> None:
    """Give each activation a scale of its own, so that a module and its copy have the same number of buffers."""
    if _averages(trainer):
        for _, layer in quantized_layers(model):
            for quantizer in layer.activation_quantizers():
                quantizer.part()


def _averages(trainer: Trainer) -> list[WeightAveraging]:
    return [other for other in trainer.callbacks if isinstance(other, WeightAveraging)]  # type: ignore[attr-defined]
