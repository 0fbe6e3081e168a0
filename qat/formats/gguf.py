"""GGUF's format: blocks of 32 that llama.cpp, transformers and diffusers read. Types: `gguf_types`.

A layer's weight is one tensor of blocks, ``weight.blocks``. Names and order of rows in a file belong to the model, and
so to the hosts (`qat.hosts.gguf`). The modules here hold blocks, and compute the weight whenever they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.formats.base import Format, FrozenLayer, LayerTypes, Slot
from qat.formats.gguf_types import BLOCK, FLOAT16_QTYPES, QTYPES, block_bytes, pack_blocks, unpack_blocks
from qat.numerics import FrozenWeight, QType

__all__ = ["BLOCKS", "GGUF", "GGUF_FLOAT16", "GgufEmbedding", "GgufLinear"]

BLOCKS = "weight.blocks"
"""Below a layer's name, the tensor that holds its weight."""


class _Packed(nn.Module):
    """A layer whose weight is blocks: uint8, ``(out, bytes of a row)``."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, types: LayerTypes, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.types, self.shape = types, shape
        self.weight = nn.Parameter(tensors[BLOCKS], requires_grad=False)
        self.bias = nn.Parameter(tensors["bias"], requires_grad=False) if "bias" in tensors else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """What some models of diffusers ask a layer of blocks for, to cast its input."""
        return self.types.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = self.types.dtype
        if (asked := fn(torch.empty(0, dtype=dtype, device=self.weight.device)).dtype) != dtype:
            raise StateError(
                f"dtype: the values of a frozen model were trained for {dtype}, got {asked}, which rounds otherwise: "
                f"load it again, and leave it in {dtype}"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def frozen_weight(self) -> FrozenWeight:
        """What the blocks hold."""
        return unpack_blocks(self.weight, self.types.weights, self.types.dtype)

    def extra_repr(self) -> str:
        """Shape and type, for ``print(model)``."""
        return f"{self.shape[0]}, {self.shape[1]}, weights={self.types.weights.name}, bias={self.bias is not None}"


class GgufLinear(_Packed):
    """``x W^T + b``, with the arithmetic of a float layer that holds what the blocks stand for."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return nn.functional.linear(input, self.frozen_weight().dequantize(), self.bias)


class GgufEmbedding(_Packed):
    """A table of which only the rows that are read are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, ``(..., dim)``."""
        rows = unpack_blocks(self.weight[input.reshape(-1)], self.types.weights, self.types.dtype)
        return rows.dequantize().view(*input.shape, self.shape[1])


class _Gguf(Format):
    name: ClassVar[str] = "gguf"
    qtypes: ClassVar[Mapping[str, QType]] = QTYPES
    activation_qtypes: ClassVar[Mapping[str, QType]] = {}
    library: ClassVar[str] = "gguf"
    tags: ClassVar[tuple[str, ...]] = ("gguf",)
    package: ClassVar[str] = "gguf"

    def shape_fault(self, types: LayerTypes, shape: tuple[int, int]) -> str | None:
        """Of rows that are no whole number of blocks."""
        return None if shape[1] % BLOCK == 0 else f"GGUF stores blocks of {BLOCK}, and its rows have {shape[1]} numbers"

    def slots(self, types: LayerTypes, shape: tuple[int, int], bias: bool) -> dict[str, Slot]:
        row = shape[1] // BLOCK * block_bytes(types.weights)
        slots = {BLOCKS: Slot(torch.uint8, ((shape[0], row),))}
        return slots | ({"bias": Slot(types.dtype, ((shape[0],),))} if bias else {})

    def pack(self, layer: FrozenLayer) -> dict[str, Tensor]:
        return {BLOCKS: pack_blocks(layer.weight)} | ({} if layer.bias is None else {"bias": layer.bias})

    def build(
        self,
        types: LayerTypes,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        like: nn.Module,
        plain_on_cpu: bool = False,
    ) -> nn.Module:
        kind = GgufEmbedding if isinstance(like, nn.Embedding) else GgufLinear
        return kind(types, shape, tensors)

    def is_frozen(self, module: nn.Module) -> bool:
        return isinstance(module, _Packed) and module.types.weights in self.qtypes.values()

    def declared(self, module: nn.Module) -> LayerTypes:
        layer: Any = module
        return layer.types  # type: ignore[no-any-return]

    def shape(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.shape  # type: ignore[no-any-return]

    def blocks(self, module: nn.Module) -> Tensor:
        """The weight of a frozen layer as it is stored."""
        layer: Any = module
        return layer.weight  # type: ignore[no-any-return]

    def read(self, module: nn.Module) -> FrozenLayer:
        layer: Any = module
        types, blocks = self.declared(module), self.blocks(module)
        one = torch.ones((), dtype=types.dtype, device=blocks.device)
        return FrozenLayer(unpack_blocks(blocks, types.weights, types.dtype), layer.bias, types, one, one)


class _GgufFloat16(_Gguf):
    """The same blocks with diffusers' arithmetic, and its own layers beside ours."""

    name: ClassVar[str] = "gguf-float16"
    qtypes: ClassVar[Mapping[str, QType]] = FLOAT16_QTYPES

    def is_frozen(self, module: nn.Module) -> bool:
        return super().is_frozen(module) or _stock_type(module) in self.qtypes

    def declared(self, module: nn.Module) -> LayerTypes:
        if isinstance(module, _Packed):
            return module.types
        layer: Any = module
        return LayerTypes(self.qtypes[_stock_type(module)], None, layer.compute_dtype)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.shape if isinstance(module, _Packed) else (layer.out_features, layer.in_features)

    def blocks(self, module: nn.Module) -> Tensor:
        layer: Any = module
        return layer.weight if isinstance(module, _Packed) else layer.weight.as_tensor()  # type: ignore[no-any-return]

    def values(self, module: nn.Module) -> Tensor:
        """Of diffusers' layers by its own arithmetic."""
        if isinstance(module, _Packed):
            return super().values(module)
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        layer: Any = module
        return dequantize_gguf_tensor(layer.weight).to(layer.compute_dtype)  # type: ignore[no-any-return,no-untyped-call]


def _stock_type(module: nn.Module) -> str:
    """The type of a weight that diffusers holds, as a spec names it; empty for other modules."""
    return str(getattr(getattr(getattr(module, "weight", None), "quant_type", None), "name", "")).lower()


GGUF = _Gguf()
GGUF_FLOAT16 = _GgufFloat16()
