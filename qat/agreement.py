"""What quantization changes in a model's answers: a prepared model against itself in float, on batches held out.

The prepared model is both: its layers run once with fake quantization, as they will be served, and once without. So no
second model is held. `qat calibrate` prints the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers import Mode, quantized_layers
from qat.probing import kept_modes, run
from qat.runs import note_runs, runs
from qat.tensors import map_tensors, model_device

__all__ = ["Agreement", "agreement", "held_out"]


@dataclass(frozen=True)
class Agreement:
    """How near a quantized model is to its float one."""

    batches: int
    predictions: int
    """Tokens of a language model, else examples; 0 for a model without logits."""
    kl: float
    """Mean KL divergence of the float model's distribution from the quantized one's, in nats."""
    top1: float
    """Share of predictions with the same most likely class."""
    error: float
    """Squared error of all outputs compared, relative to their squares."""

    def __str__(self) -> str:
        found = f"relative error of outputs {self.error**0.5:.2%}"
        if self.predictions:
            found = f"KL {self.kl:.4f} nats, top-1 agreement {self.top1:.2%} of {self.predictions} predictions"
        return f"against the float model on {self.batches} held-out batches: {found}"


def held_out(batches: list[Any], wanted: int) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate on, ``wanted`` or fewer, and those held out: the others, at least a fifth, spread evenly.

    One batch alone is calibrated on, and none is held out.

    >>> held_out([0, 1, 2, 3, 4, 5], 4)
    ([0, 2, 3, 5], [1, 4])
    """
    total = len(batches)
    count = 0 if total < 2 else max(total - wanted, total // 5, 1)
    chosen = {(2 * place + 1) * total // (2 * count) for place in range(count)}
    return [b for i, b in enumerate(batches) if i not in chosen], [b for i, b in enumerate(batches) if i in chosen]


@torch.no_grad()
def agreement(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Agreement:
    """Run a prepared and calibrated model on ``batches``, each a mapping of arguments, quantized and in float.

    Outputs are ``logits``, ``(..., classes)``, or else ``last_hidden_state``. Positions that an ``attention_mask``
    leaves out do not count where every position has an output.
    """
    count = predictions = 0
    kl = same = gap = size = 0.0
    device, layers = model_device(model), [layer for _, layer in quantized_layers(model)]
    with ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.callback(note_runs, model, runs(model))
        for layer in layers:
            stack.callback(setattr, layer, "mode", layer.mode)
            stack.callback(setattr, layer, "reached", layer.reached)
        model.eval()
        for batch in batches:
            moved = map_tensors(lambda x: x.to(device), batch)
            answers = []
            for mode in (Mode(weights=False, activations=False), Mode()):
                for layer in layers:
                    layer.mode = mode
                answers.append(_answers(run(model, moved), moved.get("attention_mask")))
            (wanted, are_logits), (found, _) = answers
            count += 1
            gap += float((found - wanted).square().sum())
            size += float(wanted.square().sum())
            if are_logits:
                log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
                predictions += len(wanted)
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
    total = max(predictions, 1)
    return Agreement(count, predictions, kl / total, same / total, gap / max(size, 1e-30))


def _answers(output: Any, mask: Tensor | None) -> tuple[Tensor, bool]:
    """The rows of a model's output, float32, ``(predictions, classes)``, and whether they are logits."""
    logits = getattr(output, "logits", None)
    values: Tensor = output.last_hidden_state if logits is None else logits
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.bool()]
    return values.float().reshape(-1, values.shape[-1]), logits is not None
