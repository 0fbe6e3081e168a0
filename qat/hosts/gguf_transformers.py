"""transformers as the reader of GGUF files: ``from_pretrained(directory, gguf_file="model.gguf")``.

Names come from the tables of the package gguf, metadata as llama.cpp's own conversion writes it. ``GgufConfig(
dequantize=True)`` has transformers make a float model. Without it, release 5.23 keeps the blocks of some other
architectures, if the package ``kernels`` is there, and their products round otherwise. `qat.load` fills modules of ours
that hold blocks, and verification compares what both compute.

An architecture is here when its conversion is known to keep codes: tensors are renamed, and of Llama the rows of two
projections are reordered, since llama.cpp rotates other pairs of numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import TargetError
from qat.files.evidence import FrozenRecord
from qat.files.manifest import Manifest
from qat.formats import Format
from qat.hosts.base import FloatGrid, Host, Reloaded, python_block
from qat.hosts.diffusers import DIFFUSERS
from qat.hosts.gguf import GgufContainer, Place, package_faults, require_package
from qat.hosts.gguf_tokenizer import general_name, tokenizer_notes, write_tokenizer
from qat.hosts.transformers import _Transformers

__all__ = ["GGUF_TRANSFORMERS"]

FILE_NAME = "model.gguf"


class _Architecture(NamedTuple):
    """A class of transformers as llama.cpp knows it."""

    name: str
    requires: Mapping[str, Any]
    """Fields of the configuration, each with the only value that llama.cpp's graph computes."""
    describe: Callable[[Any, Any], None]
    """Writes what is special of the class, of its configuration."""
    permuted: bool = False
    """Whether the rows of the query and key projections are interleaved."""
    transposed: tuple[str, ...] = ()
    """Last names of layers whose float weights are ``(in, out)``."""
    any_heads: bool = False
    """Whether heads may have another size than their share of the hidden size."""


