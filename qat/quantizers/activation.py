"""Quantizers for activations: one static scale a tensor, from an observer.

Stock loaders quantize with a stored scalar, so training does too. Where an input arrives already quantized (the
producer's output went through nothing but a relu or a view), the stock layer ignores its own input scale;
`ActivationQuantizer.arrives_quantized` marks those, and training skips their input quantization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat import kernels
from qat.errors import CalibrationError
from qat.numerics import QType, round_to, smallest_scale
from qat.observers import Observer, ObserverChoice
from qat.quantizers.base import QuantizerModule

__all__ = ["ActivationQuantizer", "fake_quantize_output"]


class ActivationQuantizer(QuantizerModule):
    """A static scale for one activation, rounded to the serving dtype, and the observer and rule it comes from.

    ``qtype`` is a symmetric type.
    """

    scale: Tensor

    def __init__(self, qtype: QType, dtype: torch.dtype, rule: ObserverChoice) -> None:
        super().__init__()
        self.qtype = qtype
        self.dtype = dtype
        self.rule = rule
        self.observer = Observer()
        self.register_buffer("scale", torch.zeros((), dtype=torch.float32))
        # Python values: a forward that read a tensor would wait for the device at every layer.
        self.initialized = False
        self.arrives_quantized = False
        self.enabled = True
        """Off where calibration found that the layer cannot bear quantized activations."""

    def get_extra_state(self) -> Tensor:
        """What a checkpoint holds beside the scale: the three Python values."""
        return torch.tensor([self.initialized, self.arrives_quantized, self.enabled])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what a checkpoint holds."""
        self.initialized, self.arrives_quantized, self.enabled = map(bool, state.tolist())

    @torch.no_grad()
    def observe(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Record ``x``, an output, or the input of a layer with this effective ``weight``, ``(out, in)``."""
        importance = None
        if weight is not None and self.rule.weighted:
            columns = weight.float().square().sum(0)
            # In millionths of their mean, as integers, so that sums depend on no order; no channel is left out.
            importance = (columns / columns.mean().clamp(min=1e-30) * 2**20).round_().clamp_(min=1).long()
        self.observer.update(x, importance)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the scale from all that was seen so far; before that, there is none."""
        if not self.initialized and not bool(self.observer.initialized):
            return  # an empty tensor was all; asked only before the first scale, since it waits for the device
        scale = round_to(self.rule.magnitude(self.observer, self.qtype) / self.qtype.steps, self.dtype)
        self.scale.copy_(scale.clamp(min=smallest_scale(self.dtype)))  # a zero scale would divide 0 by 0
        self.initialized = True

    def require_scale(self, x: Tensor | None = None) -> None:
        """Raise `CalibrationError` when there is no scale yet; an ``x`` without elements needs none."""
        if not self.initialized and (x is None or x.numel()):
            raise CalibrationError(
                "activations: a scale was never set: run qat.calibrate(model, batches) before training with quantized "
                "activations, or let the schedule observe first"
            )

    def extra_repr(self) -> str:
        """The type, for ``print(model)``."""
        return self.qtype.name


class _FakeQuantizedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qtype: QType, dtype: torch.dtype) -> Tensor:
        codes, inside, scale = kernels.quantize_activation(x, scale, qtype.key, dtype)
        ctx.save_for_backward(inside)
        return kernels.dequantize_activation(codes, scale, dtype, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return kernels.masked_gradient(grad, inside), None, None, None


def fake_quantize_output(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Fake-quantize a layer's output; saturated elements get no gradient. Keeps one bit an element for backward.

    Raises:
        CalibrationError: there is no scale yet, and ``x`` is not empty.
    """
    quantizer.require_scale(x)
    y: Tensor = _FakeQuantizedOutput.apply(x, quantizer.scale, quantizer.qtype, quantizer.dtype)  # type: ignore[no-untyped-call]
    return y
