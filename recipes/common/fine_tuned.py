"""The fine-tuned float weights of a run, kept beside its checkpoints, so that it need not repeat them."""

from __future__ import annotations

from pathlib import Path

import lightning
from torch import nn

from qat.files.whole import explained, whole_file
from recipes.common.checkpoints import note, settings_of, whole
from recipes.common.settings import RecipeConfig

__all__ = ["FineTunedWeights"]

NAME = "fine_tuned.safetensors"


class FineTunedWeights:
    """Weights with the settings that they were trained with; data that changed behind equal settings is not noticed.

    Args:
        folder: where they are kept.
        config: the recipe's configuration. Those beside the checkpoint that it resumes from are used too.
    """

    def __init__(self, folder: Path, config: RecipeConfig) -> None:
        self._path, self._settings = folder / NAME, settings_of(config)
        self._places = [self._path] if config.resume is None else [self._path, config.resume.parent / NAME]

    def restore(self, model: nn.Module) -> bool:
        """Fill a model with the weights, if whole ones of equal settings are there."""
        from safetensors.torch import load_model

        for path in self._places:
            about = whole(path) if path.is_file() else None
            if about is not None and about.get("settings") == self._settings:
                load_model(model, path)
                return True
        return False

    def save(self, model: nn.Module, trainer: lightning.Trainer) -> None:
        """Keep the weights of a model that was just trained; of several processes, one writes."""
        from safetensors.torch import save_model

        if trainer.is_global_zero:
            with explained(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self._path) as made:
                save_model(model, str(made))
            note(self._path, settings=self._settings)
