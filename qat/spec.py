"""What is quantized: `QuantSpec`, and how its patterns resolve for one module name.

Patterns are ``fnmatch`` patterns on full module names. Precedence: overrides, then exclude, then include, then
the default; among overrides the last match wins. `qat.inspection` applies the resolution to a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from qat.errors import SpecError, shown

if TYPE_CHECKING:
    import torch
    from pydantic_core import ErrorDetails

__all__ = ["ActivationType", "LayerSpec", "NamedArguments", "QuantSpec", "Resolution", "ServingDtype", "WeightType"]

_OfQuanto = Literal["int8", "float8", "int4", "int2"]
_Grouped = Literal["int4_g32", "int4_g64", "int4_g128", "int2_g32", "int2_g64", "int2_g128"]
_ZeroPoint = Literal["int4_g32_zp", "int4_g64_zp", "int4_g128_zp", "int2_g32_zp", "int2_g64_zp", "int2_g128_zp"]
_OfGguf = Literal["q8_0", "q4_0", "q4_1"]
WeightType = Literal[_OfQuanto, _Grouped, _ZeroPoint, _OfGguf]
ActivationType = Literal["int8", "float8"]
ServingDtype = Literal["float32", "bfloat16", "float16"]


_WILD = frozenset("*?[")
_FAULTS_SHOWN = 5


class NamedArguments(BaseModel):
    """Frozen, and made of named arguments; a wrong one raises `SpecError`, with all faults in pydantic's words."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, *unnamed: Any, **values: Any) -> None:
        name, fields = type(self).__name__, type(self).model_fields
        if unnamed:
            field = next((field for field in fields if field != "kind"), "kind")
            raise SpecError(f"{name}: got {shown(unnamed[0])} without a name: write {name}({field}=...)")
        try:
            super().__init__(**values)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            raise SpecError("\n".join(f"{name}: {_told(fault, fields)}" for fault in faults)) from None

    # With this pydantic validates a spec within a configuration without the call, and collects all faults there.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def _told(fault: ErrorDetails, fields: Iterable[str]) -> str:
    """The argument, the rule, the value and what to give instead, which most rules name."""
    location, rule = fault["loc"], fault["msg"].removeprefix("Value error, ")
    if len(location) > 2:  # the third says which form the override has
        location, fields = location[:2] + location[3:], LayerSpec.model_fields
    argument = ".".join(map(str, location))
    if fault["type"] == "value_error":  # a rule of ours names the value itself
        return f"{argument}: {rule}" if argument else rule
    remedy = f": choose from {', '.join(fields)}" if fault["type"] == "extra_forbidden" else ""
    return f"{argument}: {rule}, got {shown(fault['input'])}{remedy}"


def _matching(pattern: str, names: Mapping[str, object]) -> list[str]:
    if _WILD.isdisjoint(pattern):
        return [pattern] if pattern in names else []
    return [name for name in names if fnmatchcase(name, pattern)]


class LayerSpec(NamedArguments):
    """The types of one layer, for `QuantSpec.overrides`."""

    weights: Literal[WeightType, "float"]
    """The weight's type, or ``"float"`` to leave the layer as it is."""
    activations: ActivationType | None = None
    """The type of its inputs and outputs; a model has one activation type or none."""

    @model_validator(mode="after")
    def _float_layers_have_no_activations(self) -> LayerSpec:
        if self.weights == "float" and self.activations is not None:
            raise ValueError("a layer with weights='float' cannot have quantized activations: leave activations out")
        return self


class Resolution(NamedTuple):
    """How a spec's patterns resolve for one module: its types (None: float), why, and whether it was named."""

    layer: LayerSpec | None
    reason: str
    explicit: bool
    """True when an include pattern or an override named the module, which also overrules defaults of ours."""


# Told apart by their form, so that a wrong override has the faults of one of them.
_Override = Annotated[
    Annotated[Literal[WeightType, "float"], Tag("name")] | Annotated[LayerSpec, Tag("LayerSpec")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "LayerSpec"),
]


