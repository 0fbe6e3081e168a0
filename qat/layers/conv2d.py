"""`QConv2d`: a convolution whose kernels are fake-quantized; a row of its matrix is what makes one output channel.

optimum-quanto computes it as torch does, from the dequantized weight: no kernel of its own, and no quantized input.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.functional import fake_quantized
from qat.quantizers.base import Quantized

__all__ = ["QConv2d"]


class QConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with a fake-quantized weight; only the loader of target ``quanto`` replaces one."""

    replaces: ClassVar[type[nn.Module]] = nn.Conv2d
    targets: ClassVar[tuple[str, ...]] = ("quanto",)
    linear: ClassVar[bool] = False
    float_by_default: ClassVar[str] = "convolution"

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        """The weight as ``(out, in / groups * height * width)``."""
        weight: Tensor = module.weight
        return weight.reshape(len(weight), -1)

    @staticmethod
    def stored_kernel(module: Any) -> tuple[int, ...]:
        """Height and width."""
        height, width = module.kernel_size
        return height, width

    @classmethod
    def adoption_fault(cls, module: nn.Module) -> str | None:
        """Also of weights whose rows are not contiguous."""
        if (fault := super().adoption_fault(module)) is not None:
            return fault
        if not module.weight.is_contiguous():  # type: ignore[operator]
            return "its weight is in channels_last order: call model.to(memory_format=torch.contiguous_format) first"
        return None

    def example_input(self, rows: int, generator: torch.Generator) -> Tensor:
        """Images from which at least one position of the kernel is computed."""
        sizes = (d * (k - 1) + 3 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return torch.randn(rows, self.in_channels, *sizes, generator=generator, device=generator.device)

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """The convolution: ``(rows, in, height, width)`` to ``(rows, out, ...)``."""
        if weight is None:
            return self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-any-return]
        value = fake_quantized(self.effective_weight(self), weight, self.weight_quantizer)
        return self._conv_forward(x, value.view_as(self.weight), self.bias)  # type: ignore[no-any-return]
