"""`QLinear`: an `nn.Linear` that trains with the weight it will be served with."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.functional import autocast_dtype, quantized_linear
from qat.quantizers.activation import ActivationQuantizer
from qat.quantizers.base import Quantized

__all__ = ["QLinear"]


class QLinear(QuantizedLayer, nn.Linear):
    """A linear layer with a fake-quantized weight and, if asked, fake-quantized inputs and outputs."""

    replaces: ClassVar[type[nn.Module]] = nn.Linear

    def multiplies_codes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Where weight and input have codes of one 8-bit type, and nothing is rounded to another dtype than served."""
        activation, quantizer = self.active_input_quantizer(), self.weight_quantizer
        same = activation is not None and activation.qtype.storage is quantizer.qtype.storage
        served = dtype is quantizer.dtype and (x.dtype is dtype or autocast_dtype(x) is dtype)
        return same and served and quantizer.qtype.fused and not quantizer.qtype.has_shift

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """``x W^T + b``."""
        if weight is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return quantized_linear(x, self.weight, self.bias, weight, self.weight_quantizer, self.active_input_quantizer())

    def compute_quantized(self, x: Tensor, weight: Quantized, output: ActivationQuantizer) -> Tensor:
        """The same with a fake-quantized output."""
        options = (self.weight_quantizer, self.active_input_quantizer(), output)
        return quantized_linear(x, self.weight, self.bias, weight, *options)
