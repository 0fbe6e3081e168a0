"""diffusers as the reader of GGUF files: ``from_single_file`` with ``GGUFQuantizationConfig``, on the CPU bit for bit.

A file has the names that the class was published with, where they are known here (Flux, as Black Forest Labs calls its
layers), so that other programs read it too. diffusers converts them when it loads: it cuts fused tensors into rows of
three or four layers. All other classes have diffusers' own names, which `from_single_file` takes as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.files.evidence import FrozenRecord
from qat.files.manifest import Manifest
from qat.formats import GGUF_FLOAT16, Format
from qat.hosts.base import FloatGrid, Host, Reloaded, python_block
from qat.hosts.diffusers import _Diffusers, _kept
from qat.hosts.gguf import GgufContainer, Place, package_faults
from qat.hosts.transformers import TRANSFORMERS
from qat.numerics import QType
from qat.spec import QuantSpec
from qat.tensors import own_tensors

__all__ = ["GGUF_DIFFUSERS"]

FILE_NAME = "diffusion_pytorch_model.gguf"
_ORIGINAL = "qat.original_names"
"""Key of the metadata: whether names are those that the class was published with."""
_FLUX_WIDTH = 3072  # which diffusers' conversion of Flux takes for granted

# Of Flux, parts of names: diffusers' and the published one, and which rows of the published tensor they are.
_FLUX: tuple[tuple[str, str, int], ...] = (
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", 0),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", 0),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer", 0),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", 0),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", 0),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", 0),
    ("context_embedder", "txt_in", 0),
    ("x_embedder", "img_in", 0),
    ("norm_out.linear", "final_layer.adaLN_modulation.1", 0),
    ("proj_out", "final_layer.linear", 0),
    ("transformer_blocks.*.norm1.linear", "double_blocks.*.img_mod.lin", 0),
    ("transformer_blocks.*.norm1_context.linear", "double_blocks.*.txt_mod.lin", 0),
    ("transformer_blocks.*.attn.to_q", "double_blocks.*.img_attn.qkv", 0),
    ("transformer_blocks.*.attn.to_k", "double_blocks.*.img_attn.qkv", 1),
    ("transformer_blocks.*.attn.to_v", "double_blocks.*.img_attn.qkv", 2),
    ("transformer_blocks.*.attn.add_q_proj", "double_blocks.*.txt_attn.qkv", 0),
    ("transformer_blocks.*.attn.add_k_proj", "double_blocks.*.txt_attn.qkv", 1),
    ("transformer_blocks.*.attn.add_v_proj", "double_blocks.*.txt_attn.qkv", 2),
    ("transformer_blocks.*.attn.norm_q", "double_blocks.*.img_attn.norm.query_norm", 0),
    ("transformer_blocks.*.attn.norm_k", "double_blocks.*.img_attn.norm.key_norm", 0),
    ("transformer_blocks.*.attn.norm_added_q", "double_blocks.*.txt_attn.norm.query_norm", 0),
    ("transformer_blocks.*.attn.norm_added_k", "double_blocks.*.txt_attn.norm.key_norm", 0),
    ("transformer_blocks.*.ff.net.0.proj", "double_blocks.*.img_mlp.0", 0),
    ("transformer_blocks.*.ff.net.2", "double_blocks.*.img_mlp.2", 0),
    ("transformer_blocks.*.ff_context.net.0.proj", "double_blocks.*.txt_mlp.0", 0),
    ("transformer_blocks.*.ff_context.net.2", "double_blocks.*.txt_mlp.2", 0),
    ("transformer_blocks.*.attn.to_out.0", "double_blocks.*.img_attn.proj", 0),
    ("transformer_blocks.*.attn.to_add_out", "double_blocks.*.txt_attn.proj", 0),
    ("single_transformer_blocks.*.norm.linear", "single_blocks.*.modulation.lin", 0),
    ("single_transformer_blocks.*.attn.to_q", "single_blocks.*.linear1", 0),
    ("single_transformer_blocks.*.attn.to_k", "single_blocks.*.linear1", 1),
    ("single_transformer_blocks.*.attn.to_v", "single_blocks.*.linear1", 2),
    ("single_transformer_blocks.*.proj_mlp", "single_blocks.*.linear1", 3),
    ("single_transformer_blocks.*.attn.norm_q", "single_blocks.*.norm.query_norm", 0),
    ("single_transformer_blocks.*.attn.norm_k", "single_blocks.*.norm.key_norm", 0),
    ("single_transformer_blocks.*.proj_out", "single_blocks.*.linear2", 0),
)
# Patterns that match all layers of one published tensor, and no other.
_FUSED = (
    ("single_transformer_blocks", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "*[qkvp]"),
    ("transformer_blocks", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_[qkv]"),
    ("transformer_blocks", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.add_[qkv]_proj"),
)
_ARCHITECTURES = {"FluxTransformer2DModel": "flux", "QwenImageTransformer2DModel": "qwen_image"}
"""What other programs call a class whose names are the published ones."""


def _flux_place(key: str) -> Place:
    layer, _, kind = key.rpartition(".")
    numbers = re.findall(r"blocks\.(\d+)\.", key)
    for name, published, part in _FLUX:
        if numbers and "*" in name:
            name, published = name.replace("*", numbers[0]), published.replace("*", numbers[0])
        if name == layer:
            kind = "scale" if published.endswith(("query_norm", "key_norm")) else kind
            order = _halves_swapped if layer == "norm_out.linear" else None
            return Place(f"{published}.{kind}", part, order)
    raise KeyError(f"tensor {key!r}")


def _halves_swapped(rows: int) -> Tensor:
    """Scale and shift, which diffusers has in the other order."""
    return torch.arange(rows).roll(rows // 2)


def _has_published_names(model: Any) -> bool:
    """Whether a file gets them: of Flux, where diffusers' conversion takes its sizes."""
    kind = type(model).__name__
    if kind != "FluxTransformer2DModel":
        return kind in _ARCHITECTURES
    config = model.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return bool(width == _FLUX_WIDTH and config["num_layers"] and config["num_single_layers"])


