"""What diffusion recipes have in their configurations, and what of it the reference pipeline decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from recipes.common.settings import RecipeConfig
from recipes.data.images import ImageData
from recipes.data.settings import Count

__all__ = ["DiffusionConfig", "sequence", "source_of"]

REFERENCE = Path(__file__).parent.parent / "reference_flux"
REFERENCE_LENGTH = 16


class DiffusionConfig(RecipeConfig):
    """What a recipe lets a user choose of the images, and of the pictures that its models draw."""

    data: ImageData = ImageData()
    """The images and captions to train and to evaluate on."""
    max_sequence_length: Count | None = None
    """Tokens a caption; none: 16 with the reference pipeline, otherwise the pipeline's own default."""
    caption_dropout: float | None = Field(default=None, ge=0, le=1)
    """Share of training images that lose their caption; none: a tenth where the pipeline guides without one, else 0."""
    prompts: tuple[str, ...] = ()
    """What the pictures at the end show; none: eight captions of the evaluation images."""
    sampler_steps: Count = Field(default=20, ge=2)
    """Steps of the sampler, for the pictures and for calibration."""


def source_of(config: DiffusionConfig) -> str:
    """Where the pipeline is."""
    return config.model or str(REFERENCE)


def sequence(config: DiffusionConfig) -> dict[str, Any]:
    """Return the length of captions in tokens, as an argument."""
    length = REFERENCE_LENGTH if Path(source_of(config)).resolve() == REFERENCE.resolve() else None
    return {"max_sequence_length": config.max_sequence_length or length}
