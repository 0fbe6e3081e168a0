"""Will a stock load turn on-grid float weights back into the codes they came from?

A stock load with a ``QuantoConfig``, in transformers and in diffusers, quantizes float weights on the way in, with
scales that it derives afresh: absmax a row for 8-bit types, min-max a group for the others. Codes come back only where
each row or group uses its whole range. So the stock path is simulated, layer by layer, with quanto's own optimizers in
float32, and with transformers' own rule for which modules it replaces; whatever would change is an error that names
the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.errors import ExportError

if TYPE_CHECKING:
    from qat.evidence import FrozenRecord

__all__ = ["changed_codes", "check_float_grid", "skipped_by_transformers", "stock_codes"]


def check_float_grid(model: nn.Module, record: FrozenRecord) -> str:
    """Check that a stock float32 load gives every code back, and return the one weight type of the model.

    Raises:
        ExportError: when the spec is more than a stock load can express, or codes would change; it names the layers.
    """
    if record.spec.dtype != "float32":
        raise ExportError(
            f"float_grid=True needs dtype='float32' in the spec, for a stock load re-derives scales in the dtype it "
            f"loads in and {record.spec.dtype} moves codes; freeze with dtype='float32' or export packed weights"
        )
    kinds = sorted({layer.weights for layer in record.layers.values()})
    if len(kinds) != 1:
        raise ExportError(f"float_grid=True: a stock load has one weight type for all layers; this model has {kinds}")
    active = [name for name, layer in record.layers.items() if layer.activations is not None]
    if active:
        raise ExportError(
            f"float_grid=True: a stock load cannot quantize activations, but {_named(active)} do; "
            f"export packed weights (float_grid=False) or train with activations=None"
        )
    changed = {}
    for name in record.layers:
        count = changed_codes(model.get_submodule(name))
        if count:
            changed[name] = count
    if changed:
        worst = _named([f"{name} ({count} codes)" for name, count in changed.items()])
        raise ExportError(
            f"float_grid=True: a stock load would change codes in {len(changed)} of {len(record.layers)} layers: "
            f"{worst}; their rows or groups do not use the whole range of the scale. Export packed weights "
            f"(float_grid=False), or train with an algorithm that takes its range from the weights"
        )
    return kinds[0]


def changed_codes(layer: Any) -> int:
    """How many codes of a frozen layer a stock float32 load would change."""
    from qat.evidence import unpack_weight

    codes, _, _ = unpack_weight(layer.weight)
    again = stock_codes(layer)
    return int((codes.to(torch.float32) != again.to(torch.float32)).sum())


def stock_codes(layer: Any) -> torch.Tensor:
    """The codes that quanto derives from a frozen layer's dequantized weight in float32, by its default optimizers."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, quantize_weight

    from qat.evidence import unpack_weight

    weight, qtype, size = layer.weight.dequantize().float(), layer.weight_qtype, layer.weight_group_size
    with torch.no_grad():
        if qtype.bits == 8:
            scale, shift = AbsmaxOptimizer()(weight, qtype=qtype, axis=0), None
        else:
            scale, shift = MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=size)
        again = quantize_weight(weight, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=size, optimized=False)
        codes: torch.Tensor = unpack_weight(again)[0]
    return codes


def skipped_by_transformers(model: nn.Module, quantized: set[str]) -> dict[str, Any]:
    """Find the ``modules_to_not_convert`` with which stock transformers replaces exactly the quantized layers.

    Raises:
        ExportError: when there is none.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stay_float = [name for name in linear if name not in quantized]
    replaced: set[str] = set()
    for listed in (None, stay_float):
        skip = HfQuantizer.get_modules_to_not_convert(
            model,  # type: ignore[arg-type]
            None if listed is None else list(listed),
            getattr(model, "_keep_in_fp32_modules", None),
        )
        replaced = {name for name in linear if should_convert_module(name, skip)}
        if replaced == quantized:
            return {} if listed is None else {"modules_to_not_convert": listed}
    wrong = sorted(replaced ^ quantized)
    raise ExportError(
        f"float_grid=True: no modules_to_not_convert makes a stock load replace exactly the quantized layers; it "
        f"matches names by their ending, and would differ in {_named(wrong)}; export packed weights (float_grid=False)"
    )


def _named(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
