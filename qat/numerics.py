"""The arithmetic of quantization: pure functions of tensors, and the specification of every faster kernel.

A `QType` is a type of stored values: which codes it has, which elements share a scale, and how a code becomes a value
again. Its methods follow one rule, *serving arithmetic in the forward*: every rounding is the loader's, in its place.
Skipping one would change about half of the bfloat16 weights. docs/numerics.md has the formulas and the reasons. A
format whose loader computes otherwise overrides `QType.serve`, `QType.encode` and `QType.decode`.

A weight is handled as rows of ``(groups, size)``: a whole row, or one group of it. Scales and shifts have the
shape ``(groups, 1)`` and are always float32 here, holding numbers that the serving dtype can represent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qat.errors import StateError
from qat.operators import operator

__all__ = [
    "NARROWEST",
    "Affine",
    "FrozenWeight",
    "QType",
    "Symmetric",
    "moved_range",
    "pack_bits",
    "qtype_of",
    "round_to",
    "smallest_scale",
    "unpack_bits",
]

NARROWEST = 2.0**-7  # of the start range: ends that move towards each other stop there, so the scale stays above 0
_BY_KEY: dict[str, QType] = {}


class _RoundTo(torch.autograd.Function):
    """Round to a narrower dtype and come back, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return _round_to(tensor, dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@operator(lambda tensor, dtype: torch.empty_like(tensor, dtype=torch.float32))
def _round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # An operator of its own because a compiler is free to drop a narrowing cast that is followed by a widening one.
    return tensor.to(dtype).to(torch.float32, copy=True)


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` rounded to ``dtype``, as float32, straight-through; the same eagerly and compiled."""
    if dtype is torch.float32:
        return tensor.float()
    if not tensor.requires_grad:  # a search of starts comes here ten thousand times
        return _round_to(tensor, dtype)
    return _RoundTo.apply(tensor, dtype)  # type: ignore[no-any-return,no-untyped-call]


def smallest_scale(dtype: torch.dtype) -> float:
    """The epsilon that keeps a float8 scale above zero and that ``dtype`` can hold."""
    # float16 reaches down only by its subnormals: its smallest normal, 6e-5, would widen ordinary rows.
    return 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny


def moved_range(
    low: Tensor | None, high: Tensor, low_move: Tensor | None, high_move: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The ends of a range that were moved outwards.

    The unit of a move is half the range's width (without a low end: ``high``), so that moves of m turn a symmetric
    range into ``1 + m`` times itself. A range keeps at least 1/128 of its width, straight-through, so that it can
    recover. All are float32, ``(groups, 1)``; symmetric types have no low end.

    >>> moved_range(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), torch.zeros(1, 1), torch.ones(1, 1))
    (tensor([[-1.]]), tensor([[2.]]))
    """
    unit = high if low is None else (high - low) / 2
    moved_high = high + high_move * unit
    moved_low = None if low is None or low_move is None else low - low_move * unit
    width = moved_high if moved_low is None else moved_high - moved_low
    narrowest = unit * (NARROWEST if low is None else 2 * NARROWEST)
    missing = (narrowest - width).detach()  # of a range from zero to a negative end, all of these are negative
    return moved_low, moved_high + torch.where(unit < 0, missing.clamp(max=0), missing.clamp(min=0))


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` of int8 codes, ``(rows, in)`` and ``(out, in)``: each sum exact, then rounded to float32."""
    if x.is_cuda:
        return torch._int_mm(x, weight.t()).float()
    # float32 holds every whole number up to 2^24, and so the sum of 1,024 products, in any order. On a CPU without
    # instructions for int8 this is ten times as fast as a product of integers.
    parts = zip(torch.split(x, 1024, 1), torch.split(weight, 1024, 1), strict=True)
    with torch.autocast(x.device.type, enabled=False):
        return torch.stack([(a.float() @ b.float().t()).int() for a, b in parts]).sum(0).float()


def pack_bits(flags: Tensor) -> Tensor:
    """Eight booleans to a byte, the first one in the lowest bit: uint8, ``(ceil(numel / 8),)``."""
    flat = torch.nn.functional.pad(flags.flatten().to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """The booleans that `pack_bits` packed, in their shape.

    >>> unpack_bits(pack_bits(torch.tensor([[True, False, True]])), torch.Size((1, 3)))
    tensor([[ True, False,  True]])
    """
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


@dataclass(frozen=True, kw_only=True)
class QType(ABC):
    """A type of stored values; abstract. A format makes its own objects of `Symmetric` and `Affine`.

    Two objects with one `key` are the same type: an operator's arguments hold no objects, so types cross by key.
    """

    fused: ClassVar[bool] = True
    """Whether the fast kernels compute this arithmetic. A subclass that overrides `serve`, `encode`, `decode` or
    `scale_gradients` sets it to False; the kernels then call the methods."""
    multiplies: ClassVar[bool] = True
    """Whether loaders multiply the codes of weight and input, where both are of one 8-bit type; else their values."""
    whole_shift: ClassVar[bool] = False
    """Whether a shift is a whole number of scales, an integer zero point."""

    format: str
    """Name of the format that the type belongs to."""
    name: str
    """What a spec calls it."""
    bits: int
    """Bits of a stored code."""
    code_min: float
    code_max: float
    steps: float
    """How many scales a range spans: from 0 to its magnitude (symmetric), or from its low to its high end (affine)."""
    storage: torch.dtype
    """dtype of a code before it is packed."""

    def __post_init__(self) -> None:
        if _BY_KEY.setdefault(self.key, self) != self:
            raise StateError(f"QType: {self.key!r} is another type already: give the format or the type its own name")

    @property
    @abstractmethod
    def has_shift(self) -> bool:
        """Whether a group has a shift beside its scale."""

    @property
    def key(self) -> str:
        """Format and name, by which `qtype_of` finds the type."""
        return f"{self.format}.{self.name}"

    @property
    def floating(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.storage.is_floating_point

    def group_size(self, in_features: int) -> int | None:
        """Elements of a row of ``in_features`` that share one scale; None: the whole row."""
        return None

    def anchor(self, dtype: torch.dtype, in_features: int) -> int:
        """The code whose value a kernel of the format stores in place of the shift: 0, or a power of two."""
        return 0

    def grouped(self, weight: Tensor) -> Tensor:
        """View a weight of shape ``(out, in)`` as ``(groups, size)``, the rows that share one scale."""
        size = self.group_size(weight.shape[1])
        return weight if size is None else weight.reshape(-1, size)

    def weight_range(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        """Each group's minimum and maximum, float32, ``(groups, 1)``; for types without a shift None and ``max|w|``."""
        rows = self.grouped(weight.detach())
        if rows.device.type == "cpu":  # where two reductions are ten times faster than ``aminmax``
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        else:
            low, high = torch.aminmax(rows, dim=1, keepdim=True)
        return (low.float(), high.float()) if self.has_shift else (None, torch.maximum(-low, high).float())

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which scale and shift are stored, where ``dtype`` is the serving dtype."""
        return dtype

    def scale_shift(self, low: Tensor | None, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and shift, not yet rounded, whose codes reach from ``low`` (None: ``-high``) to ``high``."""
        width = high if low is None else high - low
        # By a Python number CUDA multiplies with the reciprocal, which rounds twice.
        return width / width.new_full((), self.steps), None if low is None else -low

    def serve(
        self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and shift as the serving dtype holds them, float32, straight-through.

        A float8 scale is at least an epsilon. A shift is moved to the fixed point of ``a * scale - (a * scale -
        shift)`` in ``dtype``, where a is the `anchor`: a kernel that stores the inner difference and recovers the
        shift by the outer one then loses nothing.
        """
        scale = round_to(scale, dtype)
        if self.floating:
            scale = scale.clamp(min=smallest_scale(dtype))
        if shift is None:
            return scale, None
        shift = round_to(shift, dtype)
        anchor = self.anchor(dtype, in_features)
        if not anchor:
            return scale, shift
        with torch.no_grad():
            part = scale * anchor  # a power of two: exact in every binary dtype
            fixed = round_to(part - round_to(part - shift, dtype), dtype)
        return scale, shift + (fixed - shift.detach())

    def _positions(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        rows = self.grouped(weight.detach()).float()
        return rows / scale if shift is None else (rows + shift).div_(scale)

    def encode(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """Codes, ``(out, in)`` in the dtype `storage`, of a weight in any float dtype, by serving scale and shift."""
        codes = self._positions(weight, scale, shift)
        if not self.floating:
            codes.round_()
            codes.masked_fill_(scale == 0, 0)  # 0/0 and x/0: see the module's docstring
        return codes.clamp_(self.code_min, self.code_max).to(self.storage).reshape(weight.shape)

    def decode(self, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Values of codes, ``(out, in)`` in the serving dtype: ``scale * code - shift`` in a loader's two roundings."""
        values = scale.to(dtype) * self.grouped(codes).to(dtype)
        if shift is not None:
            values -= shift.to(dtype)
        return values.reshape(codes.shape)

    def fake_quantize(
        self, weight: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> Tensor:
        """The weight that a loader will rebuild, in ``out_dtype``: ``decode(encode(weight))``, without a gradient.

        Asked for in the type's `storage` dtype, it is the codes themselves.
        """
        codes = self.encode(weight, scale, shift)
        return codes if out_dtype is self.storage else self.decode(codes, scale, shift, dtype).to(out_dtype)

    def scale_gradients(
        self, weight: Tensor, scale: Tensor, shift: Tensor | None, grad: Tensor, margin: float = 0.0
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Straight-through gradients of ``v = s q(w) - z`` with respect to scale and shift, and the masked ``grad``.

        With ``x = (w + z) / s`` and ``in`` where x lies at most ``margin`` outside the codes' range (LSQ, Esser et al.
        2020, eq. 3; LSQ+, Bhalgat et al. 2020, eq. 5-6): ``dv/ds = q - x in``, ``dv/dz = in - 1``, ``dv/dw = in``.

        Returns:
            ``grad_scale`` and ``grad_shift`` (float32, ``(groups, 1)``; None without a shift), and ``grad * in``.
        """
        x = self._positions(weight, scale, shift).masked_fill(scale == 0, 0)
        rows = self.grouped(grad).float()
        inside = (x >= self.code_min - margin) & (x <= self.code_max + margin)
        clamped = x.clamp(self.code_min, self.code_max)
        codes = clamped.to(self.storage).float() if self.floating else clamped.round()
        grad_scale = (rows * (codes - torch.where(inside, x, 0.0))).sum(1, keepdim=True)
        grad_shift = None if shift is None else (rows * (inside.float() - 1.0)).sum(1, keepdim=True)
        return grad_scale, grad_shift, grad * inside.reshape(weight.shape)

    def fake_quantize_activation(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """``scale * clamp(round(x / scale))``, every step rounded to the serving dtype, in the dtype of ``x``.

        ``x`` has any shape and float dtype; ``scale`` is a float32 scalar.
        """
        scale = scale.to(dtype)
        codes = x.to(dtype) / scale  # rounded to the serving dtype before it is rounded to a code, as the loader does
        if not self.floating:
            codes.round_()
        codes.clamp_(self.code_min, self.code_max)
        if self.floating:
            codes = codes.to(self.storage).to(dtype)
        return codes.mul_(scale).to(x.dtype)

    def encode_activation(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The codes behind `fake_quantize_activation`, `storage`, and where ``x`` lies within their range, bool.

        Both have the shape of ``x``. No integer holds NaN, which `kernels.quantize_activation` looks after.
        """
        positions = x.to(dtype) / scale.to(dtype)
        codes = positions.clamp(self.code_min, self.code_max)
        inside = codes == positions
        return (codes if self.floating else codes.round_()).to(self.storage), inside

    def in_integers(self, x: Tensor, weight: Tensor) -> bool:
        """Whether loaders multiply codes, ``(rows, in)`` and ``(out, in)``, as integers; else as values."""
        return not self.floating

    def linear(
        self, x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """What a loader computes of codes, ``(..., in)`` and ``(out, in)``, of 8 bits without a shift: ``(..., out)``.

        ``x_scale`` is a scalar and ``scale`` has the shape ``(out, 1)``, float32; ``bias`` and the result have the
        serving dtype. A product of integers is exact and is scaled in float32. Else values are multiplied.
        """
        scales, rows = x_scale.to(dtype) * scale.to(dtype), x.reshape(-1, x.shape[-1])
        if self.in_integers(rows, codes):
            y = (_integer_product(rows, codes) * scales.float().t()).to(dtype)
        else:
            y = rows.to(dtype) @ (scales * codes.to(dtype)).t()
        # No view, since models may add in place to it, as Llama4 does.
        whole: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], codes.shape[0]))
        return whole if bias is None else whole + bias


@dataclass(frozen=True, kw_only=True)
class Symmetric(QType):
    """``value = scale * code``, with a range of plus and minus the largest magnitude.

    >>> int8 = Symmetric(
    ...     format="docs", name="int8", bits=8, code_min=-128, code_max=127, steps=127, storage=torch.int8
    ... )
    >>> int8.scale_shift(*int8.weight_range(torch.tensor([[-254.0, 127.0], [0.0, 63.5]])))
    (tensor([[2.0000],
            [0.5000]]), None)
    >>> weight, scale = torch.tensor([[-1.0, 0.6, 99.0]]), torch.tensor([[0.5]])
    >>> int8.fake_quantize(weight, scale, None, torch.float32, torch.float32)
    tensor([[-1.0000,  0.5000, 63.5000]])
    >>> int8.scale_gradients(torch.tensor([[1.25, 200.0]]), torch.tensor([[1.0]]), None, torch.ones(1, 2))
    (tensor([[126.7500]]), None, tensor([[1., 0.]]))
    """

    has_shift = False


@dataclass(frozen=True, kw_only=True)
class Affine(QType):
    """``value = scale * code - shift``, with a range from the smallest to the largest value.

    >>> int2 = Affine(format="docs", name="int2", bits=2, code_min=0, code_max=3, steps=3, storage=torch.uint8)
    >>> int2.scale_shift(*int2.weight_range(torch.tensor([[-1.0, 2.0], [0.0, 6.0]])))
    (tensor([[1.],
            [2.]]), tensor([[1.],
            [-0.]]))
    >>> codes = int2.encode(torch.tensor([[-1.0, 0.5, 2.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]))
    >>> codes
    tensor([[0, 2, 3]], dtype=torch.uint8)
    >>> int2.decode(codes, torch.tensor([[1.0]]), torch.tensor([[1.0]]), torch.float32)
    tensor([[-1.,  1.,  2.]])
    """

    has_shift = True


@dataclass(frozen=True)
class FrozenWeight:
    """One weight as it is final: what lies between training and files, whatever the format."""

    codes: Tensor
    """``(out, in)``, in the type's `storage` dtype, contiguous."""
    scale: Tensor
    """`QType.scale_dtype`, ``(groups, 1)``."""
    shift: Tensor | None
    """Likewise; None for types without one."""
    qtype: QType
    served: torch.dtype | None = None
    """The serving dtype, where scale and shift have another one."""

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.served or self.scale.dtype

    @property
    def shape(self) -> torch.Size:
        """``(out, in)``."""
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The values in the serving dtype, ``(out, in)``, as a loader computes them."""
        return self.qtype.decode(self.codes, self.scale, self.shift, self.dtype)


def qtype_of(key: str) -> QType:
    """The type that an operator's argument names; the only look-up of a type by text below the spec."""
    return _BY_KEY[key]
