"""What is checked and completed before a checkpoint is loaded into a prepared model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import StateError, listed
from qat.layers import QuantizedLayer, quantized_layers
from qat.numerics import qtype_of
from qat.quantizers import Algorithm
from qat.quantizers.base import BASE_KEY, FINAL_KEY, TYPE_KEY
from qat.runs import note_runs

__all__ = ["PREPARED", "complete_float_checkpoint"]

logger = logging.getLogger("qat")
PREPARED = "_qat_prepared"
"""The attribute that a prepared model has."""
_TEXTS = tuple(f".{key}" for key in (TYPE_KEY, FINAL_KEY, BASE_KEY))  # in a quantizer's state, where they may be absent


@torch.no_grad()
def complete_float_checkpoint(
    algorithm: Algorithm, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Before a checkpoint is loaded into a prepared model or layer: give a float one the state of new quantizers.

    They are made for the weights of the checkpoint, on their device. Layers whose weight the checkpoint leaves out
    (``strict=False``) keep what they have.
    """
    if hasattr(module, PREPARED):
        note_runs(module, frozenset())
    fresh: dict[str, Tensor] = {}
    lacking, stateful = [], 0
    given, kept = 0, []
    _require_final_types(module, prefix, state)
    for name, layer in quantized_layers(module):
        name = f"{prefix}{name}." if name else prefix
        weight = layer.weight_in(state, name)
        if weight is not None:
            layer.reached, layer.trained = False, 0  # what ran before says nothing of these weights
        if weight is None:
            _require_base(layer, name, state)
        state_of = layer.state_dict(prefix=name)
        own = [key for key in state_of if "_quantizer." in key[len(name) :] and not key.endswith(_TEXTS)]
        if not own:
            continue
        absent = [key for key in own if key not in state]
        if weight is None:
            _require_compensated(layer, name, state)
            if hasattr(module, PREPARED) and not layer.called and not absent:
                raise StateError(
                    f"state_dict: has the quantizer of {name.rstrip('.')!r}, but not the parameter of its experts "
                    "(names of original files are not converted): load what model.state_dict() gave, or what "
                    "save_pretrained(..., save_original_format=False) wrote"
                )
            given += not absent
            kept += [name.rstrip(".")] if len(absent) == len(own) else []
            continue
        stateful += 1
        if absent and len(absent) < len(own):
            raise StateError(
                f"state_dict: layer {name.rstrip('.')!r} has only a part of its quantizers' state ({absent[0]!r} is "
                "missing): load all that model.state_dict() gave, into a model prepared by the same spec and algorithm"
            )
        if len(absent) == len(own):
            lacking.append(name)
            fresh |= layer.fresh_state(name, weight, algorithm)
    if given and kept:
        logger.warning(
            "state_dict holds the quantizers of %d layers, as an adapter's file does; those of %d others stay as they "
            "are, so load the whole model.state_dict() to go on with training: %s",
            given,
            len(kept),
            listed(kept, 4),
        )
    if lacking and len(lacking) < stateful:
        raise StateError(
            f"state_dict: quantizer keys may be absent only for all layers together, but {len(lacking)} of {stateful} "
            f"lack theirs (first: {lacking[0].rstrip('.')!r}): load a whole float or prepared checkpoint"
        )
    if lacking:
        state.update(fresh)
        logger.warning(
            "state_dict holds no quantizer state (a float checkpoint): %d quantizers start afresh", len(lacking)
        )


def _text(state: dict[str, Any], key: str) -> str:
    return bytes(state[key].tolist()).decode() if key in state else ""


def _require_final_types(module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
    """Raise `StateError` with all layers that a state has in another type."""
    others = []
    for name, layer in quantized_layers(module):
        name = f"{prefix}{name}." if name else prefix
        theirs, ours = _text(state, f"{name}weight_quantizer.{FINAL_KEY}"), layer.weight_quantizer.final_qtype
        if theirs and theirs != ours.key:
            others.append(f"{name.rstrip('.')}: {qtype_of(theirs).name} there, {ours.name} here")
    if others:
        raise StateError(
            f"state_dict: {len(others)} layers were trained as other types than this model's ({listed(others, 20)}): "
            "prepare the model by the spec of the run that saved it"
        )


def _require_base(layer: QuantizedLayer, prefix: str, state: dict[str, Any]) -> None:
    """Raise `StateError` where the state of an adapter is one over another base than this."""
    own, name = layer.weight_quantizer, prefix.rstrip(".")
    final, base = (_text(state, f"{prefix}weight_quantizer.{key}") for key in (FINAL_KEY, BASE_KEY))
    if (final or base) and base != own.base_qtype:
        base, packed = (text and qtype_of(text).name for text in (base, own.base_qtype))
        theirs, ours = (f"packed as {kind}" if kind else "in float" for kind in (base, packed))
        remedy = f"call qat.pack_base(model, {base!r})" if base else "leave qat.pack_base out"
        raise StateError(
            f"state_dict: layer {name!r} was trained over a base {theirs}, but here it is {ours}, which the adapter "
            f"alone cannot make good: prepare the model anew, and {remedy} before the load"
        )


def _require_compensated(layer: QuantizedLayer, prefix: str, state: dict[str, Any]) -> None:
    """Raise `StateError` where a state without the layer's weight is of one that a start has changed, unlike this."""
    theirs = state.get(f"{prefix}weight_quantizer.changed_master")
    if theirs is not None and bool(theirs) and not layer.weight_quantizer.compensated:
        raise StateError(
            f"state_dict: layer {prefix.rstrip('.')!r} was trained over a weight that its start (gptq or best) had "
            "changed, and the state lacks this weight: load the whole model.state_dict(), or train with start='output'"
        )
