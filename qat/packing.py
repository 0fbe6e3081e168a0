"""`pack_base`: the base weights under LoRA become packed codes, so that models train whose float weights do not fit.

As in QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), with the types and the arithmetic of serving:
an int4 base takes half a byte a weight. What is fake-quantized is the value of the codes with the adapter, so the
merged export is still what was trained. What it trades away: the part of the base that its codes lose, which no
adapter of low rank brings back. And each weight is unpacked twice a step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qat.adapters import without_peft
from qat.distributed import refuse_sharded
from qat.errors import StateError, listed
from qat.hosts import get_target
from qat.layers import quantized_layers
from qat.layers.packed import PackedLinear
from qat.optimizers import trained
from qat.preparation import prepared_as
from qat.quantizers import LearnedAffine

__all__ = ["PackReport", "pack_base"]

logger = logging.getLogger("qat")


@dataclass(frozen=True)
class PackReport:
    """What was packed; prints as a sentence."""

    layers: tuple[str, ...]
    nbytes_before: int
    """Bytes of the bases' float weights; below, of their codes, scales and shifts."""
    nbytes: int

    def __str__(self) -> str:
        return (
            f"packed the bases of {len(self.layers)} layers: {self.nbytes_before / 2**20:.1f} MiB of float weights "
            f"became {self.nbytes / 2**20:.1f} MiB"
        )


@torch.no_grad()
def pack_base(model: nn.Module, weights: str = "int4") -> PackReport:
    """Hold the base weights under LoRA adapters as packed codes, one layer after another, in place.

    Call it after `qat.prepare` and before `qat.calibrate`; on the CPU, if the float model does not fit the device.
    Layers without an adapter keep their float weight. Checkpoints of the model hold the codes. They load into a model
    that went through the same calls.

    Args:
        model: a prepared model with LoRA adapters (peft), whose bases need no gradient.
        weights: the type of the codes, by the name that a spec uses; it may be another one than the layer's own.

    Raises:
        StateError: the model was not prepared, or was trained already; it has no layer under LoRA, or has one whose
            base trains or is on the meta device. Nothing is changed then.
        SpecError: the format has no such type.

    >>> from peft import LoraConfig, get_peft_model
    >>> from qat import QuantSpec, prepare
    >>> model = get_peft_model(nn.Sequential(nn.Linear(1024, 1024)), LoraConfig(target_modules=["0"]))
    >>> _ = prepare(model, QuantSpec(weights="int4"))
    >>> print(pack_base(model))
    packed the bases of 1 layers: 4.0 MiB of float weights became 0.5 MiB
    """
    model = without_peft(model)
    prepared = prepared_as(model)
    refuse_sharded(model, "qat.pack_base")
    layers: dict[str, Any] = dict(quantized_layers(model))
    held = {name: layer._modules.get("base_layer") for name, layer in layers.items()}
    bases: dict[str, Any] = {name: base for name, base in held.items() if isinstance(base, nn.Linear)}
    if not bases:
        raise StateError("model: has no float base under LoRA: wrap it with peft, prepare it, and pack it once")
    faults = {
        "train": [name for name, base in bases.items() if base.weight.requires_grad],
        "have no numbers (meta device)": [name for name, base in bases.items() if base.weight.is_meta],
    }
    for fault, names in faults.items():
        if names:
            raise StateError(
                f"model: the bases of {len(names)} layers {fault}, and cannot be packed: {listed(names, 4)}"
            )
    if trained(model):
        raise StateError("model: was trained over its float base, which packing changes: call qat.pack_base before")
    types = get_target(prepared.target).format.types(weights, None, prepared.spec.torch_dtype)
    before = after = 0
    for name, base in bases.items():
        quantizer = LearnedAffine().make(base.weight, types.weights, types.dtype)
        packed = PackedLinear(quantizer.final_codes(base.weight), base.bias, base.weight.dtype)
        before += base.weight.nbytes
        after += sum(buffer.nbytes for buffer in packed.buffers())
        layers[name].base_layer = packed.train(base.training)
        layers[name].weight_quantizer.base_qtype = packed.form.qtype.key
    if floats := [name for name in layers if name not in bases]:
        logger.warning(
            "%d quantized layers without an adapter keep their float weight: %s", len(floats), listed(floats, 4)
        )
    return PackReport(tuple(bases), before, after)
