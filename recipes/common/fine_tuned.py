"""The fine-tuned float weights of a run, kept beside its checkpoint, so that a resumed run need not repeat them."""

from __future__ import annotations

from pathlib import Path

import lightning
from pydantic import BaseModel
from torch import nn

import qat

__all__ = ["FineTunedWeights"]

NAME = "fine_tuned.safetensors"
_ANY = {"resume", "output", "overwrite"}  # settings that make no difference to the weights


class FineTunedWeights:
    """Weights with the settings that they were trained with; data that changed behind equal settings is not noticed.

    Args:
        folder: where they are kept.
        config: the recipe's configuration.
        resume: the checkpoint that the run goes on from; weights of its run lie beside it.
    """

    def __init__(self, folder: Path, config: BaseModel, resume: Path | None) -> None:
        self._path, self._resumed = folder / NAME, None if resume is None else resume.parent / NAME
        self._settings = config.model_copy(update=dict.fromkeys(_ANY)).model_dump_json()

    def restore(self, model: nn.Module) -> bool:
        """Fill a model with the weights of the run that this one goes on from, if there are any of equal settings.

        Raises:
            LoadError: the file cannot be read.
        """
        from safetensors import safe_open
        from safetensors.torch import load_model

        path = self._resumed
        if path is None or not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                same = (file.metadata() or {}).get("settings") == self._settings
            if same:
                load_model(model, path)
        except Exception as error:  # a damaged file and one of another model have no common base
            raise qat.LoadError(
                f"resume: {str(path)!r} cannot be read ({' '.join(str(error).split())}): delete it, and the float "
                "model is trained again"
            ) from error
        return same

    def save(self, model: nn.Module, trainer: lightning.Trainer) -> None:
        """Keep the weights of a model that was just trained; of several processes, one writes."""
        from safetensors.torch import save_model

        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            save_model(model, str(partial), {"settings": self._settings})
            partial.replace(self._path)
