"""Dual-LSQ: one learned range decides the codes, and another one the values that they stand for.

As in NVIDIA's Model Optimizer (https://github.com/NVIDIA/Model-Optimizer/pull/1884): ``v = s_post Q(w / s_pre)``, both
learned. Codes and ``s_post`` are stored, so it is free at inference. Types with a shift have the affine analogue, with
two ranges. docs/numerics.md has the formulas.

Codes by one scale and values by another are codes by the second of a rescaled weight, ``u = w s_post / s_pre``. So this
file rescales, and everything below it is as for a learned range. What it trades away: each layer keeps ``u`` for
backward, a float32 copy of its weight, and a group has twice the parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qat.errors import SpecError
from qat.numerics import QType, qtype_of
from qat.operators import operator
from qat.quantizers.base import Algorithm, Quantized
from qat.quantizers.learned_affine import LearnedRange, start_range

__all__ = ["DualLSQ"]


@operator(lambda weight, *_: torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format))
def _rescaled(
    weight: Tensor, code_scale: Tensor, code_shift: Tensor | None, scale: Tensor, shift: Tensor | None, qtype: str
) -> Tensor:
    # An operator, since a compiler fuses the product with the sum and would find other codes.
    ratio = torch.where(code_scale == 0, 1.0, scale / code_scale)  # a group of equal values has no scale
    rows = qtype_of(qtype).grouped(weight).float() * ratio
    if code_shift is not None and shift is not None:
        rows += code_shift * ratio - shift
    return rows.reshape(weight.shape)


class _Rescaled(torch.autograd.Function):
    """``u = (w + z_pre) s_post / s_pre - z_post``: its codes by s_post and z_post are those of w by s_pre and z_pre."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        code_scale: Tensor,
        code_shift: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        qtype: QType,
    ) -> Tensor:
        ctx.save_for_backward(weight, code_scale, code_shift, scale)
        ctx.qtype = qtype
        return _rescaled(weight, code_scale, code_shift, scale, shift, qtype.key)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, code_scale, code_shift, scale = ctx.saved_tensors
        given, rows = ctx.qtype.grouped(grad).float(), ctx.qtype.grouped(weight).float()
        none = code_scale == 0
        ratio = torch.where(none, 1.0, scale / code_scale)
        x = ((rows if code_shift is None else rows + code_shift) / code_scale).masked_fill(none, 0)
        of_scale, of_shift = (given * x).sum(1, keepdim=True), given.sum(1, keepdim=True)
        pair = (None, None) if code_shift is None else (of_shift * ratio, -of_shift)
        of_weight = (given * ratio).view(grad.shape).to(weight.dtype)
        return of_weight, -of_scale * ratio, pair[0], of_scale, pair[1], None


class DualRange(LearnedRange):
    """The range of values, with the moves ``low_move`` and ``high_move``, and that of codes, with moves of its own."""

    def __init__(self, low: Tensor | None, high: Tensor, qtype: QType, dtype: torch.dtype) -> None:
        super().__init__(low, high, qtype, dtype)
        self.low_code_move = None if low is None else nn.Parameter(torch.zeros_like(low))
        self.high_code_move = nn.Parameter(torch.zeros_like(high))

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """Find the codes by one range, and their values by the other."""
        codes_by = self.served(weight, self.low_code_move, self.high_code_move)
        scale, shift = self.served(weight, self.low_move, self.high_move)
        with torch.no_grad():
            rescaled = _rescaled(weight, *codes_by, scale, shift, self.qtype.key)
        return self.by_served(rescaled, scale, shift, out_dtype)

    def through(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rescaled weight, differentiable."""
        codes_by = self.served(weight, self.low_code_move, self.high_code_move)
        weight, *_ = super().through(weight, *codes_by)
        rescaled: Tensor = _Rescaled.apply(weight, *codes_by, scale, shift, self.qtype)  # type: ignore[no-untyped-call]
        return rescaled, scale, shift


class DualLSQ(Algorithm):
    """Two learned ranges for each group: one finds the codes, the other one gives their values."""

    kind: Literal["dual_lsq"] = "dual_lsq"
    start: Literal["minmax", "clip", "lsq"] = "clip"
    """The range that both begin with: the weight's own, that with the smallest squared weight error, or LSQ's."""

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> DualRange:
        """A quantizer whose ranges start from ``weight`` as it is now; at first, it is `LearnedAffine`.

        Raises:
            SpecError: the type's values are not ``scale * code - shift``.

        >>> from qat.formats import QUANTO
        >>> made = DualLSQ().make(torch.ones(4, 128), QUANTO.qtypes["int2"], torch.float32)
        >>> [name for name, _ in made.named_parameters()]
        ['low_move', 'high_move', 'low_code_move', 'high_code_move']
        """
        if not qtype.fused:
            raise SpecError(
                f"algorithm: DualLSQ needs values that are scale * code - shift, which {qtype.key!r} computes in "
                "another way: choose another algorithm such as LearnedAffine"
            )
        return DualRange(*start_range(self.start, weight, qtype, dtype), qtype, dtype)
