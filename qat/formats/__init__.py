"""The formats: one file each, and one entry each in `FORMATS`."""

from __future__ import annotations

from qat.formats.base import Format, FrozenLayer, InLibrary, LayerTypes, Notice, Slot
from qat.formats.compressed_tensors import COMPRESSED_TENSORS
from qat.formats.gguf import GGUF, GGUF_FLOAT16
from qat.formats.quanto import QUANTO

__all__ = [
    "COMPRESSED_TENSORS",
    "FORMATS",
    "GGUF",
    "GGUF_FLOAT16",
    "QUANTO",
    "Format",
    "FrozenLayer",
    "InLibrary",
    "LayerTypes",
    "Notice",
    "Slot",
]

FORMATS: dict[str, Format] = {format.name: format for format in (QUANTO, COMPRESSED_TENSORS, GGUF, GGUF_FLOAT16)}
