"""Quantizers for activations: one static scale a tensor, from an observer, which training may move.

Stock loaders quantize with a stored scalar, so training does too. Where an input arrives already quantized (the
producer's output went through nothing but a relu or a view), the stock layer ignores its own input scale;
`ActivationQuantizer.arrives_quantized` marks those, and training skips their input quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from qat import kernels
from qat.errors import CalibrationError, StateError
from qat.numerics import QType, moved_range, round_to, smallest_scale
from qat.observers import Observer, ObserverChoice
from qat.quantizers.base import QuantizerModule
from qat.tensors import whole

__all__ = [
    "ActivationQuantizer",
    "LearnedScale",
    "QuantizedActivation",
    "activation_gradients",
    "fake_quantize_output",
    "with_unused",
    "with_zero_gradients",
]


_SAMPLE = 1 << 18  # elements of one tensor that count while training observes


class QuantizedActivation(NamedTuple):
    """What `kernels.quantize_activation` gives."""

    codes: Tensor
    inside: Tensor
    scale: Tensor


class _Kept(NamedTuple):
    """Codes of a tensor, as long as it lives."""

    scale: Tensor
    made: tuple[object, ...]
    """From which state of both."""
    quantized: QuantizedActivation


_KEPT: MutableMapping[Tensor, _Kept] = WeakIdKeyDictionary()


class _Group:
    """Quantizers that read one tensor: what finds an equal scale for each of them, after a load or a move."""

    def __init__(self, scale: Tensor) -> None:
        self.last = (scale, scale)

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """The scale ``before`` after a move: the very tensor that another one got for it, if that is there."""
        if self.last[0] is not before or self.last[1].device != after.device:
            self.last = (before, after)
        return self.last[1]

    def loaded(self, scale: Tensor) -> Tensor:
        """A scale that was loaded: the very tensor of another one, if that is equal."""
        other = self.last[1]
        if other.device != scale.device or scale.is_meta or not torch.equal(other, scale):
            self.last = (scale, scale)
        return self.last[1]


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
        self.observer = Observer(getattr(rule, "momentum", None))
        self.register_buffer("scale", torch.zeros((), dtype=torch.float32))
        # Python values: a forward that read a tensor would wait for the device at every layer.
        self.initialized = False
        self.arrives_quantized = False
        self._shared = False  # whether other quantizers have the very same scale tensor
        self._group: _Group | None = None
        self.layer = ""  # whose it is, for errors
        self.enabled = True
        """Off where calibration found that the layer cannot bear quantized activations."""

    def get_extra_state(self) -> Tensor:
        """What a checkpoint holds beside the scale: the three Python values, and whether codes are floats."""
        return torch.tensor([self.initialized, self.arrives_quantized, self.enabled, self.qtype.floating])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what a checkpoint holds."""
        *values, floating = state.tolist() if len(state) > 3 else (*state.tolist(), self.qtype.floating)
        if floating != self.qtype.floating:
            raise StateError(
                f"state_dict: activations had {'floating' if floating else 'integer'} codes, but this model quantizes "
                f"them to {self.qtype.name}: prepare it by the spec of the run that saved them"
            )
        self.initialized, self.arrives_quantized, self.enabled = values

    @torch.no_grad()
    def observe(self, x: Tensor, weight: Tensor | None = None, *, training: bool = False) -> None:
        """Record ``x``, an output, or the input of a layer with this effective ``weight``, ``(out, in)``.

        In ``training`` it is a sample of ``x``, which is quantized in this same forward: so the first one gives a
        scale. A recomputation in backward, as by activation checkpointing, records nothing there.
        """
        if training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
            return
        importance = None
        if weight is not None and self.rule.weighted:
            wide = torch.promote_types(weight.dtype, torch.float32)
            columns = torch.linalg.vector_norm(weight, dim=0, dtype=wide).square()
            # In millionths of their mean, as integers, so that sums depend on no order; no channel is left out.
            importance = (columns / columns.mean().clamp(min=1e-30) * 2**20).round_().clamp_(min=1).long()
        self.observer.update(x, importance, _SAMPLE if training else None)
        if training and not self.initialized:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the scale from all that was seen so far; before that, there is none."""
        if not self.initialized and not bool(self.observer.initialized):
            return  # an empty tensor was all; asked only before the first scale, since it waits for the device
        scale = round_to(self.rule.magnitude(self.observer, self.qtype) / self.qtype.steps, self.dtype)
        self.part()
        self.scale.copy_(scale.clamp(min=smallest_scale(self.dtype)))  # a zero scale would divide 0 by 0
        self.initialized = True

    def quantize(self, x: Tensor, learned: Tensor | None = None) -> QuantizedActivation:
        """Codes of ``x``, any shape and float dtype, without a gradient; ``learned`` is `learned_scale`, if at hand.

        Layers that read one tensor by one scale share its codes: in memory too, since each keeps them for backward.

        Raises:
            CalibrationError: there is no scale yet, and ``x`` is not empty.
        """
        self.require_scale(x)
        scale = self.serving_scale() if learned is None else learned.detach()
        # Leaves are left out: fused optimizers and views of numpy change them without a new version. A recomputation
        # in backward finds its own codes, so that it makes as many calls as the forward did. A compiler joins equal
        # calls by itself.
        if not self._shared or torch.compiler.is_compiling() or x.is_leaf or torch.is_inference_mode_enabled():
            return QuantizedActivation(*kernels.quantize_activation(x.detach(), scale, self.qtype.key, self.dtype))
        task = torch._C._current_graph_task_id()
        made = (x._version, scale._version, self.qtype.key, self.dtype, task)
        kept = _KEPT.get(x)
        if kept is None or kept.scale is not scale or kept.made != made:
            found = kernels.quantize_activation(x.detach(), scale, self.qtype.key, self.dtype)
            _KEPT[x] = kept = _Kept(scale, made, QuantizedActivation(*found))
        return kept.quantized

    def share(self, others: Iterable[ActivationQuantizer]) -> None:
        """Let others, with an equal scale for one tensor, have the very same one; after a load or a move too."""
        self._group = _Group(self.scale)
        for quantizer in (self, *others):
            quantizer.scale, quantizer._shared, quantizer._group = self.scale, True, self._group

    def part(self) -> None:
        """Have a scale of its own again, as before it changes."""
        if self._shared:
            self.scale, self._shared = self.scale.clone(), False

    def _load_from_state_dict(self, *args: Any) -> None:
        shared = self._shared  # what was parted, as for an average, stays so: its copies must have as many buffers
        self.part()
        super()._load_from_state_dict(*args)
        if shared and self._group is not None:
            self.scale, self._shared = self._group.loaded(self.scale), True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.scale
        super()._apply(fn, recurse)
        if self._shared and self._group is not None:
            self.scale = self._group.moved(before, self.scale)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shared:  # safetensors refuses tensors that share memory
            destination[f"{prefix}scale"] = destination[f"{prefix}scale"].clone()

    @property
    def used(self) -> bool:
        """Whether activations go through it, once the layer quantizes them."""
        return self.enabled and not self.arrives_quantized

    def serving_scale(self) -> Tensor:
        """The scale as it is served: float32 scalar, without a gradient."""
        return self.scale

    def learned_scale(self) -> Tensor | None:
        """The same with a gradient, where it is learned."""
        return None

    def require_scale(self, x: Tensor | None = None) -> None:
        """Raise `CalibrationError` when there is no scale yet; an ``x`` without elements needs none."""
        if not self.initialized and (x is None or x.numel()):
            where = f" for layer {self.layer!r}" if self.layer else ""
            raise CalibrationError(
                f"activations: a scale was never set{where}: run qat.calibrate(model, batches) before training with "
                "quantized activations, or let the schedule observe first"
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
        self.move = nn.Parameter(torch.zeros(1, dtype=torch.float32))  # fully_shard takes no scalars

    def learned_scale(self) -> Tensor:
        """The scale as it is served, differentiable."""
        move = whole(self.move)  # outside the forward of a unit of fully_shard it is a shard
        _, factor = moved_range(None, torch.ones_like(move), None, move)
        start = self.scale.clone()  # which observers may change before backward
        return round_to(start * factor.squeeze(), self.dtype).clamp(min=smallest_scale(self.dtype))

    def serving_scale(self) -> Tensor:
        """The scale as it is served, without a gradient."""
        return self.learned_scale().detach()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the start from what was seen, unless training has moved the scale: then it is kept."""
        before, fresh = self.scale.clone(), not self.initialized
        super().refresh()
        if not fresh:
            self.scale.copy_(torch.where(whole(self.move).squeeze() == 0, self.scale, before))


