"""What a quantizer is, and what an algorithm is.

A *quantizer* is a submodule beside a layer's weight (or at its input or output) that knows how to scale it. It owns
whatever is learned, as float32 parameters; the layer adds the straight-through gradient and the recomputation. An
*algorithm* is the frozen configuration that makes quantizers. docs/architecture.md shows how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat import kernels
from qat.numerics import FrozenWeight, QType
from qat.spec import NamedArguments

__all__ = ["Algorithm", "Quantized", "QuantizerModule", "WeightQuantizer"]


class Quantized(NamedTuple):
    """A fake-quantized weight, and the scales that made it."""

    value: Tensor
    """``(out, in)`` in the dtype that was asked for, without a gradient."""
    scale: Tensor
    """Serving scale, float32, ``(groups, 1)``; differentiable where it is learned."""
    shift: Tensor | None
    """Serving shift likewise; None for types without one."""


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
    """How one weight is scaled; abstract. Subclasses implement `quantize`.

    ``dtype`` is the serving dtype. ``masked`` stops the gradient of weights outside the codes' range, which is needed
    once a range clips. ``float8_backward`` is `Algorithm.float8_backward`, where weight and input are float8.
    """

    float8_backward = False

    def __init__(self, qtype: QType, dtype: torch.dtype, *, masked: bool = False) -> None:
        super().__init__()
        self.qtype = qtype
        self.dtype = dtype
        self.masked = masked

    @abstractmethod
    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Fake-quantize an effective master weight, ``(out, in)``, any float dtype.

        Most subclasses find a scale and a shift, differentiable with respect to the quantizer's own parameters, and
        return `by_scale` of them. The gradient that arrives there is that of LSQ (Esser et al. 2020, eq. 3). The result
        depends on nothing but the quantizer's state and ``weight``.
        """

    def quantize_to_codes(self, weight: Tensor) -> Quantized:
        """`quantize` with the codes, ``(out, in)`` in the type's `storage` dtype, in place of the values."""
        _, scale, shift = self.quantize(weight, self.dtype)
        fixed = None if shift is None else shift.detach()
        return Quantized(self.qtype.encode(weight, scale.detach(), fixed), scale, shift)

    def by_scale(self, weight: Tensor, scale: Tensor, shift: Tensor | None, out_dtype: torch.dtype) -> Quantized:
        """Fake-quantize by a scale and a shift, float32, ``(groups, 1)``, not yet rounded to the serving dtype."""
        return self.by_served(weight, *self.qtype.serve(scale, shift, self.dtype, weight.shape[1]), out_dtype)

    def by_served(self, weight: Tensor, scale: Tensor, shift: Tensor | None, out_dtype: torch.dtype) -> Quantized:
        """Fake-quantize by a scale and a shift that the serving dtype holds already."""
        fixed = None if shift is None else shift.detach()
        options = (self.qtype.key, self.dtype, out_dtype)
        value = kernels.fake_quantize_weight(weight.detach(), scale.detach(), fixed, *options)
        return Quantized(value, scale, shift)

    def awaited_start(self) -> str | None:
        """The start in `qat.starts.DATA_STARTS` that waits for data; `restart` then takes it. None: nothing waits."""
        return None

    def restart(self, low: Tensor | None, high: Tensor) -> None:
        """Begin with another range, float32, ``(groups, 1)``; only where a start is awaited."""
        raise NotImplementedError(f"{type(self).__name__}: awaits no start, so it takes none")

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[FrozenWeight, Tensor]:
        """The final codes, and the value that the fake-quantized forward used, in the serving dtype."""
        value = self.quantize(weight, self.dtype).value
        codes, scale, shift = self.quantize_to_codes(weight)
        codes = codes.contiguous()
        frozen = FrozenWeight(codes, scale.to(self.dtype), None if shift is None else shift.to(self.dtype), self.qtype)
        return frozen, value

    def extra_repr(self) -> str:
        """The type, for ``print(model)``."""
        return f"{self.qtype.name}, dtype={str(self.dtype).removeprefix('torch.')}"


class Algorithm(NamedArguments):
    """Configuration of how scales are found or learned; makes one quantizer a layer. Abstract."""

    kind: Any
    """Names the algorithm in a configuration file; a subclass has a literal here."""
    float8_backward: bool = False
    """Multiply gradients in float8 too, where weights and inputs are float8: faster, and no longer exact."""
    learn_activations: bool = False
    """Learn the scales of activations from where calibration left them (LSQ), with the rate of learned ranges."""
    static_activations: tuple[str, ...] = ()
    """Layers whose activations keep their calibrated scales all the same: ``fnmatch`` patterns on their names."""

    def learns_activations(self, name: str) -> bool:
        """Whether the activation scales of the layer called ``name`` are learned."""
        return self.learn_activations and not any(fnmatchcase(name, pattern) for pattern in self.static_activations)

    @abstractmethod
    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> WeightQuantizer:
        """A quantizer for ``weight`` (``(out, in)``, read now if a start range is needed), on its device."""
