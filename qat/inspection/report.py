"""What an inspection found: one row a layer, the weights outside linear layers, and the table of both."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from torch import nn

from qat.errors import listed
from qat.spec import QuantSpec
from qat.tensors import matrices

__all__ = ["FloatWeight", "InspectReport", "LayerInspection", "other_notes", "other_weights"]


@dataclass(frozen=True)
class LayerInspection:
    """What becomes of one linear layer."""

    name: str
    class_name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    weights: str | None
    """Type of the quantized weight; None: stays float."""
    activations: str | None
    group_size: int | None
    """Elements that share a scale; None for 8-bit types and whole rows."""
    reason: str
    """Why it stays float, or which pattern chose its type."""
    bytes_before: int
    """Bytes of the weight in the serving dtype."""
    bytes_after: int
    """Bytes of the weight as exported: codes, scales and shifts, and the float copy of a weight that was tied."""
    shared_with: str | None = None
    """The layer whose weight is also its own, tied: all bytes count there."""


@dataclass(frozen=True)
class FloatWeight:
    """A weight of two or more dimensions that stays float: in no layer that can be quantized, or in one that is not
    by default and that no pattern names, such as an embedding.
    """

    name: str
    """Full name of the parameter."""
    class_name: str
    """The class of the module that holds it."""
    shape: tuple[int, ...]
    default: str = ""
    """By what default it stays float; empty: it has no quantized form."""

    @property
    def reason(self) -> str:
        """Why it stays float."""
        unknown = ", whose forward is unknown" if "expert" in self.class_name.lower() else ""
        return self.default or f"{len(self.shape)}-D weight of {self.class_name}{unknown}: no quantized form"


@dataclass(frozen=True)
class InspectReport:
    """Every linear layer, every other one that a pattern names, and the totals.

    Prints as a table, where layers that differ only by the numbers in their names are one line, with their count.
    """

    target: str
    spec: QuantSpec
    layers: tuple[LayerInspection, ...]
    parameters: int
    """All parameters of the model as prepared, shared ones once: an untied weight and its copy are two."""
    notes: tuple[str, ...] = ()
    """What else a user should know (leaf-name collisions, a tie that will be broken, weights outside linear layers)."""
    others: tuple[FloatWeight, ...] = ()
    """Weights outside linear layers, which stay float: embeddings, convolutions, experts in one parameter."""
    warnings: tuple[str, ...] = ()
    """Those of the notes that say what stays float although it need not; `qat.prepare` logs them."""

    @property
    def left_float(self) -> dict[str, str]:
        """Every weight of two and more dimensions that stays float, by its layer's or its own name, with the reason."""
        layers = {layer.name: layer.reason for layer in self.layers if layer.weights is None}
        outside = {other.name.removesuffix(".weight"): other.reason for other in self.others}
        return layers | outside

    @property
    def quantized_parameters(self) -> int:
        """Weights that will be quantized."""
        return sum(prod(layer.shape) for layer in self.layers if layer.weights and layer.shared_with is None)

    @property
    def quantized_share(self) -> float:
        """Share of all parameters that will be quantized, 0 to 1."""
        return self.quantized_parameters / max(1, self.parameters)

    @property
    def linear_share(self) -> float:
        """Share of the linear layers' weights that will be quantized, 0 to 1."""
        own = (prod(layer.shape) for layer in self.layers if layer.shared_with is None)
        return self.quantized_parameters / max(1, sum(own))

    @property
    def bytes_before(self) -> int:
        """Bytes of all linear weights in the serving dtype."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all linear weights as exported."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        totals = ("quantized_parameters", "quantized_share", "linear_share", "bytes_before", "bytes_after")
        spec = self.spec.model_dump(mode="json")
        return asdict(self) | {"spec": spec} | {name: getattr(self, name) for name in totals}

    def __str__(self) -> str:
        return self._shown(_groups(self.layers))

    def table(self) -> str:
        """As ``str``, but with a line for each layer, also for those that differ only by the numbers in their names."""
        return self._shown((layer.name, [layer]) for layer in self.layers)

    def _shown(self, groups: Iterable[tuple[str, Sequence[LayerInspection]]]) -> str:
        rows = [("layer", "shape", "weights", "group", "MiB", "reason")]
        for name, group in groups:
            layer = group[0]
            kind = (layer.weights or "float") + (f"+{layer.activations}" if layer.activations else "")
            size = str(layer.group_size or "row") if layer.weights else "-"
            before = sum(layer.bytes_before for layer in group) / 2**20
            after = sum(layer.bytes_after for layer in group) / 2**20
            sizes = f"{before:.2f} -> {after:.2f}"
            rows.append((name, f"{layer.shape[0]}x{layer.shape[1]}", kind, size, sizes, layer.reason))
        for family, (kind, count) in _families(self.others).items():
            share = f"{kind}, stays float: {count / max(1, self.parameters):.1%} of the parameters"
            rows.append((family, "", "float", "-", "", share))
        width = max(len(name) for name, *_ in rows)
        lines = [f"{n:{width}}  {s:>13}  {w:8}  {g:>5}  {b:>15}  {r}".rstrip() for n, s, w, g, b, r in rows]
        lines.append(
            f"{self.quantized_share:.1%} of {self.parameters:,} parameters quantized for target {self.target!r}; "
            f"linear weights {self.bytes_before / 2**20:.1f} MiB in {self.spec.dtype} -> "
            f"{self.bytes_after / 2**20:.1f} MiB"
        )
        return "\n".join([*lines, *self.notes])


def _groups(layers: Iterable[LayerInspection]) -> Iterator[tuple[str, list[LayerInspection]]]:
    """Layers whose rows are equal but for the numbers in names, with stars for those that differ, and their count."""
    groups: dict[LayerInspection, list[LayerInspection]] = defaultdict(list)
    for layer in layers:
        reason = re.sub(r"[A-Za-z_][\w.]*", lambda found: _starred(found[0]), layer.reason)
        groups[replace(layer, name=_starred(layer.name), reason=reason)].append(layer)
    for key, group in groups.items():
        if len({layer.reason for layer in group}) > 1:
            group[0] = replace(group[0], reason=key.reason)
        parts = zip(*(layer.name.split(".") for layer in group), strict=True)
        name = ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
        yield (f"{name}  x{len(group)}" if len(group) > 1 else name), group


def _starred(name: str) -> str:
    """A dotted name with a star for each number that is a part of it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _families(weights: Iterable[FloatWeight]) -> dict[str, tuple[str, int]]:
    """Weights that differ only in the numbers in their names, as one: class of the module and count of elements."""
    families: dict[str, tuple[str, int]] = {}
    for weight in weights:
        family = _starred(weight.name)
        count = families.get(family, ("", 0))[1]
        families[family] = (weight.class_name, count + prod(weight.shape))
    return families


def other_weights(
    model: nn.Module, counted: Iterable[nn.Parameter], reasons: Mapping[str, str] | None = None
) -> Iterator[FloatWeight]:
    """Every parameter of two and more dimensions, once, that is not among those ``counted`` with layers.

    ``reasons`` says by full name why some stay float.
    """
    seen = {id(parameter) for parameter in counted}
    for path, module in model.named_modules():
        for key, parameter in matrices(module).items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{path}.{key}" if path else key
                reason = (reasons or {}).get(name, "")
                yield FloatWeight(name, type(module).__name__, tuple(parameter.shape), reason)


def other_notes(others: Iterable[FloatWeight], parameters: int) -> list[str]:
    """Say what stays float outside linear layers; embeddings are expected there, and stand in the table."""
    told = [weight for weight in others if weight.class_name != "Embedding"]
    if not told:
        return []
    share = sum(prod(weight.shape) for weight in told) / max(1, parameters)
    families = sorted(_families(told).items(), key=lambda item: -item[1][1])
    shown = listed([f"{name} ({kind}, {count / max(1, parameters):.1%})" for name, (kind, count) in families], 4)
    return [f"{share:.1%} of the parameters are weights outside nn.Linear and stay float: {shown}"]
