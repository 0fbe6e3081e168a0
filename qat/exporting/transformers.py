"""The target transformers: quanto's files with a ``quantization_config`` that our loader plug-in reads.

Stock transformers cannot read packed weights: it would leave them random and print a table. So ``weights`` in the
``quantization_config`` is deliberately no type name: a stock ``QuantoConfig`` raises on it and shows the text, which
says what to import. What the plug-in needs is in the group ``qat``.

With ``float_grid`` the directory holds ordinary float32 weights that lie on the quantization grid, which a stock
``QuantoConfig`` load quantizes back into the same codes; no ``quantization_config`` is written then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.errors import ExportError
from qat.exporting.configuration import write_config
from qat.exporting.float_grid import check_float_grid, skipped_by_transformers
from qat.exporting.quanto import Content, Job, PackedState, write_qmap, write_weights

if TYPE_CHECKING:
    from qat.evidence import FrozenRecord

__all__ = ["quantization_config", "write"]

PLUGIN = "qat.integrations.transformers"


def write(job: Job) -> Content:
    """Write a frozen transformers model for `from_pretrained`.

    Raises:
        ExportError: when the model is not a transformers one, or ``float_grid`` would change codes.
    """
    from transformers import PreTrainedModel

    if not isinstance(job.model, PreTrainedModel):
        raise ExportError(
            f"target='transformers' needs a transformers model; {type(job.model).__name__} is none: use target='quanto'"
        )
    if job.float_grid:
        return _write_float_grid(job)
    state = PackedState(job.model)
    settings = quantization_config(job.model, job.record)
    write_config(job.model, job.directory, job.record.spec.torch_dtype, settings)
    if job.record.spec.quantize_outputs:  # a stock quanto load would quantize outputs whatever the map says
        write_qmap(job.record, job.directory)
    files, tensors = write_weights(state.entries, state.fetch, job.directory, job.max_shard_size)
    return Content(files, tensors, state.tied)


def quantization_config(model: nn.Module, record: FrozenRecord) -> dict[str, Any]:
    """What `config.json` tells a loader about the weights."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {
        "quant_method": "quanto",
        "weights": f"{record.spec.weights}: packed by qat, load with `import {PLUGIN}`",
        "activations": record.spec.activation_type,
        "modules_to_not_convert": [name for name in linear if name not in record.layers],
        "qat": {
            "format": 1,
            "dtype": record.spec.dtype,
            "quantize_outputs": record.spec.quantize_outputs,
            "modules": {
                name: {"weights": layer.weights, "activations": layer.activations, "group_size": layer.group_size}
                for name, layer in record.layers.items()
            },
        },
    }


def _write_float_grid(job: Job) -> Content:
    weights = check_float_grid(job.model, job.record)
    arguments = {"weights": weights, **skipped_by_transformers(job.model, set(job.record.layers))}
    state = PackedState(job.model, float_layers=job.record.layers)
    write_config(job.model, job.directory, torch.float32)
    files, tensors = write_weights(state.entries, state.fetch, job.directory, job.max_shard_size)
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    note = f"on-grid float32 weights: load with from_pretrained(directory, quantization_config=QuantoConfig({shown}))"
    return Content(files, tensors, state.tied, (note,), arguments)
