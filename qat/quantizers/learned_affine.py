"""Learned ranges: the two ends of every group's range are parameters, and the weight trains together with them.

The parametrisation is the robust one of Xu et al. 2024 (https://arxiv.org/abs/2404.16898): not scale and shift, whose
gradients compete, but the ends. Gradients are those of LSQ and LSQ+ (Esser et al. 2020,
https://arxiv.org/abs/1902.08153; Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576). docs/numerics.md has the
formulas. Symmetric types have one end, which makes it LSQ relative to the largest magnitude; ``start="lsq"`` begins
where the paper does.

What it trades away: two numbers a group in every checkpoint and optimizer, and, in the backward pass, the reduction
that gives their gradients. A range clips, so weights outside it get no gradient until the range comes back to them.
"""

from __future__ import annotations

from typing import Any, Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat import kernels
from qat.numerics import QType, moved_range, round_to
from qat.quantizers.base import Algorithm, Quantized, WeightQuantizer
from qat.quantizers.clipping import clipped_range

__all__ = ["LearnedAffine", "LearnedRange", "Start", "start_range", "step_size_range"]

Start: TypeAlias = Literal["minmax", "clip", "lsq"]


class _ServedRange(torch.autograd.Function):
    """Serving scale and shift of a moved range; see `kernels.moved_scale_shift`."""

    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor | None,
        high: Tensor,
        low_move: Tensor | None,
        high_move: Tensor,
        qtype: QType,
        dtype: torch.dtype,
        in_features: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(low, high)
        ctx.qtype = qtype
        return kernels.moved_scale_shift(low, high, low_move, high_move, qtype.key, dtype, in_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor | None) -> tuple[Tensor | None, ...]:
        low, high = ctx.saved_tensors
        if low is None:
            return None, None, None, grad_scale * high / ctx.qtype.steps, None, None, None
        unit = (high - low) / 2
        grad_high = grad_scale * unit / ctx.qtype.steps
        grad_low = grad_high if grad_shift is None else grad_high + grad_shift * unit
        return None, None, grad_low, grad_high, None, None, None


