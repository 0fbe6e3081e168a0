"""Example inputs and frozen outputs: as named tensors in a safetensors file, never as a pickle.

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
from qat.files.manifest import EVIDENCE_NAME, ExampleRecord
from qat.files.trusted import regular_file

__all__ = ["flatten_inputs", "flatten_outputs", "read_example", "unflatten_inputs"]


def flatten_inputs(inputs: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take example inputs apart into a JSON structure and named tensors.

    Raises:
        ExportError: when something in them is neither a tensor, a container nor a plain value.
    """
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping | tuple | list):
        raise ExportError(f"example_inputs: must be a mapping, a tuple or a tensor, got {type(inputs).__name__}")
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
        f"example_inputs: {name.removeprefix('input.')!r} is a {type(value).__name__}, which cannot be stored: give "
        "tensors, numbers, texts, and lists, tuples or mappings of them"
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
        if kind == "value":
            return content
        container = {"list": list, "tuple": tuple}[kind]
        return container(unflatten_inputs(item, tensors) for item in content)
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise LoadError(f"the stored example is malformed ({error}); export the model again") from error


def flatten_outputs(outputs: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Name every tensor of outputs by where it stands, below ``name``; anything else in them is passed over."""
    if isinstance(outputs, torch.Tensor):
        # A model whose last layer quantizes its output returns quanto's tensor class: its values are what counts.
        plain = outputs.detach() if type(outputs) in (torch.Tensor, nn.Parameter) else outputs.detach().dequantize()
        return {name or "output": plain.to("cpu").contiguous()}
    items: Any = ()
    if isinstance(outputs, Mapping):
        items = outputs.items()
    elif isinstance(outputs, Sequence) and not isinstance(outputs, str):
        items = enumerate(outputs)
    elif dataclasses.is_dataclass(outputs):
        items = ((field.name, getattr(outputs, field.name)) for field in dataclasses.fields(outputs))
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found |= flatten_outputs(item, f"{name}.{key}" if name else str(key))
    return found


def read_example(directory: Path, record: ExampleRecord) -> tuple[Any, dict[str, torch.Tensor]]:
    """The stored inputs and the frozen outputs of a directory.

    Raises:
        LoadError: when they are incomplete or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(regular_file(directory, EVIDENCE_NAME))
        outputs = {name: tensors[f"output.{name}"] for name in record.outputs}
    except (OSError, KeyError, SafetensorError) as error:
        raise LoadError(f"the stored example cannot be read ({error}); copy or export the directory again") from error
    return unflatten_inputs(record.inputs, tensors), outputs
