"""Will a stock load turn on-grid float weights back into the codes they came from?

A stock load with a ``QuantoConfig``, in transformers and in diffusers, quantizes float weights on the way in, with
scales that it derives afresh: absmax a row for 8-bit types, min-max a group for the others. Codes come back only where
each row or group uses its whole range. So the stock path is simulated, layer by layer, with quanto's own optimizers in
float32 (`Format.stock_codes`); whatever would change is an error that names the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat.errors import ExportError, listed
from qat.files.evidence import FrozenRecord
from qat.formats import Format

__all__ = ["check_float_grid"]


def check_float_grid(model: nn.Module, record: FrozenRecord, format: Format, library: str) -> dict[str, Any]:
    """Check that a stock float32 load gives every code back; return the argument that names the one weight type.

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
            f"float_grid=True: a stock load cannot quantize activations, but {listed(active, 5)} do; "
            f"export packed weights (float_grid=False) or train with activations=None"
        )
    changed = {}
    for name in record.layers:
        layer = format.read(model.get_submodule(name))
        count = int((layer.weight.codes.to(torch.float32) != format.stock_codes(layer).to(torch.float32)).sum())
        if count:
            changed[name] = count
    if changed:
        worst = listed([f"{name} ({count} codes)" for name, count in changed.items()], 5)
        raise ExportError(
            f"float_grid=True: a stock load would change codes in {len(changed)} of {len(record.layers)} layers: "
            f"{worst}; their rows or groups do not use the whole range of the scale. Export packed weights "
            f"(float_grid=False), or train with an algorithm that takes its range from the weights"
        )
    return {format.libraries[library].weights_argument: kinds[0]}
