"""Tiny diffusion pipelines with random weights: real classes, made in a second, saved where a test wants them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SIZE = 16
"""Pixels a side, which every autoencoder here halves; Sana accepts multiples of 32 only."""
WORDS = ["the", "digit", "handwritten", "a", "number", "zero", "one", "two", "three", "four", "five", "six", "seven"]
CLASSES = 10


def tokenizer(length: int = 12) -> Any:
    """One token a word, 0 to pad with, 1 at the end."""
    vocabulary = {"<pad>": 0, "<end>": 1} | {word: index for index, word in enumerate([*WORDS, *"0123456789"], 2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<end>",
        unk_token="<pad>",
        model_max_length=length,
        padding_side="right",
    )


def autoencoder(channels: int = 4, **config: Any) -> AutoencoderKL:
    """An AutoencoderKL that halves the sides."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIZE,
        **config,
    )


def clip(kind: Any = CLIPTextModel) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=32,
            max_position_embeddings=12,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def t5(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=64, d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )


def flux(guidance: bool = False, width: int = 64, **scheduler: Any) -> FluxPipeline:
    """Flow matching, packed latents; optionally distilled from guidance."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(width // 8, width // 8, width // 4),
        guidance_embeds=guidance,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.5),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Flow matching with classifier-free guidance; raw latents."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(64),
        tokenizer_3=tokenizer(),
    )


def pixart() -> PixArtSigmaPipeline:
    """Noise prediction with a learned variance, classifier-free guidance, a mask."""
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(scaling_factor=0.13),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def dit() -> DiTPipeline:
    """Noise prediction with a learned variance; class labels instead of captions."""
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=autoencoder(scaling_factor=0.18), scheduler=DDIMScheduler())


def sana() -> SanaPipeline:
    """Flow prediction by another scheduler, a deterministic autoencoder that divides the sides by two."""
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=512,
        )
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return SanaPipeline(
        tokenizer=tokenizer(), text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def chroma() -> ChromaPipeline:
    """Flow matching, packed latents; classifier-free guidance by two calls a step, one after the other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)  # diffusers' own use of it
        transformer = ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 8, 16),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.5),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux, guidance-distilled": lambda: flux(guidance=True),
    "sd3": stable_diffusion_3,
    "pixart": pixart,
    "dit": dit,
    "sana": sana,
    "chroma": chroma,
}
SEQUENTIAL = frozenset({"chroma"})
"""Those that call their transformer twice a step, with the caption and then without it."""


def make(name: str) -> Any:
    """Build a pipeline by its name in `PIPELINES`, always with the same weights."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # layers that start from zero would hide what reaches them
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as loaded ones are
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def size_of(name: str) -> int:
    """Pixels a side that the pipeline of that name takes."""
    return 32 if name == "sana" else SIZE


def caption_of(name: str, number: int) -> Any:
    """A caption that the pipeline of that name takes."""
    return number if name == "dit" else f"the digit {WORDS[5 + number]}"
