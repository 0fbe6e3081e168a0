"""The algorithms: one file each, and one line each in `ALGORITHMS`.

`AnyAlgorithm` is what a configuration file may hold: the union of all, told apart by ``kind``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from qat.quantizers.base import Algorithm, Quantized, QuantizerModule, WeightQuantizer
from qat.quantizers.learned_affine import LearnedAffine
from qat.quantizers.straight_through import StraightThrough

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AnyAlgorithm",
    "LearnedAffine",
    "Quantized",
    "QuantizerModule",
    "StraightThrough",
    "WeightQuantizer",
    "any_of",
]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "straight_through": StraightThrough,
    "learned_affine": LearnedAffine,
}


def any_of(algorithms: Mapping[str, type[Algorithm]]) -> Any:
    """The type of a configuration field that may hold each of ``algorithms``."""
    return Annotated[reduce(or_, algorithms.values()), Field(discriminator="kind")]


if TYPE_CHECKING:
    AnyAlgorithm: TypeAlias = Algorithm
else:
    AnyAlgorithm = any_of(ALGORITHMS)
