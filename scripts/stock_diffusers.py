"""The other side of `scripts.diffusers_matrix`: a process that loads exports with stock diffusers and nothing of ours.

A request is a line (``{"name", "directory", "weights", "dtype"}``), and each is answered with a portrait of the loaded
model: a digest of every tensor and of every output for the example inputs of `tests.diffusion_architectures`. Portraits
of equal models are equal, bit for bit. A second load, by the class's own loader, with a ``QuantoConfig`` and in another
dtype, must give the same codes. Nothing here imports `qat`, and every answer checks that nothing else did; with
``--plug-in`` it loads by `qat.integrations.diffusers` instead::

    python -m scripts.stock_diffusers [--plug-in] < requests.jsonl
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from scripts.json_workers import serve
from tests.diffusion_architectures import ARCHITECTURES

Portrait = dict[str, str]
PLUG_IN = "--plug-in" in sys.argv
"""Whether `qat.integrations.diffusers` loads."""


def digest(tensor: torch.Tensor) -> str:
    """Dtype, shape and a hash of the bytes."""
    if tensor.device.type == "meta":
        return f"{tensor.dtype} {tuple(tensor.shape)} on the meta device"
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]}"


def state_portrait(model: nn.Module) -> Portrait:
    """Every parameter and buffer, those that no file holds included; quantized weights as class, parts and values."""
    found: Portrait = {}
    for name, holder in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        tensor: Any = holder.data
        if hasattr(tensor, "quant_type"):  # GGUF's blocks
            tensor = tensor.as_subclass(torch.Tensor)
        if type(tensor) is torch.Tensor:
            found[name] = digest(tensor)
            continue
        found[f"{name}, class"] = f"{type(tensor).__name__} {tensor.qtype.name} {tuple(tensor.shape)}"
        found[f"{name}, codes"] = digest(_codes(tensor))
        for part in ("scale", "shift", "scale_shift"):  # a kernel of bfloat16 has both in one
            if hasattr(tensor, f"_{part}"):
                found[f"{name}, {part}"] = digest(getattr(tensor, f"_{part}"))
        found[f"{name}, values"] = digest(tensor.dequantize())
    return found


def _codes(tensor: Any) -> torch.Tensor:
    """As stored: packed where they are narrower than a byte."""
    codes: torch.Tensor = tensor._data if type(tensor._data) is torch.Tensor else tensor._data._data
    return codes


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A model's floating outputs by name, with the same seed every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(_named(model(**inputs), "output"))


def _named(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _named(item, f"{name}.{i}")


def portrait_of_outputs(outputs: Mapping[str, torch.Tensor]) -> Portrait:
    return {name: digest(tensor) for name, tensor in outputs.items()}


def cast_faults(model: nn.Module, other: nn.Module) -> list[str]:
    """What is more than a cast of scales and shifts between quantized weights loaded in two dtypes."""
    faults = []
    others = dict(other.named_parameters(remove_duplicate=False))
    for name, holder in model.named_parameters(remove_duplicate=False):
        one: Any = holder.data
        if type(one) is torch.Tensor:
            continue
        two: Any = others[name].data
        if type(two) is not type(one) or two.qtype != one.qtype:
            faults.append(f"{name}: {type(one).__name__} and {type(two).__name__}")
            continue
        parts = [part for part in ("_scale", "_shift") if hasattr(one, part)]
        faults += [
            f"{name}, {part}: not the cast one"
            for part in parts
            if digest(getattr(two, part)) != digest(getattr(one, part).to(getattr(two, part).dtype))
        ]
        if digest(_codes(two)) != digest(_codes(one)):
            faults.append(f"{name}: other codes")
    return faults


def read(request: Mapping[str, str], way: str, dtype: torch.dtype) -> Any:
    """One load. ``packed directory`` is as the model card says; files, and float weights, are quanto's or GGUF's."""
    import diffusers

    library: Any = diffusers
    directory, kind = request["directory"], getattr(library, request["name"])
    if way == "packed directory":
        return library.AutoModel.from_pretrained(directory, dtype=dtype, trust_remote_code=False)
    gguf = way == "gguf file"
    config = (
        library.GGUFQuantizationConfig(compute_dtype=dtype)
        if gguf
        else library.QuantoConfig(weights_dtype=request["weights"])
    )
    if way.startswith("float"):
        directory += "-float"
    if way.endswith("directory"):
        return kind.from_pretrained(directory, dtype=dtype, quantization_config=config, trust_remote_code=False)
    if way == "packed file":
        file = f"{directory}-packed.safetensors"
    else:
        file = f"{directory}/diffusion_pytorch_model.{'gguf' if gguf else 'safetensors'}"
    return kind.from_single_file(file, config=directory, dtype=dtype, quantization_config=config)


def load(request: Mapping[str, str]) -> dict[str, Any]:
    """Load one export, and describe it; a directory once more in another dtype."""
    dtype, other = torch.float32, torch.bfloat16
    if request["dtype"] == "bfloat16":
        dtype, other = other, dtype
    way = request.get("way", "packed directory")
    model = read(request, way, dtype)
    state = state_portrait(model)  # before a forward, which may rewrite buffers
    outputs = portrait_of_outputs(outputs_of(model, ARCHITECTURES[request["name"]].example(dtype)))
    cast = []
    if way == "packed directory":
        own: Any = type(model)
        config = sys.modules["diffusers"].QuantoConfig(weights_dtype=request["weights"])
        cast = cast_faults(model, own.from_pretrained(request["directory"], dtype=other, quantization_config=config))
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "qat")
    if ours and not PLUG_IN:
        raise RuntimeError(f"this process imported {ours[:3]}, so it proves nothing")
    return {"kind": type(model).__name__, "state": state, "outputs": outputs, "cast": cast}


if __name__ == "__main__":
    if PLUG_IN:
        import qat.integrations.diffusers  # noqa: F401 (registers the plug-in)
    serve(load)
