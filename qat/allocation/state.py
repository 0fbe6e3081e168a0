"""The damages found so far, in a file, so that a search that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qat.errors import StateError
from qat.files.weights import write_json
from qat.files.whole import whole_file
from qat.tensors import digest, map_tensors, stored_tensors

__all__ = ["State", "batches_digest", "model_digest"]


class State:
    """Layer to type to damage; with a path every addition is written, the file as a whole or not at all."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        """Read what an earlier search left; `StateError` where it had other ``facts``, or the file is none of ours."""
        self.damages: dict[str, dict[str, float]] = {}
        self._path, self._facts = path, facts
        if path is None:
            return
        if not path.parent.is_dir():
            raise StateError(f"state: there is no folder {str(path.parent)!r} for {path.name!r}: make it")
        if not path.exists():
            return
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            told = dict(fields["facts"])
            self.damages = {layer: {k: _damage(v) for k, v in own.items()} for layer, own in fields["damages"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"state: {str(path)!r} is no state of a search ({type(error).__name__}: {error}): name another file"
            ) from error
        differ = [key for key in facts if facts[key] != told.get(key)]
        if differ:
            raise StateError(
                f"state: {str(path)!r} belongs to a search with another {' and '.join(differ)}: name another file, or "
                "remove this one"
            )

    def add(self, layer: str, damages: dict[str, float]) -> None:
        """Note the damages of a layer."""
        self.damages[layer] = self.damages.get(layer, {}) | damages
        if self._path is not None:
            with whole_file(self._path) as made:
                write_json(made, {"facts": self._facts, "damages": self.damages})


def _damage(value: Any) -> float:
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"a damage of {value}")
    return float(value)


def model_digest(model: nn.Module) -> str:
    """Of class, names and numbers of a model."""
    parts = [
        type(model).__name__,
        *(f"{name} {tensor.dtype} {digest(tensor)}" for name, tensor in stored_tensors(model)),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def batches_digest(batches: Sequence[Any]) -> str:
    """Of all tensors, numbers and texts in batches, and of how they are named; of other things nothing is known."""
    leaves, names = tree_flatten(map_tensors(lambda tensor: tensor, list(batches)))  # tokenizers' mappings: dicts now
    parts = [str(len(batches)), str(names)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            parts.append(f"{leaf.dtype} {tuple(leaf.shape)} {digest(leaf)}")
        elif isinstance(leaf, str | int | float):
            parts.append(repr(leaf))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
