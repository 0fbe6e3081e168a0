"""GGUF's types of blocks: their codes, how a value is computed, and the bytes of a block.

A block is 32 elements of a row. It has a scale d in float16 and, in Q4_1, a minimum m in float16, whatever the serving
dtype::

    q8_0  d q            q in -127..127      34 bytes: d, 32 codes
    q4_0  d (q - 8)      q in 0..15          18 bytes: d, 32 codes, two a byte
    q4_1  d q + m        q in 0..15          20 bytes: d, m, 32 codes, two a byte

The package gguf, and with it transformers, computes a value in float32 and rounds it once, to the serving dtype.
diffusers computes product and sum in float16 (``dequantize_blocks_Q4_1`` and the like), and then rounds to the serving
dtype. So one file has two meanings, and each is a grid of its own: `QTYPES` and `FLOAT16_QTYPES`.

Here codes of q4_0 are q - 8, and the shift of q4_1 is -m. The definition is gguf-py/gguf/quants.py of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.numerics import Affine, FrozenWeight, QType, Symmetric, round_to

__all__ = ["BLOCK", "FLOAT16_QTYPES", "QTYPES", "block_bytes", "pack_blocks", "unpack_blocks"]

BLOCK = 32
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class _Blocks(QType):
    """What the three have in common."""

    fused: ClassVar[bool] = False

    in_float16: bool = False
    """Whether values are computed in float16, as diffusers does."""

    def group_size(self, in_features: int) -> int | None:
        return BLOCK

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def serve(
        self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        """Rounded to float16, which ends at 65504."""
        scale = round_to(scale.clamp(-_LARGEST, _LARGEST), torch.float16)
        return scale, None if shift is None else round_to(shift.clamp(-_LARGEST, _LARGEST), torch.float16)

    def decode(self, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        """In float32, or in float16. Of float32, a product has at most 19 bits, so it is exact."""
        within = torch.float16 if self.in_float16 else torch.float32
        values = scale.to(within) * self.grouped(codes).to(within)
        if shift is not None:
            values -= shift.to(within)
        return values.reshape(codes.shape).to(dtype)


@dataclass(frozen=True, kw_only=True)
class _Q8(_Blocks, Symmetric):
    """q8_0."""


@dataclass(frozen=True, kw_only=True)
class _Q4(_Blocks, Symmetric):
    """q4_0, whose codes reach to -8 but only to 7: the scale gets the sign that gives -8 to the largest magnitude.

    >>> low, high = QTYPES["q4_0"].weight_range(torch.tensor([[0.8] + 31 * [-0.5]]))
    >>> high, QTYPES["q4_0"].scale_shift(low, high)[0]
    (tensor([[-0.8000]]), tensor([[-0.1000]]))
    """

    def weight_range(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        """None, and the number of the largest magnitude, negated: float32, ``(groups, 1)``."""
        rows = self.grouped(weight.detach())
        low, high = rows.amin(1, keepdim=True).float(), rows.amax(1, keepdim=True).float()
        return None, -torch.where(-low > high, low, high)


@dataclass(frozen=True, kw_only=True)
class _Q4WithMinimum(_Blocks, Affine):
    """q4_1."""


def _types(format: str, in_float16: bool) -> dict[str, QType]:
    common: dict[str, Any] = {"format": format, "in_float16": in_float16}
    nibbles = common | {"bits": 4}
    types = (
        _Q8(**common, name="q8_0", bits=8, code_min=-127, code_max=127, steps=127, storage=torch.int8),
        _Q4(**nibbles, name="q4_0", code_min=-8, code_max=7, steps=8, storage=torch.int8),
        _Q4WithMinimum(**nibbles, name="q4_1", code_min=0, code_max=15, steps=15, storage=torch.uint8),
    )
    return {qtype.name: qtype for qtype in types}


QTYPES = _types("gguf", in_float16=False)
FLOAT16_QTYPES = _types("gguf-float16", in_float16=True)


def block_bytes(qtype: QType) -> int:
    """Bytes of a block.

    >>> [block_bytes(qtype) for qtype in QTYPES.values()]
    [34, 18, 20]
    """
    return BLOCK * qtype.bits // 8 + (4 if qtype.has_shift else 2)


def pack_blocks(weight: FrozenWeight) -> Tensor:
    """The blocks of a weight, uint8, ``(out, bytes of a row)``."""
    codes, halves = weight.codes.reshape(-1, BLOCK), BLOCK // 2
    parts = [weight.scale.view(torch.uint8)]
    if weight.shift is not None:
        parts.append((-weight.shift).view(torch.uint8))
    if weight.qtype.bits == 8:
        parts.append(codes.view(torch.uint8))
    else:
        nibbles = (codes - int(weight.qtype.code_min)).view(torch.uint8)  # from 0 to 15
        parts.append(nibbles[:, :halves] | nibbles[:, halves:] << 4)
    return torch.cat(parts, 1).reshape(weight.shape[0], -1)


def unpack_blocks(blocks: Tensor, qtype: QType, dtype: torch.dtype) -> FrozenWeight:
    """What `pack_blocks` packed, to be served in ``dtype``."""
    rows = blocks.reshape(-1, block_bytes(qtype))
    head = 4 if qtype.has_shift else 2
    halves = rows[:, :head].contiguous().view(torch.float16)
    codes = rows[:, head:]
    if qtype.bits == 8:
        codes = codes.contiguous().view(torch.int8)
    else:
        codes = torch.cat([codes & 15, codes >> 4], 1).view(qtype.storage) + int(qtype.code_min)
    shift = -halves[:, 1:] if qtype.has_shift else None
    return FrozenWeight(codes.reshape(len(blocks), -1), halves[:, :1].contiguous(), shift, qtype, dtype)
