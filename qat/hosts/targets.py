"""The targets: named pairs of a format and a host, and what a target's rules say of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import SpecError, TargetError, meant, shown
from qat.files.evidence import FrozenRecord
from qat.formats import COMPRESSED_TENSORS, GGUF, GGUF_FLOAT16, QUANTO, Format, LayerTypes
from qat.hosts.base import Host
from qat.hosts.compressed_transformers import COMPRESSED_TRANSFORMERS
from qat.hosts.diffusers import DIFFUSERS
from qat.hosts.gguf_diffusers import GGUF_DIFFUSERS
from qat.hosts.gguf_transformers import GGUF_TRANSFORMERS
from qat.hosts.transformers import TRANSFORMERS
from qat.numerics import QType
from qat.spec import QuantSpec

__all__ = ["HOSTS", "MODULE", "TARGETS", "Rules", "Target", "get_target", "host_of", "inner_models"]

MODULE = Host("module")
HOSTS: tuple[Host, ...] = (DIFFUSERS, TRANSFORMERS)


def host_of(model: Any) -> Host:
    """The library of a model, or of a class; `MODULE` where it is of none that is known.

    >>> host_of(nn.Linear(2, 2)).name
    'module'
    """
    return next((host for host in HOSTS if host.owns(model)), MODULE)


def inner_models(model: nn.Module) -> Iterator[tuple[str, nn.Module, Host]]:
    """The models of known libraries inside a module, itself included: full name, module, library."""
    for name, module in model.named_modules():
        host = host_of(module)
        if host is not MODULE and host.can_build(type(module)):
            yield name, module, host


@dataclass(frozen=True)
class Target:
    """Who will load an export."""

    name: str
    format: Format
    host: Host
    plain_on_cpu: bool = False
    """The loader leaves packed weights on a CPU as they are stored, instead of in a kernel's own order."""

    def faults(self, model: nn.Module, spec: QuantSpec) -> list[str]:
        """Why the target cannot load such a model, or express such a spec; each with its remedy."""
        if missing := self.format.package_faults():
            return missing
        faults = [*self.host.model_faults(model), *self.spec_faults(spec)]
        if self.format.own_modules and not faults:
            faults = self.host.stock_faults(model, self.format.needs_packed(spec))
        return faults

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """Why the target cannot express such a spec, whatever the model; each with its remedy."""
        return [*self.host.spec_faults(spec), *self.format.spec_faults(spec)]

    def check_types(self, spec: QuantSpec) -> None:
        """Raise `SpecError` where the format lacks a type of weights that the spec names."""
        known = self.format.qtypes
        for name in sorted(spec.weight_types() - known.keys()):
            others = [repr(target.name) for target in TARGETS.values() if name in target.format.qtypes]
            what = f"weights: format {self.format.name!r} has {sorted(known)}, got {name!r}"
            own = " (in your own program; or qat convert an export in int4_g32 or int8)" if "'gguf'" in others else ""
            raise SpecError(f"{what}: choose one, or use target {' or '.join(others)}{own}")

    def resolved(self, spec: QuantSpec) -> QuantSpec:
        """The spec with ``quantize_outputs`` set: outputs stay float where the loader can leave them so."""
        if spec.quantize_outputs is not None or spec.activation_type is None:
            return spec
        left = spec.model_copy(update={"quantize_outputs": False})
        return left.model_copy(update={"quantize_outputs": True}) if self.host.spec_faults(left) else left

    def build(
        self, types: LayerTypes, shape: tuple[int, int], tensors: Mapping[str, Tensor], *, like: nn.Module
    ) -> nn.Module:
        """The module of a frozen layer, made of its stored tensors, with the weight as the loader holds it."""
        return self.format.build(types, shape, tensors, like=like, plain_on_cpu=self.plain_on_cpu)

    def is_settled(self, layer: nn.Module) -> bool:
        """Whether a frozen layer has its weight as the loader holds it."""
        return self.format.is_settled(layer, plain_on_cpu=self.plain_on_cpu)

    def settle(self, model: nn.Module) -> None:
        """Bring all frozen layers back to how the loader holds them, after moves between devices."""
        holders: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            if self.format.is_frozen(module):
                holders.setdefault(id(self.format.shared(module)), []).append(module)
        for modules in holders.values():
            for module in modules:
                self.format.settle(module, plain_on_cpu=self.plain_on_cpu)
            self.format.tie(modules)

    def settings(self, model: nn.Module, record: FrozenRecord) -> dict[str, Any] | None:
        """What ``config.json`` tells the loader of packed weights; None: it says nothing of them."""
        floats = self.host.float_layers(model, record)
        if floats is None:
            return None
        fields = self.format.quantization_config(self.host.name, self.host.as_stored(model, record), floats)
        return fields | self.host.load_settings(model, record, self.format)

    def rules(self, model: nn.Module, dtype: torch.dtype) -> Rules:
        """What the target's loader, and the classes inside the model, say of its layers and tensors."""
        return Rules(self, model, dtype)


