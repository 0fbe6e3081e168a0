"""The algorithms: one file each, and one line each in `ALGORITHMS`.

`AnyAlgorithm` is what a configuration file may hold: the union of all, told apart by ``kind``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qat.quantizers.base import Algorithm, Final, QuantizerModule, WeightQuantizer
from qat.quantizers.straight_through import StraightThrough

__all__ = ["ALGORITHMS", "Algorithm", "AnyAlgorithm", "Final", "QuantizerModule", "StraightThrough", "WeightQuantizer"]

AnyAlgorithm = Annotated[StraightThrough, Field()]
"""Every shipped algorithm; becomes ``A | B`` with ``discriminator="kind"`` when there is a second."""

ALGORITHMS: dict[str, type[Algorithm]] = {"straight_through": StraightThrough}
