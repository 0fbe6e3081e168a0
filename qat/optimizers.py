"""What optimizers do to prepared models: learned ranges are never decayed, and what training left alone is said.

Many trainers build their own optimizer. Some decay every parameter that is no bias and no norm, so also learned
ranges; some built it before `qat.prepare` made the ranges. All of them end in a step of a torch optimizer, so one
global hook before that step sees them all, and looks at an optimizer when its groups are new or have changed.

Before the first step on a prepared model the hook also takes fingerprints of the masters and the learned ranges.
Freezing compares them. A fingerprint is a sum over bits, exact on every device; it keeps no copy of the weights.
From that step on no weight waits for a start from data, which would overwrite what training made of it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from qat.adapters import adapters
from qat.distributed import refuse_cast_ranges
from qat.errors import StateError, TrainingError, listed
from qat.layers import quantized_layers
from qat.probing import compiled_parts
from qat.tensors import is_sharded

__all__ = [
    "begin_training",
    "forget_training",
    "learned_ranges",
    "look_again",
    "no_training",
    "refuse_adapters",
    "refuse_decay",
    "trained",
    "unchanged",
    "watch",
]

logger = logging.getLogger("qat")

REMEDY = (
    "build the optimizer from qat.parameter_groups(module, lr, scale_lr, weight_decay) after qat.prepare (with "
    "Lightning in configure_optimizers, with transformers' Trainer as optimizer_cls_and_kwargs=grouped_optimizer("
    "arguments) of qat.integrations.trainer)"
)
_ELEMENTS = 1 << 20  # that a fingerprint widens at a time
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_models: WeakSet[nn.Module] = WeakSet()
_first: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()  # fingerprints before the first step
_checked: WeakKeyDictionary[Optimizer, tuple[Any, ...]] = WeakKeyDictionary()  # the groups that were looked at


def watch(model: nn.Module) -> None:
    """Look at every optimizer that will step on ``model``, which is prepared."""
    _register()
    if model not in _models:
        _models.add(model)
        _checked.clear()


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_before_step)


def forget_training(model: nn.Module) -> None:
    """What trains has changed: take fingerprints anew before the next step."""
    _first.pop(model, None)
    look_again()


def look_again() -> None:
    """Look at every optimizer before its next step, also at those that were looked at."""
    _checked.clear()


def begin_training(model: nn.Module) -> list[str]:
    """Let layers that quantize their weight await no start any more; the names of those that did."""
    layers = {name: layer for name, layer in quantized_layers(model) if layer.mode.weights}
    waiting = [name for name, layer in layers.items() if layer.awaited_start() is not None]
    for name in waiting:
        layers[name].weight_quantizer.stop_awaiting()
    return waiting


@contextmanager
def no_training(model: nn.Module) -> Iterator[None]:
    """Steps within the block prepare ``model`` for training: fingerprints are taken before the first step after it."""
    fresh = model not in _first
    if fresh:
        _first[model] = {}
    try:
        yield
    finally:
        if fresh:
            del _first[model]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    groups = tuple((len(group["params"]), bool(group.get("weight_decay"))) for group in optimizer.param_groups)
    if _checked.get(optimizer) == groups:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_models):
        if any(id(p) in held for p in model.parameters()):
            refuse_adapters(model)
            refuse_decay(model, optimizer.param_groups)
            _warn_of_rates(model, optimizer.param_groups)
            if waited := begin_training(model):
                logger.warning(
                    "%d layers train from the start 'clip', for theirs needs data: call qat.calibrate(model, batches) "
                    "before the first step: %s",
                    len(waited),
                    listed(waited, 4),
                )
            if model not in _first:
                refuse_cast_ranges(model)
                _first[model] = {name: _fingerprint(p) for name, p in _trained(model).items()}
    _checked[optimizer] = groups


def learned_ranges(model: nn.Module) -> dict[int, str]:
    """The parameters that quantizers below ``model`` learn: ``id`` to full name."""
    own = {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()}
    return {id(p): name for name, p in model.named_parameters() if id(p) in own and p.requires_grad}


def refuse_adapters(model: nn.Module) -> None:
    """Raise `StateError` where an adapter was put over a prepared layer: it would stay float beside its weight."""
    layers = [name for name, _ in quantized_layers(model)]
    for above, _ in adapters(model):
        if under := [name for name in layers if name.startswith(f"{above}.")]:
            raise StateError(
                f"model: the adapter {above!r} was put over a prepared layer ({under[0]!r}), and stays float "
                "beside its weight: wrap the float model (get_peft_model), and call qat.prepare on that"
            )


def refuse_decay(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise `TrainingError` when a group of an optimizer decays learned ranges of ``model``."""
    learned = learned_ranges(model)
    for group in groups:
        decayed = [learned[id(p)] for p in group["params"] if id(p) in learned] if group.get("weight_decay") else []
        if decayed:
            raise TrainingError(
                f"optimizer: {len(decayed)} learned ranges sit in a group with weight_decay={group['weight_decay']}, "
                f"which would pull every range away from what is learned (first: {decayed[0]!r}): {REMEDY}"
            )