class _Container(GgufContainer):
    def architecture(self, model: Any) -> str:
        return _ARCHITECTURES[type(model).__name__] if _has_published_names(model) else "diffusers"

    def describe(self, writer: Any, model: Any, directory: Path) -> None:
        writer.add_type("model")
        writer.add_name(type(model).__name__)
        writer.add_bool(_ORIGINAL, _has_published_names(model))

    def places(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]) -> dict[str, Place]:
        if metadata[_ORIGINAL] and metadata["general.architecture"] == "flux":
            return {key: _flux_place(key) for key in shapes}
        return {key: Place(key) for key in shapes}


@dataclass(frozen=True)
class _GgufDiffusers(_Diffusers):
    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """None: each tensor of a file has its own type."""
        return []

    def model_faults(self, model: nn.Module) -> list[str]:
        if missing := package_faults():
            return missing
        if not self.owns(model) or type(model).__name__ not in _loadable():
            other = "diffusers" if self.owns(model) else "gguf" if TRANSFORMERS.owns(model) else "quanto"
            return [
                f"model: target 'gguf-diffusers' needs a class that diffusers loads from a single file, got a "
                f"{type(model).__name__}: use target {other!r} (diffusers.loaders.single_file_model lists them)"
            ]
        parts = [(name, module) for name, module in model.named_modules() if not GGUF_FLOAT16.is_frozen(module)]
        tensors = ((f"{name}.{key}" if name else key, t) for name, module in parts for key, t in own_tensors(module))
        others = [name for name, tensor in tensors if not tensor.is_floating_point() or not tensor.ndim]
        faults = [
            f"model: its tensor {name!r} has no place in a GGUF file: use target 'diffusers'" for name in others[:1]
        ]
        return faults + self.added_faults(model)

    def layer_fault(self, model: nn.Module, name: str, weights: QType, dtype: torch.dtype) -> str | None:
        """What a class keeps in float32 is dequantized, whatever is served."""
        return None if _kept(model).isdisjoint(name.split(".")) else "kept in float32 by the loader"

    def layer_key(self, model: nn.Module, name: str) -> str:
        if not (type(model).__name__ == "FluxTransformer2DModel" and _has_published_names(model)):
            return name
        blocks, _, rest = name.partition(".")
        number, _, layer = rest.partition(".")
        patterns = (
            f"{part}.{number}.{pattern}" for part, layers, pattern in _FUSED if part == blocks and layer in layers
        )
        return next(patterns, name)

    def float_layers(self, model: nn.Module, record: FrozenRecord) -> None:  # type: ignore[override]
        """None: the file itself says which tensors are blocks."""
        return

    def float_grid(self, model: nn.Module, record: FrozenRecord, format: Format) -> FloatGrid:
        return Host.float_grid(self, model, record, format)

    def constructed(self, build: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """In float32, since a load from a single file leaves torch's default dtype as it is."""
        return build(torch.float32)

    def load(self, cls: Any, directory: Path, manifest: Manifest, format: Format) -> Reloaded:
        """``from_single_file`` with the configuration beside the file."""
        from diffusers import GGUFQuantizationConfig

        dtype = getattr(torch, manifest.dtype)
        config = GGUFQuantizationConfig(compute_dtype=dtype)  # type: ignore[no-untyped-call]
        options = {"config": str(directory), "quantization_config": config, "dtype": dtype}
        loaded = cls.from_single_file(str(directory / FILE_NAME), **options)
        return Reloaded(loaded, f"{type(loaded).__name__}.from_single_file with compute_dtype=torch.{manifest.dtype}")

    def card(self, manifest: Manifest, module: str, cls: str, format: Format) -> list[str]:
        dtype = f"torch.{manifest.dtype}"
        code = [
            "import torch",
            f"from {module} import {cls}, GGUFQuantizationConfig",
            "",
            f"quantization = GGUFQuantizationConfig(compute_dtype={dtype})",
            f"options = {{'config': directory, 'quantization_config': quantization, 'dtype': {dtype}}}",
            f"model = {cls}.from_single_file(f'{{directory}}/{FILE_NAME}', **options)",
        ]
        text = (
            f"Any other dtype rounds values otherwise, so that outputs are no longer those of training. `{FILE_NAME}`"
        )
        text += " stands alone where a program knows the model's sizes."
        return [python_block(code), text]


@functools.cache
def _loadable() -> Iterable[str]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return frozenset(SINGLE_FILE_LOADABLE_CLASSES)


GGUF_DIFFUSERS = _GgufDiffusers(
    "diffusers",
    weights_stem="diffusion_pytorch_model",
    container=_Container(stored_as_float32=frozenset({torch.bfloat16})),
    families="holds these layers in one tensor",
)
