"""Adapters of peft around and inside a model, told without importing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

from torch import nn

from qat.errors import StateError

__all__ = ["active_adapters", "adapters", "merge_adapters", "refuse_tied", "without_peft"]


def _of_peft(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def without_peft(model: Any) -> Any:
    """The model inside a ``PeftModel``, which holds the adapters in its layers; anything else as it is.

    Raises:
        StateError: the ``PeftModel`` learns a prompt, which is no part of the model inside.
    """
    if not isinstance(model, nn.Module) or not _of_peft(model) or not hasattr(type(model), "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise StateError(
            "model: its PeftModel learns a prompt, which no export of the model holds: use an adapter of its weights, "
            "such as LoRA, or pass model.get_base_model()"
        )
    inner: Any = model
    return without_peft(inner.get_base_model())  # which may be another one


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that peft has put in the place of others, prepared ones too: full name and module, outermost only."""
    above = "\0"
    for name, module in model.named_modules():
        wraps = "base_layer" in module._modules or hasattr(type(module), "unload_and_optionally_merge_module")
        if wraps and _of_peft(module) and not name.startswith(above):
            above = f"{name}."
            yield name, module


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are active in some layer."""
    return tuple(sorted({name for _, module in adapters(model) for name in getattr(module, "active_adapters", ())}))


def refuse_tied(model: nn.Module, leave: Container[str], apart: Container[int] = ()) -> None:
    """Raise `StateError` where merging an adapter would change another layer, with the same weight.

    Adapters called as in ``leave`` are not merged. The modules with the ids ``apart`` will have weights of their own.
    """
    modules = (module for module in model.modules() if id(module) not in apart)
    holders = Counter(id(p) for module in modules for p in module._parameters.values())
    found: list[tuple[str, Any]] = [(n, m) for n, m in adapters(model) if n not in leave and hasattr(m, "merge")]
    for name, module in found:
        tied = any(holders[id(p)] > 1 for p in module.get_base_layer().parameters())
        if tied and module.active_adapters and not module.merged:
            raise StateError(
                f"model: the layer under the adapter {name!r} shares its weight with another one, which merging would "
                "change too: quantize it (include it by name), or give it a weight of its own"
            )


def merge_adapters(model: nn.Module, leave: Container[str]) -> None:
    """Merge adapters into their layers, and put these back into their places, as peft's ``merge_and_unload`` does.

    Those called as in ``leave`` stay.

    Raises:
        StateError: a layer's weight is tied to another one, or peft cannot merge. No layer is replaced then, and the
            model computes what it did.
    """
    refuse_tied(model, leave)
    found: list[tuple[str, Any]] = [(name, module) for name, module in adapters(model) if name not in leave]
    merging = [(name, module) for name, module in found if hasattr(module, "merge")]
    for name, module in merging:
        try:
            if not module.disable_adapters:
                module.merge(safe_merge=True)
        except Exception as error:  # whatever peft raises
            raise StateError(
                f"model: peft cannot merge the adapter {name!r} ({type(error).__name__}: {error}): delete or replace it"
            ) from error
    for name, module in found:
        unload = getattr(module, "unload_and_optionally_merge_module", None)
        inner = module.get_base_layer() if unload is None else unload(merge=True, safe_merge=True, adapter_names=None)
        model.set_submodule(name, inner)
    vars(model).pop("peft_config", None)
    if "_hf_peft_config_loaded" in vars(model):  # of transformers
        vars(model)["_hf_peft_config_loaded"] = False
