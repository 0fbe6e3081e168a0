"""compressed-tensors' types: their codes, the groups that share a scale, and integer zero points.

int8 and float8 (e4m3fn) are symmetric with one scale a row. int4 and int2 are cut into groups of 32, 64 or 128
elements: symmetric, or with a zero point (``_zp``). The name has the group (``int4_g32``); ``int4`` is ``int4_g128``.

The loader computes ``(code - zero_point) * scale`` in the dtype of the scale (``_dequantize``, forward_helpers.py). The
difference is a small integer, exact in every serving dtype, so a value rounds once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qat.numerics import Affine, QType, Symmetric, round_to, smallest_scale

__all__ = ["QTYPES", "pack_words", "unpack_words", "zero_points"]

_SIZES = (32, 64, 128)
_DEFAULT_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class _Row(Symmetric):
    """int8 and float8."""

    multiplies: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class _Group(Symmetric):
    """int4 and int2 without a zero point; codes are -8 to 7, and -2 to 1.

    A range is divided as compressed-tensors does, by half the number of steps: its high end is half a step above the
    largest code.
    """

    multiplies: ClassVar[bool] = False
    size: int
    """Elements that share one scale."""

    def group_size(self, in_features: int) -> int | None:
        return self.size


@dataclass(frozen=True, kw_only=True)
class _ZeroPoint(Affine):
    """int4 and int2 whose shift is a whole number of scales, the zero point; codes are 0 to 15, and 0 to 3.

    >>> int4 = QTYPES["int4_g32_zp"]
    >>> int4.serve(torch.tensor([[0.5]]), torch.tensor([[3.6]]), torch.float32, 32)  # 3.6 are 7.2 scales
    (tensor([[0.5000]]), tensor([[3.5000]]))
    """

    fused: ClassVar[bool] = False
    multiplies: ClassVar[bool] = False
    whole_shift: ClassVar[bool] = True
    size: int
    """Elements that share one scale and one zero point."""

    def group_size(self, in_features: int) -> int | None:
        return self.size

    def scale_shift(self, low: Tensor | None, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Zero belongs to every range, since no zero point lies outside the codes."""
        assert low is not None
        return super().scale_shift(low.clamp(max=0), high.clamp(min=0))

    def serve(
        self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        """The shift becomes a whole number of scales, straight-through."""
        assert shift is not None
        scale = round_to(scale, dtype).clamp(min=smallest_scale(dtype))
        with torch.no_grad():
            zero = (shift / scale).round().clamp(0, self.code_max) + 0.0  # no -0.0, which no file can hold
            fixed = zero * scale
        return scale, fixed + (shift - shift.detach())

    def decode(self, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``(code - zero_point) * scale``, rounded once."""
        assert shift is not None
        steps = self.grouped(codes).to(dtype) - zero_points(scale, shift).to(dtype)
        return (steps * scale.to(dtype)).reshape(codes.shape)


def zero_points(scale: Tensor, shift: Tensor) -> Tensor:
    """Integer zero points, float32, of served scales and shifts, also where the shift was rounded to their dtype."""
    return (shift.float() / scale.float()).round()


def _types() -> dict[str, QType]:
    form, float8 = "compressed-tensors", torch.float8_e4m3fn
    types: dict[str, QType] = {
        "int8": _Row(format=form, name="int8", bits=8, code_min=-128, code_max=127, steps=127, storage=torch.int8),
        "float8": _Row(format=form, name="float8", bits=8, code_min=-448, code_max=448, steps=448, storage=float8),
    }
    for bits, size in itertools.product((4, 2), _SIZES):
        most, long = 2**bits - 1, f"int{bits}_g{size}"
        name = f"int{bits}" if size == _DEFAULT_SIZE else long
        low, half = -(most + 1) // 2, most / 2
        types[name] = types[long] = _Group(
            format=form,
            name=name,
            bits=bits,
            code_min=low,
            code_max=low + most,
            steps=half,
            storage=torch.int8,
            size=size,
        )
        zero = f"{long}_zp"
        types[zero] = _ZeroPoint(
            format=form, name=zero, bits=bits, code_min=0, code_max=most, steps=most, storage=torch.uint8, size=size
        )
    return types


QTYPES = _types()


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 up, ``(rows, n)``, as int32 words, ``(rows, ceil(n * bits / 32))``; the first code is lowest.

    >>> pack_words(torch.tensor([[1, 2, 3]]), 4)
    tensor([[801]], dtype=torch.int32)
    """
    count = 32 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % count)).contiguous()
    parts = padded.view(len(codes), -1, 8 // bits)
    octets = parts[..., 0].clone()
    for place in range(1, 8 // bits):
        octets |= parts[..., place] << (place * bits)
    return octets.view(torch.int32)


def unpack_words(words: Tensor, bits: int, length: int) -> Tensor:
    """The codes that `pack_words` packed, uint8, ``(rows, length)``.

    >>> unpack_words(torch.tensor([[801]], dtype=torch.int32), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # strides of its own, always
    parts = [(octets >> place) & (2**bits - 1) for place in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).view(len(words), -1)[:, :length].contiguous()
