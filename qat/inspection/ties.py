"""Which tied layers stay tied, and which `qat.prepare` unties."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from typing import Any

from qat.errors import SpecError

__all__ = ["break_ties", "keep_ties"]


def keep_ties(facts: Any, decisions: Mapping[str, Any]) -> None:
    """Let layers share one quantized weight that are tied, all chosen, and tied again by the loader."""
    ties, groups = facts.target.host.ties(facts.model) or {}, defaultdict[str, list[str]](list)
    for name, decision in decisions.items():
        if decision.layer is not None and decision.weight is getattr(decision.module, "weight", None):
            groups[ties.get(f"{name}.weight", f"{name}.weight")].append(name)
    for first, *others in groups.values():
        weight = decisions[first].weight
        tied = [name for name in others if decisions[name].weight is weight or weight.is_meta]
        if not tied or facts.holders[id(weight)] > 1 + len(tied):  # something float uses it too
            continue
        types = {name: layer.weights for name in (first, *tied) if (layer := decisions[name].layer) is not None}
        if len(set(types.values())) > 1:
            told = " and ".join(f"{name} {kind}" for name, kind in types.items())
            raise SpecError(
                f"overrides: {told} are one tied weight, which has one type: give both the same, or exclude one, which "
                "breaks the tie"
            )
        for name in tied:
            decisions[name].shared_with = first
            decisions[name].reason += f"{'; ' if decisions[name].reason else ''}tied to {first}, one table for both"
    for name in decisions.keys() - _together(decisions) if ties else ():
        d = decisions[name]
        apart = d.layer is not None and bool(facts.tied(name, d.module, d.cls))
        if apart and not facts.target.host.can_untie(facts.model):
            d.layer, d.explicit = None, False
            d.reason = "its model's class ties it on every load: include all layers that share the weight, or none"


def _together(decisions: Mapping[str, Any]) -> set[str]:
    """The layers that stay tied."""
    pairs = [(name, d.shared_with) for name, d in decisions.items() if d.shared_with is not None]
    return {name for pair in pairs for name in pair}


def break_ties(facts: Any, decisions: Mapping[str, Any], unnamed: Container[str]) -> tuple[list[str], int]:
    """Notes on the tied layers that `qat.prepare` will untie, in its order, and how many elements it will copy.

    Layers that are ``unnamed`` have no row.
    """
    chosen = Counter(id(p) for d in decisions.values() if d.layer is not None for p in d.cls.masters(d.module).values())
    left_float = [d for name, d in decisions.items() if d.layer is None and name not in unnamed]
    floats = {id(p) for d in left_float for p in d.cls.masters(d.module).values()}
    holders, left = facts.holders, facts.holders.copy()
    notes, copied = [], 0
    together = _together(decisions)
    for name, decision in decisions.items():
        if name in together:
            continue
        tied = facts.tied(name, decision.module, decision.cls)
        if decision.layer is None or not tied:
            continue
        # One holder, where the two are separate already: on the meta device.
        kept = [p for p in tied if holders[id(p)] == 1 or chosen[id(p)] < holders[id(p)]]
        uncounted = [p for p in kept if left[id(p)] == holders[id(p)] and id(p) not in floats]
        decision.float_copy = sum(p.numel() for p in uncounted)
        copied += sum(p.numel() for p in tied if left[id(p)] > 1)
        left.subtract(id(p) for p in tied)
        notes.append(
            f"{name}: its weight is tied; quantizing it breaks the tie (config.tie_word_embeddings becomes False)"
            + (", and its float copy stays in the file beside the codes" if kept else "")
        )
    return notes, copied
