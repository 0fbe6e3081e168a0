"""What diffusion recipes have in their configurations, and what of it the reference pipeline decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from recipes.data.images import ImageData

__all__ = ["DiffusionConfig", "sequence", "source_of"]

REFERENCE = Path(__file__).parent.parent / "reference_flux"
REFERENCE_LENGTH = 16


class DiffusionConfig(Protocol):
    """What a recipe's configuration says of the data and of the pictures."""

    @property
    def model(self) -> str | None:
        """The pipeline's directory or hub name; none: the reference pipeline."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the pipeline may run."""

    @property
    def data(self) -> ImageData:
        """The images."""

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens a caption; none: the pipeline's own default, or what the reference pipeline was trained with."""

    @property
    def caption_dropout(self) -> float | None:
        """See `DiffusionCollate`."""

    @property
    def prompts(self) -> Sequence[str]:
        """What to draw; none: captions of the evaluation images."""

    @property
    def sampler_steps(self) -> int:
        """Steps of the sampler."""

    @property
    def seed(self) -> int:
        """Of the noise to evaluate with, of calibration and of the pictures."""


def source_of(config: DiffusionConfig) -> str:
    """Where the pipeline is."""
    return config.model or str(REFERENCE)


def sequence(config: DiffusionConfig) -> dict[str, Any]:
    """Return the length of captions in tokens, as an argument."""
    length = REFERENCE_LENGTH if Path(source_of(config)).resolve() == REFERENCE.resolve() else None
    return {"max_sequence_length": config.max_sequence_length or length}
