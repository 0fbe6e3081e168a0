"""The data of the recipes: texts, images, latents and noise. Nothing here knows of quantization."""

from qat.errors import QatError

__all__ = ["DataError"]


class DataError(QatError, ValueError):
    """The data is missing, empty, unreadable, or shorter than one block."""
