"""Packed weights: the tensor classes of optimum-quanto that hold one, and the class that loses a bias.

The classes hold equal values, but multiply by kernels that round differently; which one a weight is in depends on its
format, the device, and how it came there. One kernel is wrong: see `keep_bias`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qat.qtypes import QTYPES, group_size
from qat.quantizers import Final
from qat.targets import Target

__all__ = ["as_held", "keep_bias", "pack"]


def pack(final: Final, qtype: str, activation_qtype: Any) -> Any:
    """The weight in the plain tensor class of the files.

    Args:
        final: codes, scale and shift.
        qtype: the target format's name.
        activation_qtype: quanto's type of the layer's quantized activations, or None.
    """
    from optimum.quanto import qtypes
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor

    kind = QTYPES[qtype]
    codes, scale, shift = final
    size, stride = codes.size(), codes.stride()
    if not kind.affine:
        scale = scale.reshape(()) if codes.shape[0] == 1 else scale  # one row: per-tensor, as quanto has it
        return WeightQBytesTensor(qtypes[kind.quanto_name], 0, size, stride, codes, scale, activation_qtype)
    elements = group_size(qtype, codes.shape[1])
    rows = codes if elements is None else codes.reshape(-1, elements)
    return WeightQBitsTensor(qtypes[kind.quanto_name], 0, elements, size, stride, rows, scale, shift)


def keep_bias(weight: Any) -> Any:
    """Mark the packed weight of a layer with a bias, in place: no move then gives it to the kernel that loses biases.

    On CUDA of compute capability 8.0 or later, optimum-quanto 0.2.7 multiplies float8 weights of bfloat16 and float16
    models by a Marlin kernel whose linear function never adds the bias (``MarlinF8QBytesLinearFunction.forward`` in
    ``optimum/quanto/tensor/weights/marlin/fp8/qbits.py``). It leaves weights alone that say they serve quantized
    activations, and nothing else reads that mark of a weight.

    Returns:
        the weight, which is another tensor where it was in that kernel's class already.
    """
    if weight.qtype.name != QTYPES["float8"].quanto_name:
        return weight
    if hasattr(weight, "_workspace"):  # Marlin's; converted back, a weight is marked already
        return weight.weight_qbytes_tensor()
    if weight.activation_qtype is None:
        weight.activation_qtype = weight.qtype
    return weight


def as_held(weight: Any, target: Target) -> Tensor:
    """A packed weight in the tensor class in which the target's loader holds it on the weight's device.

    Moving a weight between devices, and even ``.to("cpu")``, makes it one of a kernel's class.
    """
    if weight.device.type != "cpu" or not target.plain_on_cpu:
        return weight.optimize()  # type: ignore[no-any-return]
    if hasattr(weight, "weight_qbits_tensor") and type(weight).__name__ != "WeightQBitsTensor":
        weight = weight.weight_qbits_tensor()
    return weight  # type: ignore[no-any-return]
