"""The modules that run frozen layers of compressed-tensors' format, from their stored tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qat.formats.base import LayerTypes
from qat.formats.compressed_types import pack_words, unpack_words, zero_points
from qat.numerics import FrozenWeight

__all__ = [
    "FrozenExpert",
    "FrozenLinear",
    "joined_rows",
    "packed_weight",
    "packs",
    "split_rows",
    "split_shape",
    "unpacked_weight",
]


def packs(types: LayerTypes) -> bool:
    """Whether codes are packed into words; else they are stored as int8 or float8."""
    return not types.weights.floating and (types.weights.bits < 8 or types.activations is None)


def packed_weight(weight: FrozenWeight, types: LayerTypes) -> dict[str, Tensor]:
    """The stored tensors of a weight, by their names below the layer's."""
    qtype, (out_features, in_features) = weight.qtype, weight.shape
    scale = weight.scale.view(out_features, -1)
    if not packs(types):
        return {"weight": weight.codes, "weight_scale": scale}
    codes = weight.codes.short() - int(qtype.code_min)
    tensors = {"weight_packed": pack_words(codes, qtype.bits), "weight_scale": scale}
    if weight.shift is not None:
        zeros = zero_points(weight.scale, weight.shift).view(out_features, -1)
        tensors["weight_zero_point"] = pack_words(zeros.t(), qtype.bits).t().contiguous()
    return tensors | {"weight_shape": torch.tensor([out_features, in_features])}


def unpacked_weight(tensors: Mapping[str, Tensor], types: LayerTypes, shape: tuple[int, int]) -> FrozenWeight:
    """What `packed_weight` packed, on the device of the tensors."""
    qtype, scale = types.weights, tensors["weight_scale"].detach().reshape(-1, 1)
    if "weight" in tensors:
        return FrozenWeight(tensors["weight"].detach(), scale, None, qtype)
    codes = unpack_words(tensors["weight_packed"].detach(), qtype.bits, shape[1])
    if not qtype.has_shift:
        return FrozenWeight(codes.view(torch.int8) + int(qtype.code_min), scale, None, qtype)
    words = tensors["weight_zero_point"].detach().t()
    zeros = unpack_words(words, qtype.bits, shape[0]).t().reshape(-1, 1)
    return FrozenWeight(codes, scale, (zeros.float() * scale.float()).to(scale.dtype), qtype)


def split_shape(name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of what `split_rows` gives."""
    return shape if name.endswith("weight_shape") else (shape[0] // count, *shape[1:])


def split_rows(name: str, tensor: Tensor, count: int) -> Sequence[Tensor]:
    """A stored tensor, called ``name``, of each of ``count`` equal runs of a layer's rows; not of zero points."""
    if not name.endswith("weight_shape"):
        return tensor.chunk(count)
    rows, width = tensor.unbind()
    return [torch.stack((rows // count, width))] * count


def joined_rows(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """The tensor that `split_rows` split.

    >>> parts = split_rows("weight_shape", torch.tensor([8, 3]), 2)
    >>> parts[1], joined_rows("weight_shape", parts)
    (tensor([4, 3]), tensor([8, 3]))
    """
    if len(tensors) == 1:
        return tensors[0]
    if not name.endswith("weight_shape"):
        return torch.cat(list(tensors))
    rows, width = torch.stack(list(tensors)).unbind(1)
    return torch.stack((rows.sum(), width[0]))


class FrozenLinear(nn.Module):
    """Runs what is stored: the weight is computed again in each call, as the stock loader computes it once.

    The names of its tensors are those in a file, but for the codes of 8 bits, which are ``weight_codes`` here.
    """

    input_scale: Tensor | None

    def __init__(self, types: LayerTypes, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.types = types
        self.out_features, self.in_features = shape
        for key in ("weight", "weight_packed", "weight_scale", "weight_zero_point"):
            if key in tensors:
                self.register_buffer("weight_codes" if key == "weight" else key, tensors[key])
        self.register_buffer("input_scale", tensors.get("input_scale"))
        self.bias = nn.Parameter(tensors["bias"], requires_grad=False) if "bias" in tensors else None

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the weight, by their names in a file."""
        return {
            "weight" if key == "weight_codes" else key: tensor
            for key, tensor in self._buffers.items()
            if tensor is not None
        }

    def frozen_weight(self) -> FrozenWeight:
        """Codes, scale and shift."""
        return unpacked_weight(self.stored(), self.types, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, ``(out, in)``, in the serving dtype."""
        return self.frozen_weight().dequantize()

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b``, of the fake-quantized input where activations have a type."""
        if self.input_scale is not None and self.types.activations is not None:
            scale = self.input_scale.reshape(()).float()
            input = self.types.activations.fake_quantize_activation(input, scale, self.types.dtype)
        return nn.functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and types, for ``print(model)``."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        active = self.types.activations
        return f"{shape}, weights={self.types.weights.name}, activations={None if active is None else active.name}"


class FrozenExpert(FrozenLinear):
    """An expert's matrix, which the module of all experts reads; its input stays float."""

    quantizes_input = False

    def value(self) -> Tensor:
        """What the codes stand for, ``(out, in)``, in the serving dtype."""
        return self.weight
