"""`PackedLinear`: the base of an adapter, held as packed codes; its weight is computed wherever it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.numerics import FrozenWeight, QType

__all__ = ["PackedForm", "PackedLinear"]

_TYPE = "packed_type"  # in a state dict, where int8 and float8 have the same shapes


class PackedForm(NamedTuple):
    """How a weight is made of packed codes, scale and shift."""

    qtype: QType
    shape: torch.Size
    serving: torch.dtype
    """In which values are computed; below, the dtype that they are handed on in."""
    dtype: torch.dtype

    def pack(self, codes: Tensor) -> Tensor:
        """The codes, uint8, as many a byte as fit: the first byte has the first code of each of its parts."""
        if self.qtype.bits < 8 and self.qtype.code_min:
            codes = codes - int(self.qtype.code_min)  # from 0 on
        parts, flat = 8 // self.qtype.bits, codes.view(torch.uint8).flatten()
        flat = nn.functional.pad(flat, (0, -flat.numel() % parts)).view(parts, -1)
        packed = flat[0].clone()
        for place in range(1, parts):
            packed |= flat[place] << (place * self.qtype.bits)
        return packed

    def _moved(self, codes: Tensor, sign: int) -> Tensor:
        """Codes that are narrower than a byte, moved so that the smallest one is 0 (``sign`` -1), and back (1)."""
        narrow = self.qtype.bits < 8 and self.qtype.code_min
        return codes + sign * int(self.qtype.code_min) if narrow else codes

    @torch.no_grad()
    def weight(self, packed: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """The weight, ``(out, in)``."""
        bits = self.qtype.bits
        parts = [(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)] if bits < 8 else [packed]
        codes = torch.cat(parts)[: self.shape.numel()].view(self.qtype.storage).view(self.shape)
        if bits < 8 and self.qtype.code_min:
            codes += int(self.qtype.code_min)
        kept = self.qtype.scale_dtype(self.serving)  # which a cast of the model may have changed
        shift = None if shift is None else shift.to(kept)
        return FrozenWeight(codes, scale.to(kept), shift, self.qtype, self.serving).dequantize().to(self.dtype)


class PackedLinear(nn.Module):
    """A frozen linear layer in the place of an `nn.Linear`, ``dtype`` its dtype."""

    packed: Tensor
    scale: Tensor
    shift: Tensor | None

    def __init__(self, weight: FrozenWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.form = PackedForm(weight.qtype, weight.shape, weight.dtype, dtype)
        self.register_buffer("packed", self.form.pack(weight.codes))
        self.register_buffer("scale", weight.scale)
        self.register_buffer("shift", weight.shift)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, ``(out, in)``."""
        return self.form.weight(self.packed, self.scale, self.shift)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The dtype of the weight is no tensor, and follows what `Module.to` makes of one.
        self.form = self.form._replace(dtype=fn(torch.empty(0, dtype=self.form.dtype, device=self.packed.device)).dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}{_TYPE}"] = torch.tensor(list(self.form.qtype.key.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.pop(f"{prefix}{_TYPE}", None)
        if found is not None and (key := bytes(found.tolist()).decode()) != self.form.qtype.key:
            raise StateError(
                f"state_dict: the codes of {prefix.rstrip('.')!r} are {key}, and the packed base here is "
                f"{self.form.qtype.key}: call qat.pack_base with the type of the checkpoint"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``."""
        return nn.functional.linear(input, self.weight, self.bias)