class Rules:
    """The rules of a target's host, and of every library model inside one module, for a serving dtype."""

    def __init__(self, target: Target, model: nn.Module, dtype: torch.dtype) -> None:
        self.target, self.model, self.dtype = target, model, dtype
        self.inner = list(inner_models(model))
        self.heads: set[int] = set()
        """Ids of the output heads of all models inside."""
        self.tied_keys: set[str] = set()
        """Full names of parameters that a model inside ties."""
        for module in model.modules():
            head = getattr(module, "get_output_embeddings", lambda: None)()
            if head is not None:
                self.heads.add(id(head))
        for name, module, host in self.inner:
            prefix, tied = f"{name}." if name else "", host.ties(module) or {}
            self.tied_keys |= {f"{prefix}{key}" for key in (*tied, *tied.values())}

    def layer_fault(self, name: str, weights: QType) -> str | None:
        """Why the loader cannot hold the linear layer called ``name`` with such weights, or None."""
        fault = self.target.host.layer_fault(self.model, name, weights, self.dtype)
        if fault is None and self._computes_in_float32(name):
            return "kept in float32 by the class of the model that holds it"
        return fault

    def tensor_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the loader holds the float tensor called ``name``."""
        if self.target.host.kept_in_float32(self.model, name, self.dtype) or self._computes_in_float32(name):
            return torch.float32
        return self._own_dtypes.get(name, self.dtype)

    @cached_property
    def _own_dtypes(self) -> dict[str, torch.dtype]:
        return self.target.host.own_dtypes(self.model, self.dtype)

    def sensitive_part(self, name: str) -> str | None:
        """In which part of a model inside, that quantized activations harm, the linear layer ``name`` stands."""
        parts = (host.sensitive_part(module, rest) for rest, module, host in self._around(name))
        return next((part for part in parts if part is not None), None)

    def _computes_in_float32(self, name: str) -> bool:
        return any(host.computes_in_float32(module, rest, self.dtype) for rest, module, host in self._around(name))

    def _around(self, name: str) -> Iterator[tuple[str, nn.Module, Host]]:
        """The models inside that hold ``name``, with its name in each."""
        for prefix, module, host in self.inner:
            if not prefix or name.startswith(f"{prefix}."):
                yield name[len(prefix) + 1 :] if prefix else name, module, host


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("quanto", QUANTO, MODULE),
        Target("transformers", QUANTO, TRANSFORMERS),
        Target("diffusers", QUANTO, DIFFUSERS, plain_on_cpu=True),
        Target("compressed-tensors", COMPRESSED_TENSORS, COMPRESSED_TRANSFORMERS),
        Target("gguf", GGUF, GGUF_TRANSFORMERS),
        Target("gguf-diffusers", GGUF_FLOAT16, GGUF_DIFFUSERS),
    )
}


def get_target(name: str) -> Target:
    """The target called ``name``; `TargetError` if there is none of that name.

    >>> get_target("quanto").format.name
    'quanto'
    """
    if name not in tuple(TARGETS):  # which asks no hash of what a user gives
        raise TargetError(f"target: must be one of {sorted(TARGETS)}, got {shown(name)}{meant(name, TARGETS)}")
    return TARGETS[name]
