"""The formats: one file each, and one entry each in `FORMATS`."""

from __future__ import annotations

from qat.formats.base import Format, FrozenLayer, InLibrary, LayerTypes, Notice, Slot
from qat.formats.quanto import QUANTO

__all__ = ["FORMATS", "QUANTO", "Format", "FrozenLayer", "InLibrary", "LayerTypes", "Notice", "Slot"]

FORMATS: dict[str, Format] = {QUANTO.name: QUANTO}
