"""Layers that compute ``x W^T + b``; `QLinear` is an `nn.Linear` that trains with the weight it will be served with."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.functional import Recipe, autocast_dtype, quantized_linear
from qat.quantizers.activation import ActivationQuantizer
from qat.quantizers.base import Quantized

__all__ = ["LinearForm", "QLinear"]


class LinearForm(QuantizedLayer):
    """A layer that computes ``x W^T + b`` of its effective weight W, ``(out, in)``; abstract."""

    bias: Any

    def recipe(self) -> Recipe | None:
        """How backward computes the effective weight again, where that is computed; None: it is a parameter."""
        return None

    def multiplies_codes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Where weight and input have codes of one 8-bit type, and nothing is rounded to another dtype than served."""
        activation, quantizer = self.active_input_quantizer(), self.weight_quantizer
        same = activation is not None and activation.qtype.storage is quantizer.qtype.storage
        served = dtype is quantizer.dtype and (x.dtype is dtype or autocast_dtype(x) is dtype)
        qtype = quantizer.qtype
        return same and served and qtype.fused and qtype.multiplies and not qtype.has_shift

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """``x W^T + b``."""
        master = self.effective_weight(self)
        if weight is None:
            return nn.functional.linear(x, master, self.bias)
        options = (self.weight_quantizer, self.active_input_quantizer(), None, self.recipe())
        return quantized_linear(x, master, self.bias, weight, *options)

    def compute_quantized(self, x: Tensor, weight: Quantized, output: ActivationQuantizer) -> Tensor:
        """The same with a fake-quantized output."""
        options = (self.weight_quantizer, self.active_input_quantizer(), output, self.recipe())
        return quantized_linear(x, self.effective_weight(self), self.bias, weight, *options)


class QLinear(LinearForm, nn.Linear):
    """A linear layer with a fake-quantized weight and, if asked, fake-quantized inputs and outputs."""

    replaces: ClassVar[type[nn.Module]] = nn.Linear
