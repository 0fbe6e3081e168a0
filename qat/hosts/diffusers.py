"""The host diffusers: ``AutoModel.from_pretrained`` with ``QuantoConfig``, stock, no code of ours, below diffusers 1.0.

From 1.0 on diffusers has no such code, and the plug-in ``qat.integrations.diffusers`` takes its place.

One weight type a model, no activations. ``modules_to_not_convert`` matches the last part of a module's name, so two
layers of one last name are both quantized or both float. docs/diffusers.md has what was measured of this loader.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import ExportError
from qat.files.evidence import FrozenRecord
from qat.files.manifest import Manifest
from qat.formats import Format
from qat.hosts.base import FloatGrid, Host, Reloaded, python_block
from qat.hosts.sensitivity import sensitive_part
from qat.numerics import QType
from qat.spec import LayerSpec, QuantSpec
from qat.tensors import inner_tensors

__all__ = ["DIFFUSERS"]


@dataclass(frozen=True)
class _Diffusers(Host):
    def can_build(self, cls: type) -> bool:
        return self.owns(cls) and hasattr(cls, "from_config")

    def build(self, cls: Any, config: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
        """As ``from_pretrained`` does before it loads: with the serving dtype as torch's default."""
        from accelerate import init_empty_weights

        config, default = copy.deepcopy(config), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        meta = init_empty_weights(include_buffers=False) if empty else nullcontext()
        try:
            with torch.random.fork_rng(devices=[]), meta:
                return cls.from_config(config)  # type: ignore[no-any-return]
        finally:
            torch.set_default_dtype(default)

    def build_from(self, cls: Any, directory: Path, manifest: Manifest, *, empty: bool) -> nn.Module:
        return self.build(cls, cls.load_config(directory), getattr(torch, manifest.dtype), empty=empty)

    def config_fields(self, model: Any, dtype: torch.dtype) -> dict[str, Any] | None:
        """What ``save_config`` writes, without the path that the float model came from."""
        if not self.can_build(type(model)) or getattr(model, "config", None) is None:
            return None
        shown = copy.copy(model)  # to_json_string writes into the dictionary that it shows
        shown._internal_dict = copy.deepcopy(model._internal_dict)
        fields: dict[str, Any] = json.loads(shown.to_json_string())
        return {key: value for key, value in fields.items() if key not in ("_name_or_path", "quantization_config")}

    def computes_in_float32(self, model: nn.Module, name: str, dtype: torch.dtype) -> bool:
        """What a class keeps in float32, its forward computes with in float32."""
        return self.kept_in_float32(model, name, dtype)

    def sensitive_part(self, model: nn.Module, name: str) -> str | None:
        return sensitive_part(model, name)

    def spec_faults(self, spec: QuantSpec) -> list[str]:
        faults = super().spec_faults(spec)
        if spec.activation_type is not None:
            faults.append(f"activations={spec.activation_type!r}: diffusers has none: use None, or target 'quanto'")
        others = {value.weights if isinstance(value, LayerSpec) else value for value in spec.overrides.values()}
        mixed = sorted(others - {"float", spec.weights})
        if mixed:
            faults.append(
                f"overrides: diffusers loads one weight type a model ({spec.weights!r} here), got also {mixed}: "
                "use 'float' for those layers, or target 'quanto'"
            )
        return faults

    def model_faults(self, model: nn.Module) -> list[str]:
        if self.owns(model):
            return self.added_faults(model)
        return [
            f"model: target 'diffusers' loads models of diffusers, got a {type(model).__name__}: pass the pipeline's "
            "transformer itself, or use target 'quanto' or 'transformers'"
        ]

    def kept_in_float32(self, model: nn.Module, name: str, dtype: torch.dtype) -> bool:
        """As diffusers casts: any part of the path that a class keeps in float32."""
        return dtype is not torch.float32 and not _kept(model).isdisjoint(name.split("."))

    def layer_fault(self, model: nn.Module, name: str, weights: QType, dtype: torch.dtype) -> str | None:
        """As diffusers replaces and casts; float8 codes would be cast when float32 is served, too."""
        kept, leaf = _kept(model), name.rpartition(".")[2]
        if leaf in kept:
            return f"the loader never quantizes layers called {leaf!r} in a {type(model).__name__}"
        casts = dtype is not torch.float32 or weights.floating
        return "kept in float32 by the loader" if casts and not kept.isdisjoint(name.split(".")) else None

    def layer_key(self, model: nn.Module, name: str) -> str:
        return name.rpartition(".")[2]

    def unstored(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Plain attributes of a module, too."""
        return super().unstored(module) | {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}

    def writes_map(self) -> bool:
        """False: diffusers reads no such file."""
        return False

    def float_layers(self, model: nn.Module, record: FrozenRecord) -> list[str]:
        """One last part for all layers that share it."""
        linear = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
        floats = {self.layer_key(model, name) for name in linear if name not in record.layers}
        lost = [name for name in record.layers if self.layer_key(model, name) in floats]
        lost += [name for name, layer in record.layers.items() if layer.weights != record.spec.weights]
        if lost:
            raise ExportError(
                f"target='diffusers' cannot express {len(lost)} layers (first: {lost[0]!r}): diffusers has one weight "
                "type and names float layers by the last part of their name; prepare with target='diffusers'"
            )
        return sorted(floats)

    def float_grid(self, model: nn.Module, record: FrozenRecord, format: Format) -> FloatGrid:
        """In one file, which `from_single_file` and other programs read."""
        arguments = self.grid_arguments(model, record, format)
        if floats := self.float_layers(model, record):
            arguments["modules_to_not_convert"] = floats
        return FloatGrid(arguments, dtype="dtype=torch.float32, ", one_file=True)

    def load(self, cls: Any, directory: Path, manifest: Manifest, format: Format) -> Reloaded:
        """``from_pretrained``, by the plug-in where stock code is gone; the report says that it wants a dtype."""
        import diffusers
        from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        rules = format.libraries[self.name]
        if int(diffusers.__version__.partition(".")[0]) >= (rules.stock_below or 0):
            importlib.import_module(str(rules.plugin))
        arguments = {"dtype": getattr(torch, manifest.dtype), **self.stock_config(manifest, format)}
        with warnings.catch_warnings():
            # The notice, at every load, that diffusers will drop its quanto backend in its release 1.0.
            warnings.filterwarnings("ignore", message=".*[qQ]uanto.*deprecated", category=FutureWarning)
            loaded = cls.from_pretrained(str(directory), **arguments)
        # Stock diffusers leaves the wrapper of a quantized weight on the meta device, and a pipeline asks the first
        # parameter for the model's device. A wrapper made anew is where its data is.
        for module in loaded.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.is_meta and not any(part.is_meta for part in inner_tensors(weight)):
                module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
        without = "" if manifest.dtype == "float32" else "; without one diffusers loads float32, and outputs differ"
        how = f"{type(loaded).__name__}.from_pretrained with dtype=torch.{manifest.dtype}{without}"
        if AUTO_QUANTIZER_MAPPING[format.name].__module__ == rules.plugin:  # imported here, or by the caller
            how += f"; by {rules.plugin}"
        return Reloaded(loaded, how)

    def card(self, manifest: Manifest, module: str, cls: str, format: Format) -> list[str]:
        dtype = f"torch.{manifest.dtype}"
        code, rules = self.pretrained_code(manifest, module, cls, format), format.libraries[self.name]
        bound = f"Stock diffusers below {rules.stock_below}.0 "
        later = f"From {rules.stock_below}.0 on, first `import {rules.plugin}`."
        if manifest.float_grid:
            plain = "Without `quantization_config` the same file loads as a float model that computes the same."
            return [code, f"{bound}with {format.library} and accelerate. {later}", plain]
        why = (
            "Any other `dtype` keeps the codes but rounds scales"
            if manifest.dtype == "float32"
            else f"**Give `dtype={dtype}`:** it is the dtype that the model was trained to be served in, and "
            "without one diffusers loads float32, which keeps the codes but widens scales"
        )
        text = (
            f"{bound}with {format.library} and accelerate, no other package. {later} "
            f"{why}, so that outputs are no longer those of training."
        )
        use = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained(base_model, transformer=model, dtype={dtype})",
        ]
        moved = (
            'In a pipeline all parts need the same dtype; `pipeline.to("cuda")` moves them all. Until the model is '
            'moved, stock diffusers reports its device as `meta`. Where that is a problem, call `model.to("cpu")`; '
            "int4 in groups of 128 then uses another kernel, whose last bits differ."
        )
        return [code, text, moved, python_block(use)]


def _kept(model: Any) -> set[str]:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {kept} if isinstance(kept, str) else set(kept)


DIFFUSERS = _Diffusers("diffusers", weights_stem="diffusion_pytorch_model")
