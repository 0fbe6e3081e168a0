"""What a quantizer is, and what an algorithm is.

A *quantizer* is a submodule beside a layer's weight (or at its input or output) that knows how to scale it. It owns
whatever is learned, as float32 parameters, and hands out scale and shift; the layer does the rest: the operator, the
straight-through gradient, the recomputation. So a new algorithm writes one method, `WeightQuantizer.scale_shift`, as
ordinary differentiable code on small tensors, and gets exact fake quantization, ``torch.compile``, freezing and
export with it.

An *algorithm* is the frozen configuration that makes quantizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qat import kernels, numerics

__all__ = ["Algorithm", "Final", "QuantizerModule", "WeightQuantizer"]


class Final(NamedTuple):
    """What is written to disk for one weight."""

    codes: Tensor
    """``(out, in)``: int8, float8_e4m3fn or uint8."""
    scale: Tensor
    """Serving dtype, ``(groups, 1)``."""
    shift: Tensor | None
    """Serving dtype, ``(groups, 1)``; None for 8-bit types."""


class QuantizerModule(nn.Module):
    """A module whose float32 state stays float32, whatever the model is cast to.

    A scale in bfloat16 cannot move by a thousandth of itself, and would change codes: so `Module.to(dtype)`, and
    with it Lightning's ``bf16-true``, moves a quantizer between devices but never narrows it.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype is torch.float32 and moved.is_floating_point() and moved.dtype is not torch.float32:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call,no-any-return]


class WeightQuantizer(QuantizerModule, ABC):
    """How one weight is scaled; abstract. Subclasses implement `scale_shift`.

    Args:
        qtype: the target format's name.
        dtype: the serving dtype.
        masked: stop the gradient of weights that lie outside the codes' range (needed once a range clips).

    Attributes:
        own_range: `serving` is exactly `kernels.serving_range`, so that a forward may find the range and quantize in
            one pass over the weight without calling it.
    """

    own_range: ClassVar[bool] = False

    def __init__(self, qtype: str, dtype: torch.dtype, *, masked: bool = False) -> None:
        super().__init__()
        self.qtype = qtype
        self.dtype = dtype
        self.masked = masked

    @abstractmethod
    def scale_shift(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and shift for ``weight``, before they are rounded to the serving dtype (`serving` does that).

        Args:
            weight: the master weight, ``(out, in)``, any float dtype.

        Returns:
            float32 tensors of shape ``(groups, 1)``; the shift is None for 8-bit types. Differentiable with respect
            to the quantizer's own parameters; the gradient that arrives is that of LSQ (Esser et al. 2020, eq. 3).
        """

    def serving(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and shift as the serving dtype holds them: float32, ``(groups, 1)``, straight-through."""
        scale, shift = self.scale_shift(weight)
        return numerics.serving_pair(scale, shift, self.qtype, self.dtype, weight.shape[1])

    @torch.no_grad()
    def fake_quantized(self, weight: Tensor) -> Tensor:
        """The weight that the fake-quantized forward uses now, in the serving dtype, by the training operator."""
        scale, shift = self.serving(weight)
        return kernels.fake_quantize_weight(weight, scale, shift, self.qtype, self.dtype, self.dtype)

    @torch.no_grad()
    def final(self, weight: Tensor) -> Final:
        """Codes, scale and shift, as they will be stored."""
        scale, shift = self.serving(weight)
        codes = numerics.encode(weight, scale, shift, self.qtype)
        return Final(codes, scale.to(self.dtype), None if shift is None else shift.to(self.dtype))

    def extra_repr(self) -> str:
        """The format, for ``print(model)``."""
        return f"{self.qtype}, dtype={str(self.dtype).removeprefix('torch.')}"


class Algorithm(BaseModel):
    """Configuration of how scales are found or learned; makes one quantizer a layer. Abstract."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Any

    @abstractmethod
    def make(self, weight: Tensor, qtype: str, dtype: torch.dtype) -> WeightQuantizer:
        """A quantizer for ``weight`` (``(out, in)``, read now if a start range is needed), on its device."""
