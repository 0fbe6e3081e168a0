"""What inspection decides of experts as a whole: which layers are routers, and whether a spec treats experts alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from qat.errors import SpecError, listed
from qat.layers import QuantizedLayer, experts_in

__all__ = ["require_whole", "routers"]

_CLASSES = ("router", "gating", "gate")


def routers(model: nn.Module) -> set[int]:
    """Ids of the linear layers that decide which expert a token goes to, told by their place beside the experts.

    >>> experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    >>> block = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": experts, "out": nn.Linear(8, 8)})
    >>> routers(block) == {id(block["gate"])}
    True
    """
    return {id(layer) for module in model.modules() for layer in _routers_of(module)}


def _routers_of(block: nn.Module) -> Iterator[nn.Linear]:
    """The routers among the children of one module."""
    counts = {name: _experts(name, child) for name, child in block.named_children()}
    known = {count for count in counts.values() if count}
    for name, child in block.named_children():
        if not known or counts[name]:
            continue
        linear = [layer for layer in child.modules() if isinstance(layer, nn.Linear)]
        by_name = any(part in f"{name} {type(child).__name__}".lower() for part in _CLASSES)
        # A gate of shared experts has one output.
        sizes = known | {1} if by_name else known
        if any(layer.out_features in sizes for layer in linear) and (len(linear) == 1 or by_name):
            yield from linear


def _experts(name: str, module: nn.Module) -> int:
    """How many experts a module holds; 0 where it holds none."""
    in_parameters = {key.partition(".")[0] for key, _ in experts_in(module)}
    if not in_parameters and isinstance(module, nn.ModuleList | nn.ModuleDict) and "expert" in name:
        alike = Counter(type(child) for child in module.children())
        return max(alike.values(), default=0)
    return len(in_parameters)


def require_whole(decisions: Mapping[str, Any]) -> None:
    """Raise `SpecError` where some experts of one parameter would be quantized, and others not."""
    parameters: dict[int, list[str]] = {}
    for name, decision in decisions.items():
        cls: type[QuantizedLayer] = decision.cls
        if not cls.called:
            for parameter in cls.masters(decision.module).values():
                parameters.setdefault(id(parameter), []).append(name)
    for names in parameters.values():
        floats = [name for name in names if decisions[name].layer is None]
        kinds = {decisions[name].layer.activations for name in names if name not in floats}
        if len(kinds) > 1:
            raise SpecError(
                f"overrides: experts of one parameter read one tensor ({listed(names, 3)}), but would quantize it in "
                "different ways: give all of them the same activations"
            )
        if floats and len(floats) < len(names):
            raise SpecError(
                f"spec: {len(floats)} of {len(names)} experts of one parameter would stay float ({listed(floats, 3)}: "
                f"{decisions[floats[0]].reason}), but they share it: quantize all of them, or exclude all"
            )
