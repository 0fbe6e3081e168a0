"""optimum-quanto's types: their codes, and which elements share a scale.

int8 and float8 (e4m3fn) are symmetric with one scale a row. int4 and int2 are affine with a float shift. If a row is
longer than 128, it is cut into groups of the first of 128, 96, 64 and 32 that divides it. The size is not stored: every
loader computes it again (``QModuleMixin.__init__``), so no other choice can be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qat.numerics import Affine, QType, Symmetric

__all__ = ["QTYPES", "QTYPES_OF_QUANTO", "QUANTO_NAMES", "widened"]


@dataclass(frozen=True, kw_only=True)
class _Bytes(Symmetric):
    """int8 and float8."""

    def in_integers(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """The conditions of ``quanto::qbytes_mm``; https://github.com/huggingface/optimum-quanto, library/qbytes_mm.py.

        >>> QTYPES["int8"].in_integers(torch.ones(3, 5, dtype=torch.int8), torch.ones(2, 5, dtype=torch.int8))
        True
        """
        sizes = (*x.shape, weight.shape[0])
        fits = x.is_cpu or (x.is_cuda and x.shape[0] > 16 and all(size % 8 == 0 for size in sizes))
        return not self.floating and fits


@dataclass(frozen=True, kw_only=True)
class _Grouped(Affine):
    """int4 and int2.

    >>> [QTYPES["int4"].group_size(n) for n in (128, 256, 160, 192, 200)]
    [None, 128, 32, 96, None]
    """

    def group_size(self, in_features: int) -> int | None:
        if in_features <= 128:
            return None
        return next((size for size in (128, 96, 64, 32) if in_features % size == 0), None)

    def anchor(self, dtype: torch.dtype, in_features: int) -> int:
        """TinyGemm (int4, bfloat16, groups of 128) stores ``8 * scale - shift`` in bfloat16, and converts back."""
        tinygemm = self.bits == 4 and dtype is torch.bfloat16 and self.group_size(in_features) == 128
        return 8 if tinygemm else 0


def _types() -> dict[str, QType]:
    float8, uint8 = torch.float8_e4m3fn, torch.uint8
    types = (
        _Bytes(format="quanto", name="int8", bits=8, code_min=-128, code_max=127, steps=127, storage=torch.int8),
        _Bytes(format="quanto", name="float8", bits=8, code_min=-448, code_max=448, steps=448, storage=float8),
        _Grouped(format="quanto", name="int4", bits=4, code_min=0, code_max=15, steps=15, storage=uint8),
        _Grouped(format="quanto", name="int2", bits=2, code_min=0, code_max=3, steps=3, storage=uint8),
    )
    return {qtype.name: qtype for qtype in types}


QTYPES = _types()
QUANTO_NAMES = {"int8": "qint8", "float8": "qfloat8_e4m3fn", "int4": "qint4", "int2": "qint2"}
"""What quanto calls each type."""
QTYPES_OF_QUANTO = {QUANTO_NAMES[name]: qtype for name, qtype in QTYPES.items()}
"""The types by quanto's names."""


def widened(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes.to(dtype)`` of float8 codes on a CPU, by torch's own result for each of the 256: a fifth of the time."""
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(dtype)
    return table.index_select(0, codes.view(torch.uint8).reshape(-1).int()).view(codes.shape)