class QuantSpec(NamedArguments):
    """What is quantized, to which types, and in which dtype it will be served.

    >>> spec = QuantSpec(weights="int4", exclude=("lm_head",), overrides={"*.down_proj": "int8"})
    >>> spec.resolve("model.layers.0.mlp.down_proj").layer.weights
    'int8'
    >>> spec.resolve("lm_head").layer is None
    True
    """

    weights: WeightType = "int8"
    """The type of every quantized weight that no override names."""
    activations: ActivationType | None = None
    """The type of the inputs and outputs of quantized layers, or none."""
    dtype: ServingDtype = "bfloat16"
    """The dtype that the exported model is served in; scales and shifts are rounded to it during training."""
    include: tuple[str, ...] = ()
    """Patterns of whole module names, such as '*.q_proj'; when any is given, only what matches one is quantized."""
    exclude: tuple[str, ...] = ()
    """Patterns of module names that stay float."""
    overrides: dict[str, _Override] = Field(default_factory=dict)
    """Pattern to type, on a command line '*.down_proj=int8' (or to `LayerSpec`); beats the others, the last wins."""
    quantize_outputs: bool | None = None
    """Layers with an activation type quantize outputs too. None: where the loader must."""

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_pattern_is_a_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _a_dtype_of_torch_is_its_name(cls, value: Any) -> Any:
        return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value

    @model_validator(mode="after")
    def _one_activation_type(self) -> QuantSpec:
        kinds = self._activation_types()
        if len(kinds) > 1:
            raise ValueError(f"a model has one activation type, but this spec names {sorted(kinds)}: choose one")
        return self

    def _activation_types(self) -> set[ActivationType]:
        named = (layer.activations for layer in self.overrides.values() if isinstance(layer, LayerSpec))
        return {kind for kind in (self.activations, *named) if kind is not None}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The serving dtype as torch's object."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def outputs(self) -> bool:
        """Whether outputs are quantized too, once a target has resolved the spec."""
        return self.quantize_outputs is not False

    def weight_types(self) -> set[str]:
        """The weight types that the spec names, wherever in it; ``"float"`` is none."""
        named = (layer.weights if isinstance(layer, LayerSpec) else layer for layer in self.overrides.values())
        return {str(name) for name in (self.weights, *named) if name != "float"}

    @property
    def activation_type(self) -> ActivationType | None:
        """The model's one activation type, wherever in the spec it is named."""
        return next(iter(self._activation_types()), None)

    def resolve(self, name: str) -> Resolution:
        """Resolve the patterns for the module called ``name``."""
        default = LayerSpec(weights=self.weights, activations=self.activations)
        for pattern, value in reversed(self.overrides.items()):
            if pattern == name or (not _WILD.isdisjoint(pattern) and fnmatchcase(name, pattern)):
                layer = value if isinstance(value, LayerSpec) else default.model_copy(update={"weights": value})
                if layer.weights == "float":
                    return Resolution(None, f"override {pattern!r}: float", True)
                return Resolution(layer, f"override {pattern!r}", True)
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return Resolution(None, f"excluded by {pattern!r}", True)
        for pattern in self.include:
            if fnmatchcase(name, pattern):
                return Resolution(default, f"included by {pattern!r}", True)
        return Resolution(None, "matches no include pattern", False) if self.include else Resolution(default, "", False)

    def check_patterns(
        self, names: Iterable[str], others: Mapping[str, str] | None = None, *, inside: tuple[str, ...] = ()
    ) -> None:
        """Raise `SpecError` for every pattern that matches none of ``names``, the layers that can be quantized.

        ``others`` are modules with weights that cannot, and what these are; a pattern that asks for one is told so.
        Names that begin as one in ``inside`` are no hint for a better pattern.
        """
        known, others, faults, more = dict.fromkeys(names), others or {}, list[str](), 0
        good = [name for name in known if not name.startswith(inside)]
        for argument, patterns in (("include", self.include), ("exclude", self.exclude), ("overrides", self.overrides)):
            for pattern in patterns:
                if _matching(pattern, known):
                    continue
                held = _matching(pattern, others)
                value = self.overrides.get(pattern) if argument == "overrides" else None
                weights = value.weights if isinstance(value, LayerSpec) else value
                if held and (argument == "exclude" or weights == "float"):
                    continue  # it stays float, as asked
                if (more := more + 1) > _FAULTS_SHOWN:  # a hint takes time
                    continue
                tails = {name.rsplit(".", 1)[-1] for name in good}
                wanted = {tail: f"*.{tail}" for tail in tails} | {name: name for name in good}
                close = [wanted[near] for near in get_close_matches(pattern.lstrip("*."), wanted, n=1)]
                if held:
                    hint = f", only {held[0]} and the like: {others[held[0]]}"
                elif any(fnmatchcase(name, f"{pattern}.*") for name in good):
                    hint = f": it names a module that holds layers; did you mean {f'{pattern}.*'!r}?"
                elif close:
                    hint = f": a pattern matches the whole name; did you mean {close[0]!r}?"
                else:
                    hint = f"; layers here: {good[:5]}..."
                faults.append(f"{argument}: pattern {pattern!r} matches no layer that can be quantized{hint}")
        if faults:
            left = [f"and {more - _FAULTS_SHOWN} more that match none"] if more > _FAULTS_SHOWN else []
            raise SpecError("\n".join([*faults, *left]))
