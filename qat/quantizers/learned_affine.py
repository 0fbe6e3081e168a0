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
from qat.starts import DATA_STARTS, RANGE_STARTS

__all__ = ["LearnedAffine", "LearnedRange", "StartName", "start_range"]

StartName: TypeAlias = Literal["minmax", "clip", "lsq", "hqq", "seq", "output", "gptq", "best"]
"""Names in `qat.starts`; the last three need data."""


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

    by_groups = True

    low_start: Tensor | None
    high_start: Tensor
    low_move: nn.Parameter | None
    high_move: nn.Parameter

    changed_master: Tensor
    """Whether that start changed the master weight too."""
    started: Tensor
    """Whether data gave the start, or training began without it; only where a start needs data."""

    def __init__(
        self,
        low: Tensor | None,
        high: Tensor,
        qtype: QType,
        dtype: torch.dtype,
        *,
        masked: bool = True,
        margin: float = 0.0,
        data_start: str | None = None,
    ) -> None:
        super().__init__(qtype, dtype, masked=masked, margin=margin)
        self.register_buffer("low_start", None if low is None else torch.zeros_like(low))
        self.register_buffer("high_start", torch.zeros_like(high))
        self.low_move = None if low is None else nn.Parameter(torch.zeros_like(low))
        self.high_move = nn.Parameter(torch.zeros_like(high))
        self.data_start = data_start
        if data_start is not None:
            self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=high.device))
            self.register_buffer("changed_master", torch.zeros((), dtype=torch.bool, device=high.device))
        self._begin(low, high)

    def _begin(self, low: Tensor | None, high: Tensor) -> None:
        # A range too narrow for the dtype of scales is none: zero marks a group that follows its weights.
        flat = round_to(self.qtype.scale_shift(low, high)[0], self.qtype.scale_dtype(self.dtype)) == 0
        if low is not None and self.low_start is not None:
            self.low_start.copy_(low.masked_fill(flat, 0.0))
        self.high_start.copy_(high.masked_fill(flat, 0.0))
        self._note_flat()

    @torch.no_grad()
    def restart(self, low: Tensor | None, high: Tensor) -> None:
        """Begin with a range that data gave, float32, ``(groups, 1)``. Parameters stay zero and the same objects."""
        self._begin(low, high)
        self.started.fill_(True)

    @property
    def compensated(self) -> bool:
        """As in `WeightQuantizer`; a state dict holds it."""
        return self.data_start is not None and not self.changed_master.is_meta and bool(self.changed_master)

    @compensated.setter
    def compensated(self, value: bool) -> None:
        self.changed_master.fill_(value)

    def awaited_start(self) -> str | None:
        """The start that data has yet to give. None where it has, or where training began before."""
        waits = self.data_start is not None and (self.started.is_meta or not bool(self.started))
        return self.data_start if waits else None

    def stop_awaiting(self) -> None:
        """Keep the start that there is."""
        if self.data_start is not None:
            self.started.fill_(True)

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


def start_range(start: str, weight: Tensor, qtype: QType, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The ends of the range that a learned one begins with; a weight without numbers gives their shapes."""
    return qtype.weight_range(weight) if weight.is_meta else RANGE_STARTS[start](weight, qtype, dtype)


class LearnedAffine(Algorithm):
    """Ranges that are learned with the weights: both ends of each group at int4 and int2, one scale a row at 8 bits.

    Use `qat.parameter_groups`, which gives the ends a learning rate of their own and no weight decay.
    """

    kind: Literal["learned_affine"] = "learned_affine"
    start: StartName = "clip"
    """What to begin with (`qat.starts`); the last three need data, and are ``clip`` until `qat.calibrate` ran.
    Data comes before training, or where training begins to quantize or changes its type; else ``clip`` stays."""
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

        Raises:
            SpecError: ``start="seq"`` for a type of other than 2 bits.

        >>> import qat
        >>> model = nn.Sequential(nn.Linear(256, 64))
        >>> _ = qat.prepare(model, qat.QuantSpec(weights="int2"), algorithm=LearnedAffine())
        >>> [group["name"] for group in qat.parameter_groups(model, lr=2e-4)]
        ['weights', 'vectors', 'scales']
        """
        data_start = self.start if self.start in DATA_STARTS else None
        ends = start_range("clip" if data_start else self.start, weight, qtype, dtype)
        options: dict[str, Any] = {"masked": self.mask_saturated, "margin": self.mask_margin}
        return LearnedRange(*ends, qtype, dtype, **options, data_start=data_start)
