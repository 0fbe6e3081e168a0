"""Evidence that freezing leaves, and that verification holds against a reloaded checkpoint.

For each layer: a digest of its codes, its scale and its shift, and one of the weight that a fake-quantized forward
gave at the very moment of freezing. The last one is computed by the *training* operator, the first three from what
was packed; so a reload that reproduces all four proves that what was trained is what is served.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from pydantic import ConfigDict
from torch import nn

from qat.errors import StateError
from qat.spec import QuantSpec

__all__ = [
    "FrozenRecord",
    "LayerEvidence",
    "forget_frozen",
    "frozen_record",
    "is_frozen",
    "record_frozen",
    "refuse_saving",
]

_ATTRIBUTE = "_qat_frozen"


@dataclass(frozen=True)
class LayerEvidence:
    """Digests (sha256, hexadecimal) and facts of one frozen layer."""

    __pydantic_config__ = ConfigDict(extra="forbid")

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
    bias: str | None = None
    """None without a bias, and in exports from before it was recorded."""
    kernel: tuple[int, ...] = ()
    """The dimensions of the stored weight after the first two, which are one in its matrix."""

    def differences(self, found: LayerEvidence) -> list[str]:
        """The names of the fields in which a layer that was ``found`` is another one."""
        recorded = (field.name for field in fields(self) if field.name != "bias" or self.bias is not None)
        return [name for name in recorded if getattr(found, name) != getattr(self, name)]


@dataclass(frozen=True)
class FrozenRecord:
    """What a frozen model says of itself; the manifest holds it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    spec: QuantSpec
    target: str
    algorithm: str
    """Kinds of the algorithms that made the quantizers, with commas in between."""
    layers: Mapping[str, LayerEvidence]
    notes: tuple[str, ...] = ()
    left_float: Mapping[str, str] = field(default_factory=dict)
    """Weights of two and more dimensions that were not quantized, each with the reason."""


def record_frozen(model: nn.Module, record: FrozenRecord, *, may_save: bool = False) -> None:
    """Attach ``record`` to ``model``, and let ``save_pretrained`` raise.

    It would write packed keys without the configuration that loads them. Models from a library's own loader have that
    configuration, so they ``may_save``.
    """
    setattr(model, _ATTRIBUTE, record)
    if not may_save:
        refuse_saving(model)


def refuse_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of ``model``, and of the modules in it, raise."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            object.__setattr__(module, "save_pretrained", functools.partial(_saving_refused, type(module).__name__))


def forget_frozen(model: nn.Module) -> None:
    """Take back what `record_frozen` did."""
    delattr(model, _ATTRIBUTE)
    for module in model.modules():
        if getattr(vars(module).get("save_pretrained"), "func", None) is _saving_refused:
            del vars(module)["save_pretrained"]


def _saving_refused(name: str, *_: Any, **__: Any) -> NoReturn:
    raise StateError(
        f"save_pretrained: this {name} is frozen, and what it would write loads with random weights: "
        "write it by qat.export(model, directory)"
    )


def frozen_record(model: nn.Module) -> FrozenRecord:
    """What freezing recorded of ``model``.

    Raises:
        StateError: the model was never frozen.
    """
    if not isinstance(model, nn.Module):
        raise StateError(f"model: must be a frozen nn.Module, got {type(model).__name__}: pass the model first")
    record = getattr(model, _ATTRIBUTE, None)
    if record is None:
        raise StateError("model: was not frozen: call qat.freeze(model) first, on this same module")
    assert isinstance(record, FrozenRecord)
    return record


def is_frozen(model: nn.Module) -> bool:
    """Whether freezing, or a load of what was frozen, left a record on ``model``."""
    return hasattr(model, _ATTRIBUTE)
