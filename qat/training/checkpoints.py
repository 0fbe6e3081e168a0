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

__all__ = ["refuse_float_optimizer", "refuse_masters"]

_REASON = (
    "the checkpoint holds other quantizers than the module: call qat.prepare(self.model, spec, algorithm=...) in its "
    "__init__, as the run that saved it, or pass ckpt_path to a Trainer with that run's QuantizationAwareTraining"
)


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
