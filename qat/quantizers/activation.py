"""Quantizers for activations: one static scale a tensor, from an observer, which training may move.

Stock loaders quantize with a stored scalar, so training does too. Where an input arrives already quantized (the
producer's output went through nothing but a relu or a view), the stock layer ignores its own input scale;
`ActivationQuantizer.arrives_quantized` marks those, and training skips their input quantization.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from qat import kernels
from qat.errors import CalibrationError
from qat.numerics import QType, moved_range, round_to, smallest_scale
from qat.observers import Observer, ObserverChoice
from qat.quantizers.base import QuantizerModule

__all__ = [
    "ActivationQuantizer",
    "LearnedScale",
    "QuantizedActivation",
    "activation_gradients",
    "fake_quantize_output",
]


class QuantizedActivation(NamedTuple):
    """What `kernels.quantize_activation` gives."""

    codes: Tensor
    inside: Tensor
    scale: Tensor


class _Kept(NamedTuple):
    """Codes of a tensor, as long as it lives."""

    version: int
    key: tuple[float, str, torch.dtype]
    quantized: QuantizedActivation


_KEPT: MutableMapping[Tensor, _Kept] = WeakIdKeyDictionary()


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
        self._settled = (-1, float("nan"))  # the version of the scale that was read last, and its value
        self._first: tuple[ActivationQuantizer, ...] = ()  # of those that read one tensor; in a tuple, so no submodule
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
        self._settled = (-1, float("nan"))
        self.initialized = True

    def quantize(self, x: Tensor) -> QuantizedActivation:
        """Codes of ``x``, any shape and float dtype, without a gradient.

        Layers that read one tensor by one scale share its codes: in memory too, since each keeps them for backward.

        Raises:
            CalibrationError: there is no scale yet, and ``x`` is not empty.
        """
        self.require_scale(x)
        version, number = self._settled
        if torch.compiler.is_compiling():  # a compiler joins equal calls, of one tensor by one scale
            same = [q for q in self._first if q._settled[1] == number]
            scale = same[0].scale if same else self.serving_scale()
            return QuantizedActivation(*kernels.quantize_activation(x.detach(), scale, self.qtype.key, self.dtype))
        arguments = (x.detach(), self.serving_scale(), self.qtype.key, self.dtype)
        if x.is_inference() or version != self.scale._version:
            return QuantizedActivation(*kernels.quantize_activation(*arguments))
        key, kept = (number, self.qtype.key, self.dtype), _KEPT.get(x)
        if kept is None or kept.key != key or kept.version != x._version:
            kept = _Kept(x._version, key, QuantizedActivation(*kernels.quantize_activation(*arguments)))
            _KEPT[x] = kept
        return kept.quantized

    def serving_scale(self) -> Tensor:
        """The scale as it is served: float32 scalar, without a gradient."""
        return self.scale

    def learned_scale(self) -> Tensor | None:
        """The same with a gradient, where it is learned."""
        return None

    def share(self, first: ActivationQuantizer) -> None:
        """Say which quantizer reads the same tensor before this one does."""
        self._first = (first,)

    def settle(self) -> None:
        """Read the scale as a Python number, by which `quantize` knows equal ones; waits for the device."""
        self._settled = (self.scale._version, float("nan") if self.scale.is_meta else float(self.scale))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # the extra state is among it
        self.settle()

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


class LearnedScale(ActivationQuantizer):
    """A scale that training moves from where calibration left it: LSQ (Esser et al. 2020, eq. 2 and 3).

    https://arxiv.org/abs/1902.08153. The parameter is the move relative to the calibrated scale, as a learned range
    has it: one learning rate then fits scales of any size. A scale keeps at least 1/128 of its start.
    """

    def __init__(self, qtype: QType, dtype: torch.dtype, rule: ObserverChoice) -> None:
        super().__init__(qtype, dtype, rule)
        self.move = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def learned_scale(self) -> Tensor:
        """The scale as it is served, differentiable."""
        _, factor = moved_range(None, torch.ones_like(self.move), None, self.move)
        return round_to(self.scale * factor, self.dtype).clamp(min=smallest_scale(self.dtype))

    def serving_scale(self) -> Tensor:
        """The scale as it is served, without a gradient."""
        return self.learned_scale().detach()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the start from what was seen, unless training has moved the scale: then it is kept."""
        before, fresh = self.scale.clone(), not self.initialized
        super().refresh()
        if not fresh:
            self.scale.copy_(torch.where(self.move == 0, self.scale, before))

    def settle(self) -> None:
        """Learn the scale only where it is used. Layers that learn a scale each share no codes."""
        self.requires_grad_(self.enabled and not self.arrives_quantized)


@torch.no_grad()
def activation_gradients(x: Tensor, scale: Tensor, qtype: str, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a learned scale, float32 scalar, and of ``x``, from that of the fake-quantized ``x``, any shape.

    See `QType.scale_gradients`; positions are not rounded to the serving dtype here.
    """
    rows = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    scales = scale.detach().expand(rows.shape[0], 1).contiguous()
    of_scale, _, masked = kernels.scale_gradients(rows, scales, None, qtype, grad.reshape(rows.shape))
    return of_scale.sum(), masked.view(grad.shape)


class _FakeQuantizedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
        codes, inside, found = kernels.quantize_activation(x, scale, qtype, dtype)
        ctx.qtype = qtype
        ctx.save_for_backward(*((x, scale) if ctx.needs_input_grad[1] else (inside,)))
        return kernels.dequantize_activation(codes, found, dtype, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *scale = ctx.saved_tensors
        if not scale:
            return kernels.masked_gradient(grad, first), None, None, None
        grad_scale, masked = activation_gradients(first, scale[0], ctx.qtype, grad)
        return masked, grad_scale, None, None


def fake_quantize_output(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Fake-quantize a layer's output; saturated elements get no gradient.

    Keeps one bit an element for backward, or ``x`` where the scale is learned.

    Raises:
        CalibrationError: there is no scale yet, and ``x`` is not empty.
    """
    quantizer.require_scale(x)
    scale = quantizer.learned_scale()
    scale = quantizer.scale if scale is None else scale
    y: Tensor = _FakeQuantizedOutput.apply(x, scale, quantizer.qtype.key, quantizer.dtype)  # type: ignore[no-untyped-call]
    return y
