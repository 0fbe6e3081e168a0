"""Tiny exports for the target compressed-tensors, of every type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import qat
from qat.formats import COMPRESSED_TENSORS
from tests.exports import IDS, small_llama

TARGET = "compressed-tensors"
MIXED: dict[str, Any] = {
    "weights": "int8",
    "overrides": {"*.mlp.*": "int4_g32", "*.o_proj": "int2_g64", "*.k_proj": "float8"},
}
TYPES = tuple(dict.fromkeys(qtype.name for qtype in COMPRESSED_TENSORS.qtypes.values()))
PACKED = tuple(name for name in TYPES if not name.endswith("_zp"))
ZERO_POINTS = tuple(name for name in TYPES if name.endswith("_zp"))
SPECS: dict[str, dict[str, Any]] = {
    **{name: {"weights": name} for name in TYPES},
    "int8 W8A8": {"weights": "int8", "activations": "int8"},
    "float8 W8A8": {"weights": "float8", "activations": "float8"},
    "mixed": MIXED,
}


def llama() -> Any:
    return small_llama(hidden_size=128, intermediate_size=128, num_attention_heads=2)


def exported(directory: Path, steps: int = 1, **spec: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model that was trained, frozen and exported, and what its layers' weights were in training."""
    model, wanted = llama(), qat.QuantSpec(**spec)
    qat.prepare(model, wanted, algorithm=qat.LearnedAffine(), target=TARGET)
    if wanted.activations:
        qat.calibrate(model, [{"input_ids": IDS}])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-3))
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_quantizer")}
    trained = {
        name: layer.weight_quantizer.quantize(layer.weight, wanted.torch_dtype).value for name, layer in layers.items()
    }
    qat.freeze(model, allow_unreached=not steps)
    qat.export(model, directory, example_inputs={"input_ids": IDS})
    return model, trained


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits  # type: ignore[no-any-return]
