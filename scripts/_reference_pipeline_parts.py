"""What the reference pipeline is made from: the digits, the autoencoder, the tokenizers, untrained text encoders."""

from __future__ import annotations

import json
import math
import string
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

SIZE = 32
LATENT_CHANNELS = 4
LIBRARY: Any = diffusers  # whose classes, loaded lazily, have no attributes for a type checker
Autoencoder = Any
HOLD_OUT_EVERY = 5  # as in recipes.data.images, which is not imported where there are no datasets


@dataclass
class Digits:
    """Pictures of digits and what they show."""

    images: Tensor
    """uint8 of shape (n, 3, 32, 32)."""
    captions: list[str]
    labels: Tensor
    """int64 of shape (n,)."""

    def part(self, evaluation: bool) -> Digits:
        chosen = [i for i in range(len(self.captions)) if (i % HOLD_OUT_EVERY == 0) == evaluation]
        return Digits(self.images[chosen], [self.captions[i] for i in chosen], self.labels[chosen])

    def captions_by_label(self, numbers: dict[str, int]) -> Tensor:
        """The numbers of each label's captions, of shape (labels, templates); captions of one label say the same."""
        found: dict[int, set[int]] = {}
        for label, caption in zip(self.labels.tolist(), self.captions, strict=True):
            found.setdefault(label, set()).add(numbers[caption])
        most = max(map(len, found.values()))
        return torch.tensor([list(islice(cycle(sorted(found[label])), most)) for label in sorted(found)])


def read_digits(folder: Path | None) -> Digits:
    """The digits of a folder that `write_images` made, or scikit-learn's."""
    if folder is None:
        from recipes.data.images import digits

        rows: list[dict[str, Any]] = list(digits())
    else:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [{**row, "image": Image.open(folder / row["file_name"]).convert("RGB")} for row in rows]
    images = np.stack([np.asarray(row["image"]) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    return Digits(torch.from_numpy(images).permute(0, 3, 1, 2), [row["caption"] for row in rows], labels)


def write_images(folder: Path) -> None:
    """scikit-learn's digits as PNG files with a metadata.jsonl, as ``datasets``' image folders have it."""
    from recipes.data.images import digits

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, row in enumerate(digits()):
        name = f"{index:04}.png"
        row["image"].save(folder / name)
        lines.append(json.dumps({"file_name": name, "caption": row["caption"], "label": row["label"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def to_range(images: Tensor, device: torch.device) -> Tensor:
    """Bytes as numbers from -1 to 1, the autoencoder's range."""
    return images.to(device, torch.float32) / 127.5 - 1


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 8 degrees, scale by up to a tenth, move by up to one and a half pixels."""
    draws = torch.rand(len(images), 5, generator=generator, device=images.device) * 2 - 1
    angle, across, down = draws[:, 0] * math.radians(8), 1 + 0.1 * draws[:, 1], 1 + 0.1 * draws[:, 2]
    shift = draws[:, 3:] * 1.5 * 2 / SIZE
    rows = (
        torch.stack([angle.cos() * across, -angle.sin() * down, shift[:, 0]], dim=1),
        torch.stack([angle.sin() * across, angle.cos() * down, shift[:, 1]], dim=1),
    )
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def cosine(progress: float, peak: float, warmup: float = 0.03) -> float:
    if progress < warmup:
        return peak * (progress / warmup * 0.99 + 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def train_autoencoder(
    images: Tensor, steps: int, batch: int, generator: torch.Generator, kl_weight: float = 1e-4, peak: float = 2e-3
) -> Autoencoder:
    """An autoencoder whose ``scaling_factor`` and ``shift_factor`` give the latents of ``images`` mean 0 and std 1."""
    model = LIBRARY.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
        mid_block_add_attention=False,
    ).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cosine(step / steps, peak)
        chosen = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        pictures = augment(images[chosen], generator)
        posterior = model.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = functional.mse_loss(decoded, pictures)
        loss = error + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"autoencoder step {step + 1}: mean squared error {error.item():.5f}", flush=True)
    model.to(torch.bfloat16).float()  # what is shipped is what the latents are made with
    means = encode(model, images, scaled=False)
    model.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
    return model.requires_grad_(False).eval()


@torch.no_grad()
def encode(model: Autoencoder, images: Tensor, scaled: bool = True) -> Tensor:
    means = torch.cat([model.encode(chunk).latent_dist.mode() for chunk in torch.split(images, 512)])
    return (means - model.config.shift_factor) * model.config.scaling_factor if scaled else means


@dataclass
class ClassMeans:
    """Names the class whose mean picture is nearest."""

    means: Tensor
    """float32 of shape (classes, 3, 32, 32)."""

    @staticmethod
    def of(images: Tensor, labels: Tensor) -> ClassMeans:
        return ClassMeans(torch.stack([images[labels == label].mean(0) for label in range(int(labels.max()) + 1)]))

    def share_right(self, images: Tensor, labels: Tensor) -> float:
        distances = torch.cdist(images.flatten(1), self.means.flatten(1))
        return (distances.argmin(1) == labels).float().mean().item()


def make_tokenizers(captions: list[str]) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """CLIP's byte-level BPE with merges learned from the captions, and T5's unigrams: their words and all of ASCII."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

    words = sorted({word for caption in captions for word in caption.split()})
    letters = [letter for letter in string.printable if not letter.isspace()]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("\u2581" + word, -5.0) for word in words)]
    taken = {piece for piece, _ in scores}
    scores += [(letter, -10.0) for letter in ("\u2581", *letters) if letter not in taken]
    return tokenizer, T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def make_text_encoders(tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained text encoders of widths 64 and 128."""
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)
