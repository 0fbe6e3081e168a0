"""Tiny random models of many transformers architectures, built in code: no downloads, a second each at most.

Widths of 128, 192, 256 and 384 keep whole rows and groups of 96 and 128 in the set; depth and vocabulary are as small
as an architecture allows. `scripts.architecture_matrix` runs them all, `test_architectures` the first sixteen. Of all
other classes `tests.tiny_transformers` makes models by rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """How to make one tiny model, and what to feed it."""

    model: str
    """A class of transformers."""
    sizes: Mapping[str, Any]
    """Arguments of its configuration class; a mapping under ``text_config`` and the like is one too."""
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"input_ids": (2, 6)})
    """Shapes of the inputs; those whose name ends in ``ids`` are tokens."""

    def build(self) -> nn.Module:
        """The model, with the same random weights every time, in training mode, but without dropout."""
        import transformers

        kind = getattr(transformers, self.model)
        torch.manual_seed(0)
        model: nn.Module = kind(kind.config_class(**self.sizes))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train()

    def example(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Inputs, the same every time; floating ones in ``dtype``."""
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randint(3, 60, shape, generator=generator)
            if name.endswith("ids")
            else torch.randn(shape, generator=generator).to(dtype)
            for name, shape in self.inputs.items()
        }


_IMAGE: dict[str, tuple[int, ...]] = {"pixel_values": (2, 3, 32, 32)}
_SEQUENCES: dict[str, tuple[int, ...]] = {"input_ids": (2, 6), "decoder_input_ids": (2, 5)}
_WAVE: dict[str, tuple[int, ...]] = {"input_values": (2, 800)}
_TOKENS: dict[str, Any] = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_BODY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = _TOKENS | _BODY
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = _BODY | {"image_size": 32, "patch_size": 8}
_BART = _TOKENS | {
    "d_model": 256,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 384,
    "decoder_ffn_dim": 384,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 384,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SPEECH = _BODY | {
    "vocab_size": 64,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_TWO_TOWERS = {"text_config": _TEXT, "vision_config": _VISION}
_BOTH: dict[str, tuple[int, ...]] = {"input_ids": (2, 6), "pixel_values": (2, 3, 32, 32)}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model: architecture
    for architecture in (
        # Causal language models
        Architecture("LlamaForCausalLM", _GROUPED),
        Architecture("MistralForCausalLM", _GROUPED),
        Architecture("Qwen3ForCausalLM", _GROUPED | {"head_dim": 32}),
        Architecture("Gemma3ForCausalLM", _GROUPED | {"head_dim": 32, "sliding_window": 8}),
        Architecture("GPTNeoXForCausalLM", _TEXT),
        Architecture("OPTForCausalLM", _TEXT | {"ffn_dim": 384, "word_embed_proj_dim": 128}),
        Architecture("Phi3ForCausalLM", _GROUPED),
        Architecture("GPT2LMHeadModel", _GPT),
        Architecture("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
        # Encoders
        Architecture("BertForSequenceClassification", _TEXT | {"num_labels": 4}),
        Architecture(
            "DistilBertForSequenceClassification",
            _TOKENS | {"dim": 256, "hidden_dim": 384, "n_layers": 2, "n_heads": 4, "num_labels": 4},
        ),
        # Vision, and vision with text
        Architecture("ViTForImageClassification", _VISION | {"num_labels": 4}, _IMAGE),
        Architecture("CLIPModel", _TWO_TOWERS | {"projection_dim": 128}, _BOTH),
        Architecture("SiglipModel", _TWO_TOWERS, _BOTH),
        # Encoder and decoder
        Architecture("T5ForConditionalGeneration", _T5, _SEQUENCES),
        Architecture(
            "WhisperForConditionalGeneration",
            _BART | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32},
            {"input_features": (2, 16, 32), "decoder_input_ids": (2, 5)},
        ),
        # The script alone runs what follows.
        Architecture("BertForMaskedLM", _TEXT),
        Architecture("RobertaForSequenceClassification", _TEXT | {"num_labels": 4}),
        Architecture("Qwen2ForCausalLM", _GROUPED),
        Architecture("GemmaForCausalLM", _GROUPED | {"head_dim": 64}),
        Architecture("Gemma2ForCausalLM", _GROUPED | {"head_dim": 32, "sliding_window": 8}),
        Architecture("PhiForCausalLM", _GROUPED),
        Architecture("FalconForCausalLM", _TEXT | {"new_decoder_architecture": False}),
        Architecture(
            "BloomForCausalLM",
            {"vocab_size": 64, "hidden_size": 256, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        ),
        Architecture(
            "MptForCausalLM",
            {"vocab_size": 64, "d_model": 256, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
        ),
        Architecture("GPTJForCausalLM", _GPT | {"rotary_dim": 32}),
        Architecture("OpenAIGPTLMHeadModel", _GPT),
        Architecture("GPT2ForSequenceClassification", _GPT | {"num_labels": 4, "pad_token_id": 0}),
        Architecture("ImageGPTForCausalImageModeling", _GPT),
        Architecture(
            "GPTNeoForCausalLM",
            _TOKENS
            | {"hidden_size": 192, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        ),
        Architecture("StableLmForCausalLM", _GROUPED),
        Architecture("Olmo2ForCausalLM", _GROUPED),
        Architecture("CohereForCausalLM", _GROUPED),
        Architecture("GraniteForCausalLM", _GROUPED),
        Architecture("Starcoder2ForCausalLM", _GROUPED),
        Architecture("SmolLM3ForCausalLM", _GROUPED),
        Architecture("Glm4ForCausalLM", _GROUPED | {"head_dim": 64}),
        Architecture(
            "Qwen3MoeForCausalLM",
            _GROUPED | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
        ),
        Architecture(
            "PhimoeForCausalLM",
            _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        Architecture(
            "DeepseekV3ForCausalLM",
            _TEXT
            | {
                "num_key_value_heads": 4,
                "q_lora_rank": 128,
                "kv_lora_rank": 128,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 64,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 128,
                "first_k_dense_replace": 1,
            },
        ),
        Architecture(
            "MambaForCausalLM",
            {"vocab_size": 64, "hidden_size": 128, "state_size": 8, "num_hidden_layers": 2, "use_mambapy": False},
        ),
        Architecture("DebertaV2ForSequenceClassification", _TEXT | {"num_labels": 4, "relative_attention": True}),
        Architecture("ElectraForSequenceClassification", _TEXT | {"embedding_size": 128, "num_labels": 4}),
        Architecture("AlbertForMaskedLM", _TEXT | {"embedding_size": 128}),
        Architecture("MPNetForMaskedLM", _TEXT),
        Architecture(
            "ModernBertForMaskedLM", _TEXT | {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1}
        ),
        Architecture("DeiTForImageClassification", _VISION | {"num_labels": 4}, _IMAGE),
        Architecture("BeitForImageClassification", _VISION | {"num_labels": 4}, _IMAGE),
        Architecture("Dinov2ForImageClassification", _VISION | {"num_labels": 4, "mlp_ratio": 2}, _IMAGE),
        Architecture(
            "ViTMAEForPreTraining", _VISION | {"decoder_hidden_size": 128, "decoder_num_hidden_layers": 1}, _IMAGE
        ),
        Architecture(
            "SwinForImageClassification",
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 64,
                "depths": [1, 1],
                "num_heads": [2, 4],
                "window_size": 4,
                "num_labels": 4,
            },
            _IMAGE,
        ),
        Architecture(
            "SegformerForImageClassification",
            {
                "num_encoder_blocks": 2,
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [64, 128],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "num_attention_heads": [1, 2],
                "mlp_ratios": [2, 2],
                "num_labels": 4,
            },
            _IMAGE,
        ),
        Architecture("CLIPTextModelWithProjection", _TEXT | {"projection_dim": 128}),
        Architecture("CLIPVisionModelWithProjection", _VISION | {"projection_dim": 128}, _IMAGE),
        Architecture("SiglipVisionModel", _VISION, _IMAGE),
        Architecture("T5EncoderModel", _T5 | {"feed_forward_proj": "gated-gelu"}),
        Architecture("UMT5EncoderModel", _T5 | {"feed_forward_proj": "gated-gelu"}),
        Architecture("BartForConditionalGeneration", _BART, _SEQUENCES),
        Architecture("MarianMTModel", _BART, _SEQUENCES),
        Architecture("PegasusForConditionalGeneration", _BART, _SEQUENCES),
        Architecture("Wav2Vec2ForCTC", _SPEECH, _WAVE),
        Architecture("HubertForCTC", _SPEECH, _WAVE),
    )
}
