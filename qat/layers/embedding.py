"""`QEmbedding`: a table of which only the rows that are read are fake-quantized.

A row has groups of its own, so its value depends on its own weights and on the quantizer's state of these groups alone.
Where a batch reads more rows than the table has, the table is quantized whole. A head that is tied to it shares the
master and the quantizer.

transformers' scaled word embeddings multiply what `nn.Embedding` gives by a number. They get a class of their own that
keeps their forward, with the quantized look-up below it.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.layers.base import QuantizedLayer
from qat.layers.functional import fake_quantized
from qat.quantizers.base import Quantized, WeightQuantizer

__all__ = ["QEmbedding"]


class QEmbedding(QuantizedLayer, nn.Embedding):
    """An embedding with a fake-quantized table, ``(rows, dim)``; its loaders are `qat.load` and the plug-in.

    Ids are no numbers to quantize, and the rows that it gives stay float.
    """

    replaces: ClassVar[type[nn.Module]] = nn.Embedding
    targets: ClassVar[tuple[str, ...]] = ("transformers", "gguf")
    linear: ClassVar[bool] = False
    float_by_default: ClassVar[str] = "embedding"
    rows: int
    """How many the table had when it was prepared."""

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Also transformers' classes that only multiply what `nn.Embedding` gives by a number."""
        kind = type(module)
        scaled = kind.__name__.endswith("ScaledWordEmbedding") and kind.__module__.startswith("transformers.models.")
        alone = kind.__bases__ == (nn.Embedding,) and list(module._parameters) == ["weight"]
        return kind is nn.Embedding or (scaled and alone)

    @classmethod
    def class_for(cls, module: nn.Module) -> type[Self]:
        """For a scaled embedding a class whose forward is still its own."""
        kind: Any = type(module)
        return cls if kind is nn.Embedding else _scaled(cls, kind)  # type: ignore[arg-type]

    @classmethod
    def adoption_fault(cls, module: nn.Module) -> str | None:
        """Also of options that no frozen table has, or that gradients through it cannot have."""
        if (fault := super().adoption_fault(module)) is not None:
            return fault
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if value := getattr(module, option):
                return f"its option {option}={value} has no quantized form: build the embedding without it"
        return None

    @classmethod
    def adopt(cls, module: nn.Module, *quantizers: Any, **named: Any) -> Self:
        """As any layer; how many rows it has then is kept."""
        layer = super().adopt(module, *quantizers, **named)
        layer.rows = layer.num_embeddings
        return layer

    def example_input(self, rows: int, generator: torch.Generator) -> Tensor:
        """Ids, ``(rows, 1)``."""
        return torch.randint(self.num_embeddings, (rows, 1), generator=generator, device=generator.device)

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """Rows of the whole table."""
        table = self.weight if weight is None else fake_quantized(self.weight, weight, self.weight_quantizer)
        return nn.functional.embedding(x, table, self.padding_idx)

    def _run(self, input: Tensor) -> Tensor:
        master, quantizer = self.weight, self.weight_quantizer
        if not self.mode.weights:
            return self.compute(input, None)
        self._require_quantizers_beside(master)
        if len(master) != self.rows and quantizer.state_dict():
            raise StateError(
                f"model: its table has {len(master)} rows, but its ranges are for {self.rows}: resize it before "
                "qat.prepare"
            )
        if input.numel() >= self.num_embeddings or torch.compiler.is_compiling():
            return self.compute(input, quantizer.quantize(master, master.dtype))
        ids = input.reshape(-1)
        rows = nn.functional.embedding(ids, master, self.padding_idx)
        own = _of_rows(quantizer, ids, self.num_embeddings, self.padding_idx)
        value = fake_quantized(rows, own.quantize(rows, master.dtype), own)
        return value.view(*input.shape, self.embedding_dim)


def _of_rows(quantizer: WeightQuantizer, ids: Tensor, rows: int, padding_idx: int | None) -> WeightQuantizer:
    """A quantizer with the state of these rows alone; gradients go on to the state of the whole table."""
    state = {**quantizer._parameters, **quantizer._buffers}
    return quantizer.with_state({key: _rows_of(t, ids, rows, padding_idx) for key, t in state.items()})


def _rows_of(state: Tensor | None, ids: Tensor, rows: int, padding_idx: int | None) -> Tensor | None:
    if state is None or not state.ndim or len(state) % rows:
        return state  # one number for the whole table
    found = nn.functional.embedding(ids, state.reshape(rows, -1), padding_idx)
    return found.reshape(-1, *state.shape[1:])


@functools.cache
def _scaled(cls: type[Any], kind: type[nn.Module]) -> type[Any]:
    # Its own class comes first, so that its `super().forward(ids)` is the quantized look-up.
    return type(f"Q{kind.__name__}", (kind, cls), {"replaces": kind, "__module__": cls.__module__})
