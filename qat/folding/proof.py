"""The proof that groups can be folded: with random factors, all outputs of a model stay what they are.

Compared are the outputs of the model, and parts of the outputs of all its linear layers, so that a group is not taken
for true because a block adds nothing yet. The factors reach far, so that what clamps or saturates shows itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError
from qat.files.examples import flatten_outputs
from qat.folding.groups import EXPONENTS, Group, linear_layers, power_of_two, watched
from qat.tensors import TOLERANCE

__all__ = ["Proof"]

_ROUNDED_EXPONENTS = 2  # of factors where a sum with 1 rounds
_ELEMENTS = 4096  # of each layer's output that are compared


class Proof:
    """What a model answers to one batch, and whether it still does when groups are folded.

    ``run`` runs the model on the batch, with the same random numbers every time.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self._layers, self._run = linear_layers(model), run
        self._wanted = self._outputs()
        if not self.holds([]):
            raise CalibrationError(
                "batches: two runs of batch 0 in evaluation mode differ, or give NaN, so that no fold can be proven: "
                "make the model deterministic, and leave caches out of the batch"
            )

    def proven(self, groups: Sequence[Group]) -> list[Group]:
        """Those of ``groups`` that can be folded."""
        kinds: dict[str, list[Group]] = defaultdict(list)
        for group in groups:
            kinds[group.kind].append(group)
        return [group for kind in kinds.values() for group in self._among(kind)]

    def _among(self, kind: list[Group]) -> list[Group]:
        if self._bears(kind):
            return kind
        if len(kind) == 1 or (len(kind) > 2 and not self._bears(kind[:1]) and not self._bears(kind[-1:])):
            return []  # where neither end can be folded, those between are not tried
        half = len(kind) // 2
        return self._among(kind[:half]) + self._among(kind[half:])

    def _bears(self, groups: list[Group]) -> bool:
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as undo:
            for group in groups:
                weight = next(iter(group.weights().values()))
                most = _ROUNDED_EXPONENTS if group.offset else EXPONENTS
                exponents = torch.randint(-most, most + 1, weight.shape[1:], generator=generator)
                if not group.fold(power_of_two(exponents).to(weight.device), undo):
                    return False
            return self.holds(groups)

    def holds(self, folded: Sequence[Group]) -> bool:
        """Whether all outputs are as before, but those of the producers of ``folded``."""
        tolerance = TOLERANCE["float32"] if any(group.offset for group in folded) else 0.0
        producers = {group.producer for group in folded}
        for name, found in self._outputs().items():
            wanted = self._wanted[name]
            if name.partition("#")[0] in producers or torch.equal(found, wanted):
                continue
            gap = (found.double() - wanted.double()).abs().max()
            if not bool(gap <= tolerance * wanted.abs().max()):
                return False
        return True

    def _outputs(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def note(name: str, _: Tensor, y: Tensor) -> None:
            seen[f"{name}#{len(seen)}"] = y.flatten()[:: y.numel() // _ELEMENTS + 1].clone()

        with watched(self._layers, note):
            outputs = flatten_outputs(self._run())
        return seen | {f"#{name}": tensor for name, tensor in outputs.items()}
