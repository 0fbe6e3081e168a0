"""The target diffusers: a directory that stock ``from_pretrained`` loads, with no code of ours.

The weights have quanto's keys and diffusers' file names; ``quantization_config`` in config.json says their one type
and, by the last part of their names, which linear layers are float. Loaded with ``torch_dtype`` of the serving dtype,
the model holds the very numbers that were frozen; without one, diffusers loads float32: codes stay the same, but
scales widen, so that weights are no longer rounded to the serving dtype.

With ``float_grid`` the directory holds ordinary float32 weights, in one file, that lie on the quantization grid, which
``from_pretrained`` with a ``QuantoConfig`` quantizes back into the same codes; config.json has no
``quantization_config`` then. ``from_single_file`` reads the same file as a float model, but in diffusers 0.42 it takes
every file for packed as soon as it is given a ``QuantoConfig``, and raises on float weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat.errors import ExportError
from qat.exporting.configuration import DIFFUSERS_STEM, write_config
from qat.exporting.float_grid import check_float_grid
from qat.exporting.quanto import Content, Job, PackedState, write_weights

if TYPE_CHECKING:
    from qat.evidence import FrozenRecord

__all__ = ["modules_to_not_convert", "quantization_config", "write"]


def write(job: Job) -> Content:
    """Write a frozen diffusers model for `from_pretrained`.

    Raises:
        ExportError: when diffusers cannot tell its quantized layers from the others, or ``float_grid`` would change
            codes.
    """
    if job.float_grid:
        return _write_float_grid(job)
    state = PackedState(job.model, untie=True)
    settings = quantization_config(job.model, job.record)
    write_config(job.model, job.directory, job.record.spec.torch_dtype, settings)
    files, tensors = write_weights(state.entries, state.fetch, job.directory, job.max_shard_size, DIFFUSERS_STEM)
    return Content(files, tensors, state.tied, weights_stem=DIFFUSERS_STEM)


def quantization_config(model: nn.Module, record: FrozenRecord) -> dict[str, Any]:
    """What `config.json` tells diffusers about the weights."""
    return {
        "quant_method": "quanto",
        "weights_dtype": record.spec.weights,
        "modules_to_not_convert": modules_to_not_convert(model, record),
    }


def modules_to_not_convert(model: nn.Module, record: FrozenRecord) -> list[str]:
    """The last parts of the names of all linear layers that are float.

    Raises:
        ExportError: when a quantized layer has such a last part too, or another type than the spec's.
    """
    linear = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
    floats = {name.rpartition(".")[2] for name in linear if name not in record.layers}
    lost = [name for name in record.layers if name.rpartition(".")[2] in floats]
    lost += [name for name, layer in record.layers.items() if layer.weights != record.spec.weights]
    if lost:
        raise ExportError(
            f"target='diffusers' cannot express {len(lost)} layers (first: {lost[0]!r}): diffusers has one weight type "
            "and names float layers by the last part of their name; prepare with target='diffusers'"
        )
    return sorted(floats)


def _write_float_grid(job: Job) -> Content:
    weights = check_float_grid(job.model, job.record)
    skipped = modules_to_not_convert(job.model, job.record)
    arguments = {"weights_dtype": weights, **({"modules_to_not_convert": skipped} if skipped else {})}
    state = PackedState(job.model, float_layers=job.record.layers, untie=True)
    write_config(job.model, job.directory, torch.float32)
    # In one file, which is all that `from_single_file` and other programs read.
    files, tensors = write_weights(state.entries, state.fetch, job.directory, 1 << 62, DIFFUSERS_STEM)
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    note = (
        "on-grid float32 weights: load with from_pretrained(directory, torch_dtype=torch.float32, "
        f"quantization_config=QuantoConfig({shown}))"
    )
    return Content(files, tensors, state.tied, (note,), arguments, DIFFUSERS_STEM)
