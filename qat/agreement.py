"""What quantization changes in a model's answers: the frozen model against the float one, on batches held out.

The float model answers before it is prepared, and its answers wait in the memory of the CPU. So no second model is
held, and what is judged is what is served. `qat calibrate` prints the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.probing import kept_modes, run
from qat.tensors import map_tensors, model_device

__all__ = ["Agreement", "Answers", "agreement", "answers", "held_out"]


class Answers(NamedTuple):
    """What a model says of a batch."""

    values: Tensor
    """Float32, ``(predictions, classes)``."""
    are_logits: bool
    """Else they are hidden states."""


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


def answers(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Answers]:
    """What a float or a frozen model says of ``batches``, each a mapping of arguments, one after the other.

    Outputs are ``logits``, ``(..., classes)``, or else ``last_hidden_state``. Positions that an ``attention_mask``
    leaves out do not count where every position has an output.
    """
    device = model_device(model)
    for batch in batches:
        moved = map_tensors(lambda x: x.to(device), batch)
        with kept_modes(model), torch.no_grad():
            output = run(model.eval(), moved)
        logits, mask = getattr(output, "logits", None), moved.get("attention_mask")
        values: Tensor = output.last_hidden_state if logits is None else logits
        if type(values) is not Tensor:  # quanto's own, where the last layer quantizes its output
            values = values.dequantize()
        if mask is not None and mask.shape == values.shape[:-1]:
            values = values[mask.bool()]
        yield Answers(values.float().reshape(-1, values.shape[-1]), logits is not None)


@torch.no_grad()
def agreement(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], wanted: Iterable[Answers]) -> Agreement:
    """How near a frozen model is to the float one, whose answers to the same ``batches`` are ``wanted``."""
    count = predictions = 0
    kl = same = gap = size = 0.0
    for (found, are_logits), (expected, _) in zip(answers(model, batches), wanted, strict=True):
        expected = expected.to(found.device)
        count += 1
        gap += float((found - expected).square().sum())
        size += float(expected.square().sum())
        if are_logits:
            log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
            predictions += len(expected)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    total = max(predictions, 1)
    return Agreement(count, predictions, kl / total, same / total, gap / max(size, 1e-30))
