"""Checkpoints of Lightning that do not fit the module they are loaded into: told by name, with the remedy.

A checkpoint of a prepared model holds the state of its quantizers. `LightningModule.load_from_checkpoint` builds a
float module, which has no place for it, and torch then lists the keys that it did not expect. No callback takes part
there. So once this module is imported, every LightningModule gets a hook that puts the reason in front of that list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qat.errors import TrainingError
from qat.layers import quantized_layers
from qat.optimizers import learned_ranges

__all__ = ["refuse_float_optimizer"]

_QUANTIZERS = frozenset({"weight_quantizer", "input_quantizer", "output_quantizer"})
_FLOAT = (
    "the checkpoint holds quantizers but the module is float: call qat.prepare(self.model, spec, algorithm) in its "
    "__init__, or pass ckpt_path to a Trainer with the QuantizationAwareTraining callback"
)
_OTHER = (
    "the checkpoint holds other quantizers than the module: use the spec and the algorithm of the run that saved it"
)
_hooked: WeakSet[LightningModule] = WeakSet()


def refuse_float_optimizer(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise `TrainingError` when a fit would go on from an optimizer that never held the learned ranges."""
    learned = learned_ranges(module).values()
    state = checkpoint.get("state_dict", {})
    if learned and state and checkpoint.get("optimizer_states") and not any(name in state for name in learned):
        raise TrainingError(
            f"ckpt_path: the checkpoint has no learned ranges, and the optimizer state in it has no place for the "
            f"{len(learned)} of this model (a float run, or another algorithm): load its weights alone, with "
            f"module.load_state_dict(torch.load(path)['state_dict']), and fit without ckpt_path"
        )


def _explain(module: nn.Module, incompatible: Any) -> None:
    """Put the reason before the unexpected keys. With ``strict=False`` they are no error, and it is none either."""
    unexpected = incompatible.unexpected_keys
    told = not {_FLOAT, _OTHER}.isdisjoint(unexpected)  # by a LightningModule within this one
    if not told and any(not _QUANTIZERS.isdisjoint(key.split(".")) for key in unexpected):
        unexpected.insert(0, _OTHER if any(quantized_layers(module)) else _FLOAT)


def _hook(module: nn.Module, name: str, submodule: nn.Module) -> None:
    if isinstance(module, LightningModule) and module not in _hooked:
        _hooked.add(module)
        module.register_load_state_dict_post_hook(_explain)  # type: ignore[no-untyped-call]


register_module_module_registration_hook(_hook)
