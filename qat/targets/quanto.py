"""Target ``quanto``: optimum-quanto's own directory and ``requantize``. Every module has its own type in the map.

What a class of diffusers keeps in float32, its forward computes with in float32, so it is kept here too.
"""

from __future__ import annotations

from typing import Any

from qat.targets.base import Target
from qat.targets.diffusers import DIFFUSERS, is_diffusers_model

__all__ = ["QUANTO"]


class _Quanto(Target):
    def kept_in_float32(self, model: Any, name: str, dtype: str) -> bool:
        """As the class of a diffusers model says; nothing in other models."""
        return is_diffusers_model(model) and DIFFUSERS.kept_in_float32(model, name, dtype)


QUANTO = _Quanto("quanto")
