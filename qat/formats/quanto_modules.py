"""Modules of optimum-quanto's format that stand for other layers than linear ones."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from qat.formats.quanto_tinygemm import plain
from qat.layers import ExpertMatrix

__all__ = ["module_class"]


def module_class(like: nn.Module) -> Any:
    """The class of the module that holds the weight of a frozen layer, for the layer whose place it takes."""
    from optimum.quanto.nn import QLinear

    return expert_class() if isinstance(like, ExpertMatrix) else QLinear


@functools.cache
def expert_class() -> Any:
    """The class for an expert's matrix, made late, since quanto is imported late."""
    from optimum.quanto.nn import QLinear

    class QExpertMatrix(QLinear):  # type: ignore[misc]
        """An expert's packed matrix, which the module of all experts reads."""

        held_plain = True  # in no kernel's own order, since no kernel of quanto multiplies it

        def value(self) -> Tensor:
            """What the codes stand for, ``(out, in)``, in the serving dtype."""
            return plain(self.weight).dequantize()  # type: ignore[no-any-return]

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _empty, (), vars(self)

    return QExpertMatrix


def _empty() -> Any:
    cls = expert_class()
    return cls.__new__(cls)
