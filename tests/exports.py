"""Exports to test with: tiny frozen models, what their files hold read independently, and ways to tamper with them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qat.calibration import calibrate
from qat.files.manifest import MANIFEST_NAME, file_record
from qat.files.shards import DTYPE_NAMES, Shard, TensorEntry, write_shard
from qat.freezing import freeze
from qat.preparation import prepare
from qat.quantizers import StraightThrough
from qat.spec import QuantSpec
from qat.tensors import digest

TYPES = ("int8", "float8", "int4", "int2")
DTYPES = ("float32", "bfloat16")
IDS = torch.arange(24).reshape(2, 12)


def small_llama(**changes: Any) -> LlamaForCausalLM:
    """One layer; rows of 256, so that groups of 128 exist, and rows of 48."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 96,
        "hidden_size": 256,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def frozen(model: nn.Module, target: str = "quanto", **spec: Any) -> Any:
    """Prepare, calibrate where there are activations, freeze."""
    prepare(model, QuantSpec(**spec), target=target, algorithm=StraightThrough())
    if spec.get("activations"):
        calibrate(model, [{"input_ids": IDS}])
    freeze(model, allow_unreached=True)
    return model


def unpack_weight(weight: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes ``(out, in)``, scale and shift of any of quanto's weight tensors, read without the code under test."""
    if hasattr(weight, "weight_qbits_tensor") and type(weight).__name__ != "WeightQBitsTensor":
        weight = weight.weight_qbits_tensor()
    elif hasattr(weight, "weight_qbytes_tensor") and type(weight).__name__ != "WeightQBytesTensor":
        weight = weight.weight_qbytes_tensor()
    data = weight._data.unpack() if hasattr(weight._data, "unpack") else weight._data
    return data.reshape(weight.shape), weight._scale, getattr(weight, "_shift", None)


def frozen_llama(target: str = "quanto", **spec: Any) -> Any:
    return frozen(small_llama(), target, **spec)


def frozen_layers(*sizes: tuple[int, int], bias: bool = True, **spec: Any) -> Any:
    """Linear layers of the given (out_features, in_features), not a transformers model."""
    torch.manual_seed(0)
    return frozen(nn.Sequential(*(nn.Linear(wide, high, bias=bias) for high, wide in sizes)), **spec)


def code_offsets(directory: Path) -> dict[str, int]:
    """File offsets of the code tensors, read without the code under test."""
    found = {}
    for path in directory.glob("*model*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        fields = json.loads(data[8 : 8 + length])
        for name, field in fields.items():
            if name.endswith("_data") and name != "__metadata__":
                found[f"{path.name}:{name}"] = 8 + length + field["data_offsets"][0]
    return found


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a weight file, in the order they lie in."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.offset_keys()}
    tensors = change(tensors)
    entries = tuple(TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    write_shard(path, Shard(entries), tensors.__getitem__)


def unsealed(directory: Path) -> dict[str, Any]:
    """The fields of a manifest, without the digest that tells of changes, so that only deeper checks can notice."""
    fields: dict[str, Any] = json.loads((directory / MANIFEST_NAME).read_text())
    fields.pop("digest", None)
    return fields


def forge_files(directory: Path) -> None:
    """Recompute the manifest's sizes and hashes of files."""
    manifest = unsealed(directory)
    for name in manifest["files"]:
        manifest["files"][name] = file_record(directory / name).model_dump()
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def forge_hashes(directory: Path, *, tensors: bool = True) -> None:
    """Recompute the manifest's hashes of files (and of tensors), so that only deeper checks can notice."""
    forge_files(directory)
    path, manifest = directory / MANIFEST_NAME, unsealed(directory)
    if tensors:
        manifest["tensors"] = {}
        for file in sorted(directory.glob("*model*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name)
                    manifest["tensors"][name] = {
                        "file": file.name,
                        "dtype": DTYPE_NAMES[tensor.dtype],
                        "shape": list(tensor.shape),
                        "sha256": digest(tensor),
                    }
    path.write_text(json.dumps(manifest))


def altered(name: str, step: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Change one number of one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        flat = tensors[name].reshape(-1)
        flat[3 if flat.numel() > 3 else 0] += step
        return tensors

    return change


def small_flux(**changes: Any) -> Any:
    """One double and one single block; rows of 256, so that groups of 128 exist, and rows of 160 and 16."""
    import diffusers

    torch.manual_seed(0)
    kind: Any = diffusers.FluxTransformer2DModel
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": 160,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (16, 24, 24),
    }
    return kind(**{**config, **changes})


def flux_inputs(dtype: str, width: int = 160) -> dict[str, torch.Tensor]:
    """Two pictures of 4 x 4 tokens, with seven tokens of text."""
    generator, kind = torch.Generator().manual_seed(1), getattr(torch, dtype)
    pictures, text, pooled = (torch.randn(2, *s, generator=generator) for s in ((16, 16), (7, width), (32,)))
    return {
        "hidden_states": pictures.to(kind),
        "encoder_hidden_states": text.to(kind),
        "pooled_projections": pooled.to(kind),
        "timestep": torch.tensor([0.25, 0.75], dtype=kind),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def frozen_flux(target: str = "diffusers", **spec: Any) -> Any:
    return frozen(small_flux(), target, **spec)
