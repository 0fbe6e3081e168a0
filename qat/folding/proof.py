"""The proof that groups can be folded: with random factors, all outputs of a model stay what they are.

Compared are elements of the model's outputs, and of the outputs of all its linear layers, so that a group is not taken
for true because a block adds nothing yet. The factors reach far, so that what clamps or saturates shows itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.errors import CalibrationError
from qat.files.examples import flatten_outputs
from qat.folding.groups import EXPONENTS, Group, linear_layers, power_of_two
from qat.probing import watched
from qat.tensors import TOLERANCE

__all__ = ["Proof", "agree", "elements"]

_ROUNDED_EXPONENTS = 2  # of factors where a sum with 1 rounds
_ELEMENTS = 1 << 14  # of each output that are compared


def elements(outputs: Any) -> dict[str, Tensor]:
    """Elements of each tensor in a model's outputs, always those at the same places, and its numbers."""
    found = {name: _some(tensor) for name, tensor in flatten_outputs(outputs).items()}
    for index, leaf in enumerate(tree_leaves(outputs)):
        if isinstance(leaf, bool | int | float | np.ndarray):
            found[f"number {index}"] = _some(torch.as_tensor(leaf))
    if not found:
        raise CalibrationError(
            f"model: returns a {type(outputs).__name__} without tensors that could be compared, so that no fold can be "
            "proven: wrap the model in a module that returns them, or return them from forward"
        )
    return found


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    if len(flat) <= _ELEMENTS:
        return flat.clone()
    return flat[torch.randint(len(flat), (_ELEMENTS,), generator=torch.Generator().manual_seed(0)).to(flat.device)]


def agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], groups: Iterable[Group]) -> bool:
    """Whether elements are equal; where one of the folded ``groups`` rounds, whether they are close."""
    tolerance = TOLERANCE["float32"] if any(group.offset for group in groups) else 0.0
    for name, tensor in found.items():
        expected = wanted.get(name)
        if expected is None or expected.shape != tensor.shape:  # as where a loop goes on for longer
            return False
        if not torch.equal(tensor, expected):
            gap = (tensor.double() - expected.double()).abs().max()
            if not bool(gap <= tolerance * expected.abs().max()):
                return False
    return True


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
        producers = {group.producer for group in folded}
        found = {key: y for key, y in self._outputs().items() if key.partition("#")[0] not in producers}
        return agree(found, self._wanted, folded)

    def _outputs(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def note(name: str, _: Tensor, y: Tensor) -> None:
            seen[f"{name}#{len(seen)}"] = _some(y)

        with watched(self._layers, note):
            outputs = elements(self._run())
        return seen | {f"#{name}": tensor for name, tensor in outputs.items()}
