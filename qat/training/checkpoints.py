"""Clear errors for checkpoints of Lightning that do not fit the module they are loaded into.

`LightningModule.load_from_checkpoint` builds a float module, and no callback takes part there. So once this module is
imported, every LightningModule gets a hook that puts the reason before the keys that torch did not expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qat.errors import StateError, TrainingError
from qat.files.evidence import frozen_record, is_frozen
from qat.optimizers import learned_ranges
from qat.preparation import prepared_as

__all__ = ["KEY", "preparation", "refuse_float_optimizer", "refuse_masters", "refuse_other_preparation"]

KEY = "quantization"
"""Where a checkpoint of Lightning tells how its model was prepared, and what is known of its runs."""

_REASON = (
    "the checkpoint holds other quantizers than the module: call qat.prepare(self.model, spec, algorithm=...) in its "
    "__init__, as the run that saved it, or pass ckpt_path to a Trainer with that run's QuantizationAwareTraining"
)


def preparation(model: nn.Module) -> dict[str, Any]:
    """The arguments that a model was prepared with, as plain data."""
    prepared = prepared_as(model)
    parts = {name: getattr(prepared, name).model_dump(mode="json") for name in ("spec", "algorithm", "observer")}
    return {**parts, "target": prepared.target}


def refuse_other_preparation(model: nn.Module, theirs: Mapping[str, Any]) -> None:
    """Raise `StateError` with all that differs, where a checkpoint is of a model that was prepared in another way."""
    flat = [{**one, **one["spec"], "spec": None} for one in (theirs, preparation(model))]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    if names:
        told = "; ".join(f"{name}: {flat[0].get(name)!r} there, {flat[1].get(name)!r} here" for name in names)
        raise StateError(f"ckpt_path: the checkpoint is of a model that was prepared in another way: {told}: use one")


def refuse_float_optimizer(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise `TrainingError` when a fit would go on from an optimizer that never held the learned ranges."""
    learned = learned_ranges(module).values()
    state = checkpoint.get("state_dict", {})
    if learned and state and checkpoint.get("optimizer_states") and not any(name in state for name in learned):
        raise TrainingError(
            f"ckpt_path: the checkpoint has no learned ranges, so its optimizer has no place for the {len(learned)} of "
            "this model: load its weights alone, by module.load_state_dict, and fit without ckpt_path"
        )


def refuse_masters(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Quanto would take master weights into a frozen layer without a word, and quantize them in its own way."""
    if is_frozen(model) and any(f"{prefix}{name}.weight" in state_dict for name in frozen_record(model).layers):
        raise StateError("ckpt_path: the model is frozen, but the checkpoint holds masters: load it into a float model")


def _explain(module: nn.Module, incompatible: Any) -> None:
    keys = incompatible.unexpected_keys  # with strict=False these are no error, and the reason is none either
    if _REASON not in keys and any("_quantizer." in key for key in keys):
        keys.insert(0, _REASON)


def _hook(module: nn.Module, name: str, submodule: nn.Module) -> None:
    if isinstance(module, LightningModule) and _explain not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_explain)  # type: ignore[no-untyped-call]


register_module_module_registration_hook(_hook)
