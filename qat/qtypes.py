"""The target formats of values, and the one rule about groups, stated once and without torch.

A *qtype* is what a weight or an activation is stored as: ``int8`` and ``float8`` (e4m3fn) are symmetric with one
scale a row; ``int4`` and ``int2`` are affine, with a scale and a shift for each group of a row. The numbers are
those of optimum-quanto's format (https://github.com/huggingface/optimum-quanto), which every target here shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["QTYPES", "ActivationType", "QType", "ServingDtype", "WeightType", "group_size"]

WeightType = Literal["int8", "float8", "int4", "int2"]
ActivationType = Literal["int8", "float8"]
ServingDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class QType:
    """One target format: its bits, its range of codes, and whether a group has a shift."""

    name: str
    bits: int
    code_min: float
    code_max: float
    scale_max: float
    """The code that the largest magnitude maps to (127 for int8, although -128 exists)."""
    affine: bool
    floating: bool
    quanto_name: str
    """What ``quanto_qmap.json`` calls it."""
    storage: str
    """torch's name of the stored dtype (4- and 2-bit codes are packed into uint8)."""


QTYPES: dict[str, QType] = {
    "int8": QType("int8", 8, -128, 127, 127, False, False, "qint8", "int8"),
    "float8": QType("float8", 8, -448, 448, 448, False, True, "qfloat8_e4m3fn", "float8_e4m3fn"),
    "int4": QType("int4", 4, 0, 15, 15, True, False, "qint4", "uint8"),
    "int2": QType("int2", 2, 0, 3, 3, True, False, "qint2", "uint8"),
}


def group_size(qtype: str, in_features: int) -> int | None:
    """Elements of a row that share one scale, as every loader of the format recomputes it; None: the whole row.

    The size is not stored in a file, so no other choice can be loaded (``QModuleMixin.__init__`` in
    optimum-quanto): 8-bit types never have groups; otherwise, if a row is longer than 128, the first of 128, 96,
    64 and 32 that divides it.

    >>> [group_size("int4", n) for n in (128, 256, 160, 192, 200)]
    [None, 128, 32, 96, None]
    >>> group_size("int8", 256) is None
    True
    """
    if not QTYPES[qtype].affine or in_features <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if in_features % size == 0), None)