def _decoder(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _rms_decoder(writer: Any, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _with_heads(writer: Any, config: Any) -> None:
    _rms_decoder(writer, config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _llama(writer: Any, config: Any) -> None:
    _with_heads(writer, config)
    writer.add_rope_dimension_count(config.head_dim)


def _rotary_size(config: Any) -> int:
    part = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return int(part * (config.hidden_size // config.num_attention_heads))


def _phi3(writer: Any, config: Any) -> None:
    _rms_decoder(writer, config)
    writer.add_rope_dimension_count(_rotary_size(config))
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def _starcoder2(writer: Any, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_eps(config.norm_epsilon)


def _stablelm(writer: Any, config: Any) -> None:
    _decoder(writer, config)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(_rotary_size(config))
    writer.add_parallel_residual(config.use_parallel_residual)


def _gpt2(writer: Any, config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


_SILU = {"hidden_act": "silu"}
_QWEN = {**_SILU, "use_sliding_window": False}
_GPT2 = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_STARCODER2 = {"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": None}
_STABLELM = {**_SILU, "qk_layernorm": False, "tie_word_embeddings": False}
ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture("llama", _SILU, _llama, permuted=True, any_heads=True),
    "Qwen2ForCausalLM": _Architecture("qwen2", _QWEN, _rms_decoder),
    "Qwen3ForCausalLM": _Architecture("qwen3", {**_QWEN, "attention_bias": False}, _with_heads, any_heads=True),
    "Phi3ForCausalLM": _Architecture("phi3", {**_SILU, "sliding_window": None}, _phi3),
    "Starcoder2ForCausalLM": _Architecture("starcoder2", _STARCODER2, _starcoder2),
    "StableLmForCausalLM": _Architecture("stablelm", _STABLELM, _stablelm),
    "GPT2LMHeadModel": _Architecture("gpt2", _GPT2, _gpt2, transposed=("c_attn", "c_proj", "c_fc")),
}
_BY_NAME = {known.name: known for known in ARCHITECTURES.values()}


class _Container(GgufContainer):
    def architecture(self, model: Any) -> str:
        return ARCHITECTURES[type(model).__name__].name

    def describe(self, writer: Any, model: Any, directory: Path) -> None:
        config = model.config
        writer.add_type("model")
        writer.add_name(general_name(type(model).__name__, directory))
        ARCHITECTURES[type(model).__name__].describe(writer, config)
        writer.add_vocab_size(config.vocab_size)
        write_tokenizer(writer, directory, config.vocab_size)

    def notes(self, directory: Path) -> list[str]:
        return tokenizer_notes(directory)

    def places(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]) -> dict[str, Place]:
        gguf, name = require_package(TargetError), metadata["general.architecture"]
        known, kinds = _BY_NAME[name], {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}

        def count(key: str) -> int:
            value = metadata[f"{name}.{key}"]
            if type(value) is not int or not 0 < value < 4096:  # a loop runs as often
                raise KeyError(f"{name}.{key} = {value!r}")
            return value

        table = gguf.get_tensor_name_map(kinds[name], count("block_count"))
        heads = {}
        if known.permuted:
            heads = {"q_proj": count("attention.head_count"), "k_proj": count("attention.head_count_kv")}
        places = {}
        for key in shapes:
            layer, _, kind = key.rpartition(".")
            tensor, last = table.get_name(layer), layer.rpartition(".")[2]
            if tensor is None:
                raise KeyError(f"tensor {key!r}")
            transposed, order = last in known.transposed and kind == "weight", None
            if last in heads:
                if shapes[key][0] != heads[last] * count("attention.key_length"):
                    raise KeyError(f"{heads[last]} heads in tensor {key!r}, which has {shapes[key][0]} rows")
                order = functools.partial(_interleaved, heads[last])
            places[key] = Place(f"{tensor}.{kind}", order=order, transposed=transposed)
        return places


def _interleaved(heads: int, rows: int) -> Tensor:
    """Of each head, the first row of both halves, then the second of both, and so on."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class _GgufTransformers(_Transformers):
    def model_faults(self, model: nn.Module) -> list[str]:
        cls, config = type(model), getattr(model, "config", None)
        known = ARCHITECTURES.get(cls.__name__) if self.owns(model) else None
        if known is None or config is None:
            other = "gguf-diffusers" if DIFFUSERS.owns(model) else "transformers" if self.owns(model) else "quanto"
            return [
                f"model: target 'gguf' knows the conversion of {', '.join(sorted(ARCHITECTURES))}, got a "
                f"{cls.__name__}: use target {other!r}"
            ]
        asked = {**known.requires, "rope_type": "default"} if hasattr(config, "rope_parameters") else known.requires
        if getattr(config, "head_dim", None) is not None and not known.any_heads:
            asked = {**asked, "head_dim": config.hidden_size // config.num_attention_heads}
        fields = {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {})}
        faults = [
            f"model: its config has {key}={fields.get(key)!r}, and GGUF's {known.name!r} computes {value!r} alone: use "
            f"target 'transformers', or train the model with {key}={value!r}"
            for key, value in asked.items()
            if fields.get(key) != value
        ]
        return package_faults() + faults + self.added_faults(model)

    def float_layers(self, model: nn.Module, record: FrozenRecord) -> None:  # type: ignore[override]
        """None: the file itself says which tensors are blocks."""
        return

    def writes_map(self) -> bool:
        return False

    def float_grid(self, model: nn.Module, record: FrozenRecord, format: Format) -> FloatGrid:
        return Host.float_grid(self, model, record, format)

    def load(self, cls: Any, directory: Path, manifest: Manifest, format: Format) -> Reloaded:
        """``from_pretrained`` as floats, with the configuration beside the file, since a file holds not all of that."""
        from transformers import GgufConfig

        config = cls.config_class.from_pretrained(directory, trust_remote_code=False)
        arguments = {"dtype": getattr(torch, manifest.dtype), **self.attention_arguments(manifest), "config": config}
        arguments["quantization_config"] = GgufConfig(dequantize=True)
        loaded = cls.from_pretrained(directory, gguf_file=FILE_NAME, trust_remote_code=False, **arguments)
        return Reloaded(loaded, f"{type(loaded).__name__}.from_pretrained with GgufConfig(dequantize=True)")

    def card(self, manifest: Manifest, module: str, cls: str, format: Format) -> list[str]:
        code = [
            "import torch",
            f"from {module} import AutoConfig, GgufConfig, {cls}",
            "",
            "config = AutoConfig.from_pretrained(directory)  # a GGUF file holds not all of it",
            "floats = GgufConfig(dequantize=True)  # products of blocks would round otherwise than in training",
            f"arguments = {{'gguf_file': {FILE_NAME!r}, 'config': config, 'dtype': torch.{manifest.dtype}}}",
            f"model = {cls}.from_pretrained(directory, quantization_config=floats, **arguments)",
        ]
        text = f"transformers so makes a float model, with equal values. llama.cpp reads `{FILE_NAME}` alone."
        return [python_block(code), text]


GGUF_TRANSFORMERS = _GgufTransformers("transformers", container=_Container(), keeps_packed=False)
