"""What a user can mend of layers that stay float: another target, or another adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qat.errors import TargetError, listed
from qat.hosts import TARGETS
from qat.layers import QuantizedLayer
from qat.spec import LayerSpec, QuantSpec

__all__ = ["EXPERTS_APART", "float_shares", "require_held", "target_fault"]

EXPERTS_APART = (
    "experts under an adapter of their parameters: leave them out of the LoraConfig, by a list of target_modules in "
    "place of 'all-linear' and no target_parameters, so that they are quantized"
)


def target_fault(
    model: nn.Module, module: nn.Module, cls: type[QuantizedLayer], target: str, able: dict[str, bool]
) -> str | None:
    """Why the loader of a target can hold no layer of this class, or None.

    ``able`` keeps which targets load such a model at all. To find out takes long, and there may be many experts.
    """
    if not cls.targets or target in cls.targets:
        return None
    what = type(module).__name__ if cls.called else "experts in one parameter"
    for name in cls.targets:
        if name not in able:
            host, own = TARGETS[name].host, TARGETS[name].format.own_modules
            able[name] = not host.model_faults(model) and not (own and host.stock_faults(model, packed=False))
    others = [repr(name) for name in cls.targets if able[name]]
    remedy = f"use target {' or '.join(others)}" if others else "no target for such a model does"
    return f"the loader of target {target!r} replaces no {what}: {remedy}"


def require_held(
    model: nn.Module,
    spec: QuantSpec,
    layers: Mapping[str, tuple[nn.Module, type[QuantizedLayer]]],
    target: str,
) -> None:
    """Raise `TargetError` for a pattern that asks for nothing but layers that the target's loader cannot hold."""
    kinds = {pattern: v.weights if isinstance(v, LayerSpec) else v for pattern, v in spec.overrides.items()}
    overrides = [pattern for pattern, weights in kinds.items() if weights != "float"]
    able: dict[str, bool] = {}
    for argument, patterns in (("include", spec.include), ("overrides", overrides)):
        for pattern in patterns:
            found = [name for name in layers if fnmatchcase(name, pattern)]
            named = {name: target_fault(model, *layers[name], target, able) for name in found}
            if named and all(named.values()):
                fault = next(iter(named.values()))
                names = listed(list(named), 3)
                raise TargetError(f"{argument}: {pattern!r} names {names}, but {fault}, or leave the pattern out")


def float_shares(decisions: Mapping[str, Any], parameters: int) -> Iterator[str]:
    """Sentences on what stays float for a cause that a user can mend, with the share of the parameters."""
    counts: dict[str, int] = {}
    for decision in decisions.values():
        if decision.layer is None and decision.mendable:
            counts[decision.mendable] = counts.get(decision.mendable, 0) + decision.weight.numel()
    for cause, count in counts.items():
        yield f"{count / max(1, parameters):.1%} of the parameters stay float: {cause}"