@torch.no_grad()
def activation_gradients(x: Tensor, scale: Tensor, qtype: str, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a learned scale, float32 scalar, and of ``x``, from that of the fake-quantized ``x``, any shape.

    See `QType.scale_gradients`; positions are not rounded to the serving dtype here.
    """
    rows = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    scales = scale.detach().expand(rows.shape[0], 1).contiguous()
    of_scale, _, masked = kernels.scale_gradients(rows, scales, None, qtype, grad.reshape(rows.shape))
    return of_scale.sum(), masked.view(grad.shape)


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


def with_zero_gradients(y: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """``y``, with a gradient of zero for parameters that it does not depend on: DDP waits for a gradient of each."""
    return _Unused.apply(y, *parameters)  # type: ignore[no-any-return,no-untyped-call]


def with_unused(y: Tensor, *quantizers: ActivationQuantizer | None) -> Tensor:
    """`with_zero_gradients` for scales that are learned but not used."""
    idle = [q.move for q in quantizers if isinstance(q, LearnedScale) and not q.used]
    return with_zero_gradients(y, idle) if idle else y


class _FakeQuantizedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qtype: str, dtype: torch.dtype) -> Tensor:
        value, inside = kernels.fake_quantize_activation(x, scale, qtype, dtype)
        ctx.qtype = qtype
        ctx.save_for_backward(*((x, scale) if ctx.needs_input_grad[1] else (inside,)))
        return value

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