class LearnedRange(WeightQuantizer):
    """A range whose ends move from ``low`` (None for symmetric types) and ``high``: float32, ``(groups, 1)``."""

    low_start: Tensor | None
    high_start: Tensor
    low_move: nn.Parameter | None
    high_move: nn.Parameter

    def __init__(
        self,
        low: Tensor | None,
        high: Tensor,
        qtype: QType,
        dtype: torch.dtype,
        *,
        masked: bool = True,
        margin: float = 0.0,
    ) -> None:
        super().__init__(qtype, dtype, masked=masked, margin=margin)
        # A range too narrow for the serving dtype is none: zero marks a group that follows its weights.
        scale, _ = qtype.scale_shift(low, high)
        flat = round_to(scale, dtype) == 0
        self.register_buffer("low_start", None if low is None else low.masked_fill(flat, 0.0))
        self.register_buffer("high_start", high.masked_fill(flat, 0.0))
        self.low_move = None if low is None else nn.Parameter(torch.zeros_like(low))
        self.high_move = nn.Parameter(torch.zeros_like(high))
        self._note_flat()

    def _flat(self) -> Tensor:
        return self.high_start == (0.0 if self.low_start is None else self.low_start)

    def _note_flat(self) -> None:
        # A Python bool: a forward that read a tensor would wait for the device, and few weights have such groups.
        self._some_flat = not self.high_start.is_meta and bool(self._flat().any())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._note_flat()

    def _start(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        if not self._some_flat:
            return self.low_start, self.high_start
        low, high = self._own_range(weight)
        flat = self._flat()
        high = torch.where(flat, high, self.high_start)
        return None if low is None or self.low_start is None else torch.where(flat, low, self.low_start), high

    def _own_range(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        """What a group follows that has no start."""
        return self.qtype.weight_range(weight)

    def served(self, weight: Tensor, low_move: Tensor | None, high_move: Tensor) -> tuple[Tensor, Tensor | None]:
        """Serving scale and shift of the moved range; ``weight`` gives the range only where a group follows it."""
        low, high = self._start(weight)
        if not self.qtype.fused:  # the gradient of another format's `serve` is not that of `_ServedRange`
            ends = moved_range(low, high, low_move, high_move)
            return self.qtype.serve(*self.qtype.scale_shift(*ends), self.dtype, weight.shape[1])
        options = (self.qtype, self.dtype, weight.shape[1])
        return _ServedRange.apply(low, high, low_move, high_move, *options)  # type: ignore[no-any-return,no-untyped-call]

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Quantize by the moved range."""
        return self.by_served(weight, *self.served(weight, self.low_move, self.high_move), out_dtype)

    def quantize_to_codes(self, weight: Tensor) -> Quantized:
        """The same in one pass."""
        return self.quantize(weight, self.qtype.storage)


def step_size_range(weight: Tensor, qtype: QType) -> tuple[Tensor | None, Tensor]:
    """LSQ's start (Esser et al. 2020, section 2.1), as ends: ``s = 2 mean|w| / sqrt(Qp)``, float32, ``(groups, 1)``.

    An affine type has it around its group's mean, with half its steps as Qp. At 8 bits this range is several times
    the largest magnitude of a normally distributed row: the paper's start is for few bits.

    >>> from qat.formats import QUANTO
    >>> step_size_range(torch.tensor([[-3.0, 1.0, 1.0, 1.0]]), QUANTO.qtypes["int2"])
    (tensor([[-3.6742]]), tensor([[3.6742]]))
    """
    rows = qtype.grouped(weight.detach()).float()
    center = rows.mean(1, keepdim=True) if qtype.has_shift else torch.zeros_like(rows[:, :1])
    size = 2 * (rows - center).abs().mean(1, keepdim=True)
    half = size * (qtype.steps / 2 if qtype.has_shift else qtype.steps) ** 0.5
    return (center - half, center + half) if qtype.has_shift else (None, half)


def start_range(start: Start, weight: Tensor, qtype: QType, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The ends of the range that a learned one begins with; a weight without numbers gives their shapes."""
    if start == "minmax" or weight.is_meta:
        return qtype.weight_range(weight)
    return step_size_range(weight, qtype) if start == "lsq" else clipped_range(weight, qtype, dtype)


class LearnedAffine(Algorithm):
    """Ranges that are learned with the weights: both ends of each group at int4 and int2, one scale a row at 8 bits.

    Use `qat.parameter_groups`, which gives the ends a learning rate of their own and no weight decay.
    """

    kind: Literal["learned_affine"] = "learned_affine"
    start: Start = "clip"
    """The ranges to begin with: the weight's own, those with the smallest squared weight error, or LSQ's."""
    mask_saturated: bool = True
    """Stop the gradient of weights outside the range, as LSQ does."""
    mask_margin: float = Field(default=0.0, ge=0)
    """Steps beyond the range where that begins: 0 as in LSQ, 0.5 as in QuEST (arXiv 2502.05003)."""

    @model_validator(mode="after")
    def _margin_has_a_mask(self) -> Self:
        if self.mask_margin and not self.mask_saturated:
            raise ValueError(f"mask_margin ({self.mask_margin}) needs mask_saturated=True: set it, or leave the margin")
        return self

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> LearnedRange:
        """A quantizer whose ranges start from ``weight`` as it is now.

        >>> import qat
        >>> model = nn.Sequential(nn.Linear(256, 64))
        >>> _ = qat.prepare(model, qat.QuantSpec(weights="int2"), algorithm=LearnedAffine())
        >>> [group["name"] for group in qat.parameter_groups(model, lr=2e-4)]
        ['weights', 'vectors', 'scales']
        """
        ends = start_range(self.start, weight, qtype, dtype)
        return LearnedRange(*ends, qtype, dtype, masked=self.mask_saturated, margin=self.mask_margin)
