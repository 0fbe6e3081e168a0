"""Example inputs and frozen outputs: as named tensors in a safetensors file, never as a pickle; and their comparison.

Inputs are rebuilt exactly (nested containers and plain values become a small JSON structure that refers to tensors by
name); of outputs only the tensors count, named by where they stand (``logits``, ``hidden_states.0``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import ExportError, LoadError
from qat.evidence import digest, model_device
from qat.exporting.layout import ALIGNMENT
from qat.exporting.manifest import EVIDENCE_NAME, ExampleRecord
from qat.probing import kept_modes, run

__all__ = [
    "compute_outputs",
    "difference",
    "flatten_inputs",
    "flatten_outputs",
    "output_faults",
    "read_example",
    "unflatten_inputs",
]

_SINGLE = "output"


def flatten_inputs(inputs: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take example inputs apart into a JSON structure and named tensors.

    Args:
        inputs: a mapping (keyword arguments), a tuple or list (positional ones), or one tensor.

    Raises:
        ExportError: when something in them is neither a tensor, a container nor a plain value.
    """
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping | tuple | list):
        raise ExportError(
            f"example_inputs must be a mapping of keyword arguments, a tuple of positional ones or a tensor; "
            f"got {type(inputs).__name__}"
        )
    tensors: dict[str, torch.Tensor] = {}
    return _structure(inputs, "input", tensors), tensors


def _structure(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu").contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _structure(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_structure(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ExportError(
        f"example_inputs: {name.removeprefix('input.')!r} is a {type(value).__name__}, which cannot be stored; "
        f"give tensors, numbers, texts, and lists, tuples or mappings of them"
    )


def unflatten_inputs(structure: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put example inputs together again.

    Raises:
        LoadError: when the structure names a tensor that is missing, or is malformed.
    """
    try:
        ((kind, content),) = structure.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "mapping":
            return {key: unflatten_inputs(item, tensors) for key, item in content.items()}
        if kind in ("list", "tuple"):
            items = [unflatten_inputs(item, tensors) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "value":
            return content
    except (KeyError, ValueError, AttributeError) as error:
        raise LoadError(f"the stored example is incomplete ({error}); export the model again") from error
    raise LoadError(f"the stored example holds an unknown kind {kind!r}; export the model again")


def flatten_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """Name every tensor of a model's outputs by where it stands; anything else in them is passed over."""
    found: dict[str, torch.Tensor] = {}
    _collect(outputs, "", found)
    return found


def _collect(value: Any, name: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        # A model whose last layer quantizes its output returns quanto's tensor class: its values are what counts.
        plain = value.detach() if type(value) in (torch.Tensor, nn.Parameter) else value.detach().dequantize()
        found[name or _SINGLE] = plain.to("cpu").contiguous()
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for key, item in items:
        _collect(item, f"{name}.{key}" if name else str(key), found)


def compute_outputs(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Run a model on example inputs: in eval mode, without gradients, with a fixed seed for what draws noise.

    Args:
        model: is run on the device where it is, and left in the modes it had.
        inputs: a mapping (keyword arguments), a tuple or list (positional ones), or one tensor, on any device.

    Returns:
        The outputs' tensors, named as by `flatten_outputs`.
    """
    inputs = _to_device(inputs, model_device(model))
    with kept_modes(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()
        torch.manual_seed(0)
        outputs = run(model, inputs)
    return flatten_outputs(outputs)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        # Views of a memory-mapped file lie anywhere, and torch's int8 kernel on a CPU ends the process when its input
        # does not start on a 16-byte boundary.
        crooked = value.device.type == "cpu" and value.data_ptr() % ALIGNMENT
        return value.to(device, copy=bool(crooked))
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_to_device(item, device) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def read_example(directory: Path, record: ExampleRecord) -> tuple[Any, dict[str, torch.Tensor]]:
    """The stored inputs and the frozen outputs of a directory.

    Raises:
        LoadError: when they are incomplete or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / EVIDENCE_NAME)
        outputs = {name: tensors[f"output.{name}"] for name in record.outputs}
    except (OSError, KeyError, SafetensorError) as error:
        raise LoadError(f"the stored example cannot be read ({error}); copy or export the directory again") from error
    return unflatten_inputs(record.inputs, tensors), outputs


def output_faults(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float = 0.0
) -> tuple[list[str], float]:
    """Compare outputs: bit for bit, or within a tolerance relative to each tensor's largest value.

    Returns:
        One sentence for each tensor that differs, and the largest relative difference of all.
    """
    if found.keys() != wanted.keys():
        return [f"outputs are {sorted(found)}, not {sorted(wanted)}"], float("inf")
    faults, worst = [], 0.0
    for key, expected in wanted.items():
        given = found[key]
        gap = difference(expected, given)
        if gap is None:
            continue
        share = gap.largest / max(expected.double().abs().nan_to_num().max().item(), 1e-30) if gap.comparable else 1e30
        worst = max(worst, share)
        if not share <= tolerance:
            faults.append(f"{key}: {gap} ({share:.2g} of the largest)" if gap.comparable else f"{key}: {gap}")
    return faults, worst


@dataclasses.dataclass(frozen=True)
class Difference:
    """By how much two tensors differ; prints as a few words."""

    count: int
    total: int
    largest: float
    kinds: str = ""
    """Both dtypes and shapes, where these differ and numbers cannot be compared."""

    @property
    def comparable(self) -> bool:
        """Whether the tensors have one dtype and shape."""
        return not self.kinds

    def __str__(self) -> str:
        if self.kinds:
            return self.kinds
        return f"{self.count} of {self.total} numbers differ, by up to {self.largest:.3g}"


def difference(expected: torch.Tensor, given: torch.Tensor) -> Difference | None:
    """How ``given`` differs from ``expected``, or none when they are equal bit for bit."""
    if (given.shape, given.dtype) != (expected.shape, expected.dtype):
        kinds = f"{given.dtype} {tuple(given.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        return Difference(expected.numel(), expected.numel(), float("inf"), kinds)
    if digest(given) == digest(expected):
        return None
    a, b = expected.detach().cpu().double(), given.detach().cpu().double()
    gap = (a - b).abs().nan_to_num(nan=float("inf"))  # a NaN on one side is no small difference
    return Difference(int((a != b).sum()), a.numel(), gap.max().item())
