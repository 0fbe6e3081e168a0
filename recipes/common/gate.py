"""What a recipe says of its results: whether training had anything to gain, and whether it gained it.

Two models that are judged on the same batches differ by less than their losses vary from batch to batch. So the losses
are compared batch by batch: the mean of the differences, with its standard error (a paired t-test's two numbers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from statistics import fmean, stdev

import qat
from qat.formats import QUANTO
from qat.quantizers import Algorithm
from recipes.common.settings import OptimizationSettings

__all__ = ["Comparison", "Gate", "compare_losses"]

SURE = 2.0
"""Standard errors of the mean beyond which a difference is taken to be one."""


@dataclass(frozen=True)
class Comparison:
    """The loss of one model less that of another, over the same batches."""

    reference: str
    """The other model."""
    difference: float
    """Mean of the differences; above 0 where the model is worse than the reference."""
    standard_error: float
    """Of that mean."""
    batches: int
    """How many batches there were."""
    remark: str | None = None
    """What follows from it, in one sentence."""

    @property
    def worse(self) -> bool:
        """Whether the model is worse than the reference beyond the noise of the batches."""
        return self.difference > SURE * self.standard_error


def compare_losses(losses: Sequence[float], reference: str, reference_losses: Sequence[float]) -> Comparison | None:
    """Compare the losses of two models, batch by batch.

    Args:
        losses: one for each batch.
        reference: name of the other model.
        reference_losses: its losses on the same batches in the same order.

    Returns:
        The comparison; None where there are fewer than two batches, or a loss is no finite number.

    Raises:
        ValueError: the numbers of batches differ.

    >>> found = compare_losses([2.0, 4.0, 3.1], "float", [1.9, 3.9, 3.0])
    >>> round(found.difference, 3), found.worse
    (0.1, True)
    """
    if len(losses) != len(reference_losses):
        raise ValueError(f"losses: {len(losses)} batches cannot be paired with {len(reference_losses)}: use the same")
    differences = [own - other for own, other in zip(losses, reference_losses, strict=True)]
    if len(differences) < 2 or not all(map(isfinite, differences)):
        return None
    error = stdev(differences) / sqrt(len(differences))
    return Comparison(reference, fmean(differences), error, len(differences))


class Gate:
    """Says early when post-training quantization is good enough, and at the end when training was no better.

    Each is one sentence, printed where it is known. Nothing is said of models that were not judged.

    Args:
        losses: the losses of each model by its name, one a batch, on the same batches; filled while the run goes on.
        tuned: name of the fine-tuned float model.
        quantized: name of that model after post-training quantization.
        trained: name of the model after quantization-aware training.
        settings: of the training, so that the sentence can say what to change.
        spec: what is quantized, for the same reason.
        algorithm: how scales are found, for the same reason.
    """

    def __init__(
        self,
        losses: Mapping[str, list[float]],
        tuned: str,
        quantized: str,
        trained: str,
        settings: OptimizationSettings,
        spec: qat.QuantSpec,
        algorithm: Algorithm,
    ) -> None:
        self._losses, self._settings = losses, settings
        self._other_algorithm = _other_algorithm(spec, algorithm)
        self._tuned, self._quantized, self._trained = tuned, quantized, trained
        self.found: dict[str, Comparison] = {}
        """What was compared so far, by the name of the model."""

    def before_training(self) -> None:
        """Compare post-training quantization with the fine-tuned float model."""
        found = self._compare(self._quantized, self._tuned)
        if found is not None and not found.worse:
            self._say(
                self._quantized,
                f"note: post-training quantization is within noise of the fine-tuned float model ({_shown(found)}): "
                "training can gain nothing that these batches show; quantize to fewer bits, or evaluate on more data",
            )

    def after_training(self) -> None:
        """Compare quantization-aware training with post-training quantization."""
        found, settings = self._compare(self._trained, self._quantized), self._settings
        if found is None or not found.worse:
            return
        changes = [f"optimization.learning_rate (now {settings.learning_rate:g}: try a third, and three times as much)"]
        if settings.steps < 400:  # from there on ranges from the clip search end as well or better
            changes += self._other_algorithm
        if settings.distillation.weight < 1:
            changes.append(f"optimization.distillation.weight (now {settings.distillation.weight:g}: try 1)")
        changes.append(f"optimization.steps (now {settings.steps}: try four times as many)")
        self._say(
            self._trained,
            f"warning: quantization-aware training ended worse than post-training quantization ({_shown(found)}): "
            f"change one at a time: {', '.join(changes)}",
        )

    def _compare(self, name: str, reference: str) -> Comparison | None:
        if name not in self._losses or reference not in self._losses:
            return None
        found = compare_losses(self._losses[name], reference, self._losses[reference])
        if found is not None:
            self.found[name] = found
        return found

    def _say(self, name: str, remark: str) -> None:
        self.found[name] = replace(self.found[name], remark=remark)
        print(remark)


def _other_algorithm(spec: qat.QuantSpec, algorithm: Algorithm) -> list[str]:
    """What is best for the type of most layers, where another algorithm or start is set."""
    qtype = QUANTO.qtypes[spec.weights]
    now, best = algorithm.for_type(qtype), qat.Automatic(start="best").for_type(qtype)
    start = getattr(best, "start", None)
    if now.kind != best.kind:
        return [f"algorithm (now {now.kind}: try {best.kind}{f' with start {start}' if start else ''})"]
    if (given := getattr(now, "start", None)) != start:
        return [f"algorithm.start (now {given}: try {start})"]
    return []


def _shown(found: Comparison) -> str:
    return f"loss {found.difference:+.2g} ± {found.standard_error:.2g} over {found.batches} batches"
