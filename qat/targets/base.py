"""What a target is: who will load the files, what it can express, and which dtype it gives each tensor.

A target is stated here without importing the loader, so that a spec which cannot be served is refused before any
training, on a machine that may not even have the loader installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qat.qtypes import group_size
from qat.spec import LayerSpec, QuantSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Target", "input_hazard", "kernel_hazard", "loses_bias_on_cuda", "matches_path_part"]


def matches_path_part(name: str, keys: Iterable[str]) -> bool:
    """Whether one of ``keys`` is a whole part (or run of parts) of the dotted ``name``."""
    return any(re.search(rf"(^|\.){re.escape(key)}(\.|$)", name) for key in keys)


def kernel_hazard(layer: LayerSpec, dtype: str, in_features: int, out_features: int) -> str | None:
    """Why the stock CPU kernels cannot run such a layer, or None.

    Both were measured on torch 2.13 with optimum-quanto 0.2.7; a test repeats the measurement in a subprocess, since
    one of them ends the process.
    """
    if dtype != "bfloat16":
        return None
    if layer.weights == "int8" and in_features % 4 == 0 and in_features % 16 != 0:
        return f"kernel: int8 with bfloat16 on a CPU crashes when in_features ({in_features}) is not a multiple of 16"
    if layer.weights == "int4" and group_size("int4", in_features) == 128 and out_features % 16 != 0:
        return f"kernel: int4 with bfloat16 in groups of 128 needs out_features ({out_features}) divisible by 16"
    return None


def loses_bias_on_cuda(weights: str, activations: str | None, dtype: str, shape: tuple[int, int]) -> bool:
    """Whether optimum-quanto 0.2.7 multiplies such a weight on CUDA by its Marlin kernel, which never adds a bias.

    The sizes are those of ``WeightQBytesTensor.create``; see `qat.packing.keep_bias`.
    """
    if weights != "float8" or activations is not None or dtype == "float32":
        return False
    out_features, in_features = shape
    return (in_features % 64 == 0 and out_features % 128 == 0) or (in_features % 128 == 0 and out_features % 64 == 0)


def input_hazard(layer: LayerSpec, dtype: str, x: torch.Tensor) -> str | None:
    """Why the stock CPU kernels cannot read ``x`` as the input of such a layer, or None.

    They flatten it to rows without a copy where its strides allow that, and then want it contiguous: int4 wholly (a
    pooler that reads ``hidden[:, 0]`` fails), int8 within a row.
    """
    if dtype != "bfloat16" or x.numel() == 0:
        return None
    rows = x.detach().reshape(-1, x.shape[-1])
    if layer.weights == "int4" and group_size("int4", x.shape[-1]) == 128 and not rows.is_contiguous():
        return "kernel: int4 with bfloat16 in groups of 128 raises on a CPU when the input is not contiguous, as here"
    if layer.weights == "int8" and x.shape[-1] % 4 == 0 and len(rows) > 1 and rows.stride(-1) != 1:
        return "kernel: int8 with bfloat16 raises on a CPU when the input is not contiguous within a row, as here"
    return None


@dataclass(frozen=True)
class Target:
    """One loader. Subclasses override what differs; this base says: everything can be expressed."""

    name: str
    leaf_names_only: bool = False
    """The loader names float layers by the last part of their module name only."""
    initialises_buffers: bool = False
    """Buffers that no file holds get their values after the model is built, in float32 and cast; otherwise while it is
    built, in the serving dtype."""
    plain_on_cpu: bool = False
    """The loader leaves packed weights on a CPU in the plain tensor class, instead of a kernel's own."""

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """What the spec asks for that the loader cannot express, each with its remedy."""
        if not spec.quantize_outputs:
            return [
                f"quantize_outputs=False: the loader of target {self.name!r} always quantizes outputs: leave it True"
            ]
        return []

    def model_faults(self, model: Any) -> list[str]:
        """Why the loader cannot load such a model at all, each with its remedy."""
        return []

    def kept_in_float32(self, model: Any, name: str, dtype: str) -> bool:
        """Whether the loader holds the tensor or module called ``name`` in float32 when serving ``dtype``."""
        return False

    def layer_fault(self, model: Any, name: str, weights: str, dtype: str) -> str | None:
        """Why the loader cannot hold the linear layer called ``name`` with such weights, or None."""
        return "kept in float32 by the loader" if self.kept_in_float32(model, name, dtype) else None

    def tensor_dtype(self, model: Any, name: str, spec: QuantSpec) -> torch.dtype:
        """The dtype in which the loader holds the float tensor called ``name``."""
        import torch

        return torch.float32 if self.kept_in_float32(model, name, spec.dtype) else spec.torch_dtype
