"""What all settings of the recipes have in common: frozen, no unknown keys, and numbers that machines can hold."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Settings", "Whole"]

_MOST = 2**31

Whole: TypeAlias = Annotated[int, Field(ge=0, lt=_MOST)]
"""A number of things, which may be none."""
Count: TypeAlias = Annotated[int, Field(ge=1, lt=_MOST)]
"""A number of things, of which there is one at least."""


class Settings(BaseModel):
    """A section of a configuration; infinity and nan are no numbers of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