def _warn_of_rates(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn where learned ranges share a group, and so a learning rate, with weights."""
    learned = learned_ranges(model)
    mixed = [[learned.get(id(p)) for p in group["params"]] for group in groups]
    if names := [name for held in mixed if None in held for name in held if name is not None]:
        logger.warning("%d learned ranges train at the rate of weights (first: %r): %s", len(names), names[0], REMEDY)


def trained(model: nn.Module) -> bool:
    """Whether an optimizer has stepped on ``model``."""
    return bool(_first.get(model))


def unchanged(model: nn.Module, leave_out: Collection[str] = ()) -> list[str]:
    """What training left alone although it changed something of ``model``: sentences for weights and for ranges.

    Layers in ``leave_out`` are said elsewhere.
    """
    first = _first.get(model, {})
    faults: dict[tuple[str, bool], list[str]] = {}
    trained, compiled = _trained(model).items(), compiled_parts(model)
    gradients = any(layer.trained for _, layer in quantized_layers(model))
    same = {id(p) for name, p in trained if name in first and torch.equal(first[name], _fingerprint(p))}
    for name, layer in quantized_layers(model):
        used = (layer.weight_quantizer, *(q for q in layer.activation_quantizers() if q.used))
        parts = {"weights": layer.masters(layer).values(), "learned ranges": (p for q in used for p in q.parameters())}
        for what, parameters in parts.items():
            own = {id(p) for p in parameters if p.requires_grad}
            if own and own <= same and name not in leave_out:
                dry = gradients and not layer.trained and not f"{name}.".startswith(compiled)
                faults.setdefault((what, dry), []).append(name)
    reasons = {
        False: f"no optimizer held them, no gradient reached them, or steps were too small for their dtype: {REMEDY}",
        True: "they never ran with gradients, as experts without a token or parts under torch.no_grad(): train on data "
        "that reaches them, or leave them out of the spec",
    }
    return [
        f"training never changed the {what} of {len(names)} layers: {reasons[dry]}: {listed(names, 4)}"
        for (what, dry), names in faults.items()
    ]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Masters and learned ranges that are to be trained, by full name."""
    masters = {id(p) for _, layer in quantized_layers(model) for p in layer.masters(layer).values()}
    own = masters | learned_ranges(model).keys()
    found = {n: p for n, p in model.named_parameters() if id(p) in own and p.requires_grad and not p.is_meta}
    return {n: p for n, p in found.items() if not is_sharded(p) or p.to_local().numel()}  # type: ignore[attr-defined]


@torch.no_grad()
def _fingerprint(parameter: Tensor) -> Tensor:
    """An integer that all bits of ``parameter`` (of a sharded one: of the local part) decide."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
    bits = local.view(_BITS[local.element_size()]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(_ELEMENTS):
        wide = part.to(torch.int64)
        total += (wide * (wide + 1)).sum()
    return total.cpu()
