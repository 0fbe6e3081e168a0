"""Tiny models of the architectures, and tiny tokenizers of the kinds, that GGUF files are written with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

import qat
from tests.helpers import tiny_model, tokens

PreTrainedTokenizerFast: Any = transformers.PreTrainedTokenizerFast

IDS = {"input_ids": tokens()}
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "Qwen2ForCausalLM": _SIZES,
    "Qwen3ForCausalLM": _SIZES | {"head_dim": 32},
    "Phi3ForCausalLM": _SIZES | {"rope_parameters": _ROTARY},
    "Starcoder2ForCausalLM": _SIZES,
    "StableLmForCausalLM": _SIZES | {"use_qkv_bias": True},
    "GPT2LMHeadModel": {"vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
}


def of_class(name: str, **options: Any) -> Any:
    """A model; biases and norms are numbers of their own, not zeros and ones."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**ARCHITECTURES[name] | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


TEXTS = ["the cat sat on the mat", "a cat,  a hat", "that's 1234 cats!\n", "über <s> sat", "<think> on"]


def byte_level(split: Any = None, ignore_merges: bool = False) -> Any:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = plain
    if split is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), plain])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    made.add_tokens(["<think>"])
    return made


def sentencepiece() -> Any:
    """BPE that falls back to bytes, as Llama's tokenizer is converted."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    merges = [tuple(merge) for merge in model["merges"]]
    merged = ["".join(merge) for merge in merges]
    singles = [text for text in model["vocab"] if text not in merged]
    vocab = {text: number for number, text in enumerate([*first, *merged, *singles])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def changed(tokenizer: Any, **parts: Any) -> Any:
    """A tokenizer with other parts; ``model.`` parts are fields of its BPE."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in parts.items():
        (fields["model"] if key in fields["model"] else fields)[key] = value
    backend = Tokenizer.from_str(json.dumps(fields))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=tokenizer.eos_token)


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def prepared(model: nn.Module, algorithm: qat.Algorithm | None = None, **spec: Any) -> nn.Module:
    qat.prepare(model, qat.QuantSpec(**spec), target="gguf", algorithm=algorithm or qat.StraightThrough())
    return model


def exported(directory: Path, model: nn.Module | None = None, **spec: Any) -> nn.Module:
    model = prepared(model or tiny_model("llama"), **({"weights": "q4_1"} | spec))
    qat.freeze(model, allow_unreached=True)
    qat.export(model, directory, example_inputs=IDS)
    return model
