"""Outputs of a model on example inputs, and their comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.files.examples import flatten_outputs
from qat.files.shards import ALIGNMENT
from qat.formats import FORMATS
from qat.probing import kept_modes, run, seeded
from qat.tensors import difference, map_tensors, model_device

__all__ = ["compute_outputs", "output_faults"]


def _wraps_its_own(module: nn.Module) -> bool:
    """Whether the object has a ``forward`` that is a wrapper around the one of its class, and of no format's loader."""
    forward = None if any(format.owns(module) for format in FORMATS.values()) else vars(module).get("forward")
    while forward is not None and forward is not type(module).forward:
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward is not None


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Take off the wrappers that trainers leave around ``forward``, and that no reload has.

    HF Trainer and accelerate put autocast around ``model.forward`` and leave it there. A ``forward`` that does
    something else stays: it computes what a reload does not, and verification says so.
    """
    patched = [(module, vars(module).pop("forward")) for module in model.modules() if _wraps_its_own(module)]
    try:
        yield
    finally:
        for module, forward in patched:
            module.__dict__["forward"] = forward


@contextmanager
def _without_requiring(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient: a product with a weight that does is cut and rounded in another way.

    Torch does so without gradients too, for inputs that are no view of a matrix (``should_fold``, LinearAlgebra.cpp).
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


def compute_outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Run a model on example inputs, as a reload would: in evaluation mode, without gradients and without autocast.

    The model runs where it is, and is left in the modes it had. What draws noise gets a fixed seed.

    Args:
        model: the model.
        inputs: a mapping (keyword arguments), a tuple or list (positional ones), or one tensor, on any device.

    Returns:
        The outputs' tensors, named as by `flatten_outputs`.
    """
    device = model_device(model)

    def place(tensor: Tensor) -> Tensor:
        # Views of a memory-mapped file lie anywhere, and torch's int8 kernel on a CPU ends the process when its input
        # does not start on a 16-byte boundary.
        unaligned = tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT
        return tensor.to(device, copy=bool(unaligned))

    inputs = map_tensors(place, inputs)
    plain = torch.autocast(device.type, enabled=False)
    with _bare(model), _without_requiring(model), kept_modes(model), torch.no_grad(), seeded(0), plain:
        model.eval()
        outputs = run(model, inputs)
    return flatten_outputs(outputs)


def output_faults(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 0.0
) -> tuple[list[str], float]:
    """Compare outputs: bit for bit, or within a tolerance relative to each tensor's largest value.

    Returns a sentence for each tensor that differs, and the largest relative difference of all.
    """
    if found.keys() != wanted.keys():
        return [f"outputs are {sorted(found)}, not {sorted(wanted)}"], float("inf")
    faults, worst = [], 0.0
    for key, expected in wanted.items():
        given = found[key]
        gap = difference(expected, given)
        if gap is None:
            continue
        if gap.forms:
            faults.append(f"{key}: {gap}")
            worst = float("inf")
            continue
        share = gap.largest / max(expected.double().abs().nan_to_num().max().item(), 1e-30)
        worst = max(worst, share)
        if not share <= tolerance:
            faults.append(f"{key}: {gap} ({share:.2g} of the largest)")
    return faults, worst
