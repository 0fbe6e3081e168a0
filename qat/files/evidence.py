"""Evidence that freezing leaves, and that verification holds against a reloaded checkpoint.

For each layer: a digest of its codes, its scale and its shift, and one of the weight that a fake-quantized forward
gave at the very moment of freezing. The last one is computed by the *training* operator, the first three from what
was packed; so a reload that reproduces all four proves that what was trained is what is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qat.errors import StateError
from qat.spec import QuantSpec

__all__ = ["FrozenRecord", "LayerEvidence", "frozen_record", "is_frozen", "record_frozen"]

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


def is_frozen(model: nn.Module) -> bool:
    """Whether freezing, or a load of what was frozen, left a record on ``model``."""
    return hasattr(model, _ATTRIBUTE)
