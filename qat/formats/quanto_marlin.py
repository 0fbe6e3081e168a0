"""quanto's Marlin kernel for float8 weights on CUDA, which loses biases: which layers get it, and how they avoid it."""

from __future__ import annotations

from typing import Any

import torch

from qat.formats.base import LayerTypes
from qat.formats.quanto_types import QUANTO_NAMES

__all__ = ["keep_bias", "loses_bias_on_cuda"]


def loses_bias_on_cuda(types: LayerTypes, shape: tuple[int, int]) -> bool:
    """Whether quanto multiplies such a weight on CUDA by its Marlin kernel, whose linear function never adds a bias.

    See ``MarlinF8QBytesLinearFunction.forward`` in ``optimum/quanto/tensor/weights/marlin/fp8/qbits.py``; the sizes
    are those of ``WeightQBytesTensor.create``. It leaves weights alone that say they serve quantized activations, and
    nothing else reads that mark of a weight, so `keep_bias` sets it.
    """
    if not types.weights.floating or types.activations is not None or types.dtype is torch.float32:
        return False
    out_features, in_features = shape
    return (in_features % 64 == 0 and out_features % 128 == 0) or (in_features % 128 == 0 and out_features % 64 == 0)


def keep_bias(weight: Any) -> Any:
    """Mark the float8 weight of a layer with a bias, so that no move gives it to the kernel that loses biases."""
    if weight.qtype.name != QUANTO_NAMES["float8"]:
        return weight
    if hasattr(weight, "_workspace"):  # Marlin's; converted back, a weight is marked already
        return weight.weight_qbytes_tensor()
    if weight.activation_qtype is None:
        weight.activation_qtype = weight.qtype
    return weight
