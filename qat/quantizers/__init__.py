"""The algorithms: one file each, and one entry each in `AnyAlgorithm`, the type that a configuration file may hold."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from qat.quantizers.automatic import Automatic
from qat.quantizers.base import Algorithm, Quantized, QuantizerModule, WeightQuantizer
from qat.quantizers.dual_lsq import DualLSQ
from qat.quantizers.learned_affine import LearnedAffine
from qat.quantizers.learned_clipping import LearnedClipping
from qat.quantizers.straight_through import StraightThrough
from qat.quantizers.stretched_elastic import StretchedElastic

__all__ = [
    "Algorithm",
    "AnyAlgorithm",
    "Automatic",
    "DualLSQ",
    "LearnedAffine",
    "LearnedClipping",
    "Quantized",
    "QuantizerModule",
    "StraightThrough",
    "StretchedElastic",
    "WeightQuantizer",
]

AnyAlgorithm: TypeAlias = Annotated[
    Automatic | StraightThrough | LearnedAffine | StretchedElastic | DualLSQ | LearnedClipping,
    Field(discriminator="kind"),
]
