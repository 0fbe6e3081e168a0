"""What models of a run were judged to be, kept so that a run that goes on need not judge them again."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from recipes.common.checkpoints import read_json, settings_of, write_json
from recipes.common.settings import RecipeConfig

__all__ = ["Judged", "Scores"]

Scores = tuple[dict[str, float], list[float]]
"""Metric name to value, and the loss of each batch."""


class Judged:
    """Scores of models, their loss for each batch and the images that they drew, with the settings of the run.

    Args:
        folder: where they are kept.
        config: the recipe's configuration; what was judged with other settings does not count.
    """

    def __init__(self, folder: Path, config: RecipeConfig) -> None:
        self._path, self._settings = folder / "judged.json", settings_of(config)
        kept = read_json(self._path) or {}
        self._models: dict[str, list[Any]] = kept["models"] if kept.get("settings") == self._settings else {}

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def __getitem__(self, name: str) -> Scores:
        scores, losses, *_ = self._models[name]
        return scores, losses

    def images(self, name: str) -> list[Any]:
        """What a model drew, in the order in which it did."""
        from PIL import Image

        return [Image.open(io.BytesIO(base64.b64decode(image))) for image in self._models[name][2]]

    def keep(self, name: str, scores: dict[str, float], losses: list[float], images: Sequence[Any] = ()) -> None:
        """Note what a model was judged to be; ``images`` are Pillow's, and are kept without loss."""
        self._models[name] = [scores, losses, [_as_png(image) for image in images]]
        rank_zero_only(write_json)(self._path, {"settings": self._settings, "models": self._models})


def _as_png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
