"""The algorithms: one file each, and one entry each in `AnyAlgorithm`, the type that a configuration file may hold."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from qat.quantizers.automatic import Automatic
from qat.quantizers.base import Algorithm, Quantized, QuantizerModule, WeightQuantizer
from qat.quantizers.learned_affine import LearnedAffine
from qat.quantizers.straight_through import StraightThrough

__all__ = [
    "Algorithm",
    "AnyAlgorithm",
    "Automatic",
    "LearnedAffine",
    "Quantized",
    "QuantizerModule",
    "StraightThrough",
    "WeightQuantizer",
]

AnyAlgorithm: TypeAlias = Annotated[Automatic | StraightThrough | LearnedAffine, Field(discriminator="kind")]
