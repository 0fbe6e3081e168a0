"""Evidence that freezing leaves, and that verification holds against a reloaded checkpoint.

For each layer: a digest of its codes, its scale and its shift, and one of the weight that a fake-quantized forward
gave at the very moment of freezing. The last one is computed by the *training* operator, the first three from what
was packed; so a reload that reproduces all four proves that what was trained is what is served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import StateError
from qat.spec import QuantSpec

__all__ = [
    "FrozenRecord",
    "LayerEvidence",
    "digest",
    "frozen_record",
    "inner_tensors",
    "layer_evidence",
    "model_device",
    "record_frozen",
    "unpack_weight",
]

_ATTRIBUTE = "_qat_frozen"


@dataclass(frozen=True)
class LayerEvidence:
    """Digests (sha256, hexadecimal) and facts of one frozen layer."""

    weights: str
    activations: str | None
    shape: tuple[int, int]
    """(out_features, in_features)."""
    group_size: int | None
    codes: str
    """Of the unpacked codes: int8, float8 or uint8, row-major."""
    scale: str
    shift: str | None
    weight: str
    """Of the fake-quantized weight in the serving dtype, ``(out, in)``, row-major."""
    input_scale: float | None
    output_scale: float | None


@dataclass(frozen=True)
class FrozenRecord:
    """What a frozen model says of itself."""

    spec: QuantSpec
    target: str
    algorithm: str
    layers: Mapping[str, LayerEvidence]
    notes: tuple[str, ...] = ()
    left_float: Mapping[str, str] = field(default_factory=dict)
    """The linear layers that were not quantized, each with the reason."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "target": self.target,
            "algorithm": self.algorithm,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "notes": list(self.notes),
            "left_float": dict(self.left_float),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FrozenRecord:
        """The inverse of `to_json`."""
        layers = {
            name: LayerEvidence(**{**layer, "shape": tuple(layer["shape"])}) for name, layer in data["layers"].items()
        }
        return cls(
            spec=QuantSpec.model_validate(data["spec"]),
            target=data["target"],
            algorithm=data["algorithm"],
            layers=layers,
            notes=tuple(data["notes"]),
            left_float=dict(data.get("left_float", {})),
        )


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's values as raw bytes, row-major; shape and dtype do not enter.

    >>> digest(torch.zeros(2, 2)) == digest(torch.zeros(4))
    True
    """
    plain = tensor.detach().cpu().contiguous()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's data: itself, or the parts of a quantized one.

    Stock diffusers leaves the wrapper of a loaded weight on the meta device; only the parts say where the data is.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in inner_tensors(getattr(tensor, name))]


def model_device(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU for a model without any."""
    tensors = (*model.parameters(), *model.buffers())
    return inner_tensors(tensors[0])[0].device if tensors else torch.device("cpu")


def unpack_weight(weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``(out, in)``, scale and shift of any of optimum-quanto's weight tensors, kernel-specific ones included."""
    if hasattr(weight, "weight_qbits_tensor") and type(weight).__name__ != "WeightQBitsTensor":
        weight = weight.weight_qbits_tensor()
    elif hasattr(weight, "weight_qbytes_tensor") and type(weight).__name__ != "WeightQBytesTensor":
        weight = weight.weight_qbytes_tensor()
    data = weight._data.unpack() if hasattr(weight._data, "unpack") else weight._data
    return data.reshape(weight.shape), weight._scale, getattr(weight, "_shift", None)


def layer_evidence(module: nn.Module, fake_quantized: Tensor | None = None) -> LayerEvidence:
    """Evidence of one frozen ``optimum.quanto.nn.QLinear``.

    Args:
        module: the frozen layer.
        fake_quantized: the weight that training used, in the serving dtype; None: what the frozen tensor
            dequantizes to.
    """
    layer: Any = module
    codes, scale, shift = unpack_weight(layer.weight)
    weight = layer.weight.dequantize() if fake_quantized is None else fake_quantized
    activations = layer.activation_qtype
    return LayerEvidence(
        weights=_plain_name(layer.weight_qtype.name),
        activations=None if activations is None else _plain_name(activations.name),
        shape=(layer.out_features, layer.in_features),
        group_size=layer.weight_group_size,
        codes=digest(codes),
        scale=digest(scale),
        shift=None if shift is None else digest(shift),
        weight=digest(weight),
        input_scale=None if activations is None else float(layer.input_scale),
        output_scale=None if activations is None else float(layer.output_scale),
    )


def _plain_name(quanto_name: str) -> str:
    return quanto_name.removeprefix("q").removesuffix("_e4m3fn")


def record_frozen(model: nn.Module, record: FrozenRecord) -> None:
    """Attach ``record`` to ``model``."""
    setattr(model, _ATTRIBUTE, record)


def frozen_record(model: nn.Module) -> FrozenRecord:
    """What freezing recorded of ``model``.

    Raises:
        StateError: the model was never frozen.
    """
    record = getattr(model, _ATTRIBUTE, None)
    if record is None:
        raise StateError("model: was not frozen: call qat.freeze(model) first, on this same module")
    assert isinstance(record, FrozenRecord)
    return record
