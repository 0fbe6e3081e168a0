"""`QLinear`: an `nn.Linear` that trains with the weight it will be served with."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.functional import quantized_linear
from qat.quantizers.base import Quantized

__all__ = ["QLinear"]


class QLinear(QuantizedLayer, nn.Linear):
    """A linear layer with a fake-quantized weight and, if asked, fake-quantized inputs and outputs."""

    replaces: ClassVar[type[nn.Module]] = nn.Linear

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """``x W^T + b``."""
        if weight is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return quantized_linear(x, self.weight, self.bias, weight, self.weight_quantizer, self.active_input_quantizer())
