"""What models of a run were judged to be, kept so that a run that goes on need not judge them again."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from recipes.common.checkpoints import read_json, settings_of, write_json
from recipes.common.settings import RecipeConfig

__all__ = ["Judged"]

Scores = tuple[dict[str, float], list[float]]


class Judged:
    """Scores of models, and their loss for each batch, with the settings of the run.

    Args:
        folder: where they are kept.
        config: the recipe's configuration; what was judged with other settings does not count.
    """

    def __init__(self, folder: Path, config: RecipeConfig) -> None:
        self._path, self._settings = folder / "judged.json", settings_of(config)
        kept = read_json(self._path) or {}
        self._models: dict[str, list[object]] = kept["models"] if kept.get("settings") == self._settings else {}

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def __getitem__(self, name: str) -> Scores:
        scores, losses = self._models[name]
        return scores, losses  # type: ignore[return-value]

    def __setitem__(self, name: str, judged: Scores) -> None:
        self._models[name] = list(judged)
        rank_zero_only(write_json)(self._path, {"settings": self._settings, "models": self._models})
