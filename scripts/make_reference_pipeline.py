"""Train the reference text-to-image pipeline that the default recipe starts from.

A `FluxPipeline` small enough to ship: scikit-learn's handwritten digits at 32x32 pixels with captions, an autoencoder
that makes 8x8 latents of them, and a Flux transformer trained by flow matching together with its two text encoders,
until the evaluation loss (held-out images, fixed noise, stratified timesteps) is flat: the cosine schedule ends at
zero, and the best evaluation of the averaged weights is kept. One GPU, some minutes::

    python -m scripts.make_reference_pipeline out_folder

A machine without scikit-learn and datasets reads the digits from a folder that another machine wrote::

    python -m scripts.make_reference_pipeline --write-images digits
    python -m scripts.make_reference_pipeline out_folder --images digits
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from scripts._reference_pipeline_parts import (
    LATENT_CHANNELS,
    LIBRARY,
    SIZE,
    Autoencoder,
    ClassMeans,
    augment,
    cosine,
    encode,
    make_text_encoders,
    make_tokenizers,
    read_digits,
    to_range,
    train_autoencoder,
    write_images,
)

SEQUENCE = 16  # text tokens: the longest caption has eight
Pipeline = Any
TRAINED = ("transformer", "text_encoder", "text_encoder_2")

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# Reference pipeline

A text-to-image pipeline for the default recipe: Flux architecture, {parameters[transformer]} million parameters in the
transformer (inner size 256, so that groups of 128 exist; one double and three single blocks), a CLIP and a T5 text
encoder of {parameters[text_encoder]} and {parameters[text_encoder_2]} million, and an autoencoder of {parameters[vae]}
million that makes 4x8x8 latents of 32x32 pixels. bfloat16, {megabytes:.1f} MB.

It draws handwritten digits. It is a test object for quantization, and of no other use.

```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("recipes/reference_flux", dtype=torch.float32)
shape = {{"height": 32, "width": 32, "max_sequence_length": 16}}
image = pipeline("the digit three", num_inference_steps=20, **shape).images[0]
```

It was trained with 16 text tokens, hence `max_sequence_length=16`. One caption in ten was left empty, so that
`negative_prompt=""` with a `true_cfg_scale` above 1 works. Its captions: {captions}.

![One column for each digit, one row for each seed, 20 steps, no guidance](samples.png)

**Data.** scikit-learn's digits (UCI, Optical Recognition of Handwritten Digits, CC BY 4.0), enlarged from 8x8 pixels,
with the captions of `recipes/data/images.py`: {training_images:,} images to train on, slightly turned, scaled and
moved; each fifth, {evaluation_images} in all, is held out, and the recipe evaluates on those.

**Training.** `{command}`:
seed {seed}, {autoencoder_steps:,} steps of {autoencoder_batch} images for the autoencoder (mean squared error on the
held-out images {reconstruction_mse:.5f}, at a range of -1 to 1), then {steps:,} steps of {batch} for the transformer
and its text encoders together; AdamW, cosine to zero, weights averaged exponentially, {seconds:.0f} s on one {device}.
The held-out loss at the last three evaluations is {last}; the best weights, rounded to bfloat16, have
{bfloat16_evaluation_loss:.4f}. Of {drawn_digits} drawn digits {drawn_digits_recognized:.0%} are nearest to the mean
image of their own class, of the held-out digits {held_out_digits_recognized:.0%}. `training.json` holds the curve.
"""


def make_pipeline(vae: Autoencoder, captions: list[str]) -> Pipeline:
    """A pipeline with everything but the autoencoder untrained."""
    tokenizer, tokenizer_2 = make_tokenizers(captions)
    text_encoder, text_encoder_2 = make_text_encoders(tokenizer, tokenizer_2)
    transformer = LIBRARY.FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=text_encoder_2.config.d_model,
        pooled_projection_dim=text_encoder.config.hidden_size,
        axes_dims_rope=(16, 24, 24),
    )
    # Blocks that begin as the identity (Peebles and Xie 2023, "adaLN-Zero") train faster and more evenly.
    starts_at_zero = [m.linear for m in transformer.modules() if type(m).__name__.startswith("AdaLayerNorm")]
    for layer in [*starts_at_zero, transformer.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return LIBRARY.FluxPipeline(
        scheduler=LIBRARY.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


class Velocity(nn.Module):
    """What is trained: text encoders and transformer, called as `FluxPipeline` calls them.

    The distinct captions are few, so a step encodes each once and picks.
    """

    def __init__(self, pipeline: Pipeline, captions: list[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED})
        rule: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = pipeline.tokenizer(captions, max_length=pipeline.tokenizer.model_max_length, **rule).input_ids
        self.register_buffer("ids", ids)
        self.register_buffer("ids_2", pipeline.tokenizer_2(captions, max_length=SEQUENCE, **rule).input_ids)
        self.register_buffer("text_positions", torch.zeros(SEQUENCE, 3))
        side = SIZE // pipeline.vae_scale_factor // 2
        places = pipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
        self.register_buffer("image_positions", places)

    def forward(self, noisy: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        """Velocity of packed latents (b, 16, 16) at the noise levels ``sigma`` (b,) with the captions' numbers (b,)."""
        pooled = self.parts["text_encoder"](self.ids).pooler_output
        embedded = self.parts["text_encoder_2"](self.ids_2)[0]
        velocity: Tensor = self.parts["transformer"](
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=pooled[caption],
            encoder_hidden_states=embedded[caption],
            txt_ids=self.text_positions,
            img_ids=self.image_positions,
            return_dict=False,
        )[0]
        return velocity

    def loss(self, latents: Tensor, noise: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        """The flow-matching loss on the straight path from the latents (sigma 0) to the noise (sigma 1)."""
        level = sigma.view(-1, 1, 1)
        velocity = self((1 - level) * latents + level * noise, sigma, caption)
        return functional.mse_loss(velocity, noise - latents)


@dataclass
class Evaluation:
    """Held-out latents, each four times, with fixed noise and stratified timesteps."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    caption: Tensor

    @staticmethod
    def of(latents: Tensor, caption: Tensor) -> Evaluation:
        latents, caption = latents.repeat(4, 1, 1), caption.repeat(4)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        sigma = (torch.randperm(len(latents), generator=generator) + 0.5) / len(latents)
        return Evaluation(latents, noise, sigma.to(latents.device), caption)

    @torch.no_grad()
    def loss(self, model: Velocity) -> float:
        return model.loss(self.latents, self.noise, self.sigma, self.caption).item()


def train(
    model: Velocity,
    latents: Tensor,
    labels: Tensor,
    captions_of: Tensor,
    evaluation: Evaluation,
    generator: torch.Generator,
    arguments: argparse.Namespace,
) -> tuple[Velocity, list[dict[str, float]], int]:
    """The best averaged weights, the curve and the number of steps.

    Args:
        model: what is trained; changed in place.
        latents: packed, of shape (copies, images, 16, 16).
        labels: of shape (images,).
        captions_of: numbers of each label's captions, of shape (labels, templates); caption 0 is the empty one.
        evaluation: what the curve is measured on.
        generator: for images, noise, timesteps and captions.
        arguments: the command line.
    """
    average = copy.deepcopy(model).requires_grad_(False).eval()
    if arguments.compile:
        model.parts["transformer"].compile()
    parameters = list(model.parameters())
    averaged: list[Tensor] = list(average.parameters())
    decayed = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.99),
        fused=latents.device.type == "cuda",
    )
    copies, images = latents.shape[:2]
    batch: int = arguments.batch
    where: dict[str, Any] = {"generator": generator, "device": latents.device}
    order = torch.arange(batch, device=latents.device)
    best, best_state, curve, start, step, progress = math.inf, None, [], time.time(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = cosine(progress, arguments.learning_rate)
        chosen = torch.randint(images, (batch,), **where)
        clean = latents[torch.randint(copies, (batch,), **where), chosen]
        caption = captions_of[labels[chosen], torch.randint(captions_of.shape[1], (batch,), **where)]
        caption = caption * (torch.rand(batch, **where) >= arguments.caption_dropout)
        sigma = (order + torch.rand(batch, **where)) / batch
        loss = model.loss(clean, torch.randn(clean.shape, **where), sigma, caption)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            start = time.time()  # the first step compiles
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - min(0.999, step / (step + 10)))
        seconds = time.time() - start
        progress = max(step / arguments.steps, seconds / 60 / arguments.minutes)
        if step % arguments.evaluate_every == 0 or progress >= 1:
            score = evaluation.loss(average)
            curve.append({"step": step, "train": round(loss.item(), 4), "evaluation": round(score, 5)})
            print(curve[-1], f"{seconds:.0f} s", flush=True)
            if score < best:
                best, best_state = score, {k: v.clone() for k, v in average.state_dict().items()}
    if best_state is not None:  # none only where the loss was never a number
        average.load_state_dict(best_state)
    return average, curve, step


def draw(pipeline: Pipeline, prompts: list[str], seeds: int, steps: int) -> Tensor:
    """Pictures from -1 to 1 of shape (seeds, prompts, 3, 32, 32); the prompts of a row begin with the same noise."""
    rows = []
    for seed in range(seeds):
        pictures = pipeline(
            prompt=prompts,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=SEQUENCE,
            generator=[torch.Generator().manual_seed(seed) for _ in prompts],
            output_type="np",
        ).images
        rows.append(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * 2 - 1)
    return torch.stack(rows)


def save_grid(pictures: Tensor, path: Path, enlarge: int = 2) -> None:
    rows = pictures.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    grid = Image.fromarray(((rows + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    grid.resize((grid.width * enlarge, grid.height * enlarge), Image.Resampling.NEAREST).save(path)


def card(record: dict[str, Any], output: Path) -> str:
    texts = {
        "parameters": {name: f"{count / 1e6:.2f}" for name, count in record["parameters"].items()},
        "captions": ", ".join(f'"{caption}"' for caption in record["captions"]),
        "last": ", ".join(f"{point['evaluation']:.4f}" for point in record["curve"][-3:]),
        "megabytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6,
    }
    return CARD.format(**{**record, **texts})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="the folder to make")
    parser.add_argument("--images", type=Path, help="folder with the digits (default: scikit-learn's)")
    parser.add_argument("--write-images", type=Path, metavar="FOLDER", help="write such a folder, and end")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=60.0, help="end the schedule after so long, if not before")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--copies", type=int, default=64, help="augmented copies of each image")
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--autoencoder-batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=20, help="seeds drawn for each digit at the end")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on CUDA")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if (arguments.output is None) == (arguments.write_images is None):
        parser.error("name either the output folder or --write-images FOLDER")
    if arguments.compile is None:
        arguments.compile = arguments.device.startswith("cuda")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.write_images is not None:
        write_images(arguments.write_images)
        return
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    start = time.time()
    digits = read_digits(arguments.images)
    training, held_out = digits.part(evaluation=False), digits.part(evaluation=True)
    images, held_out_images = to_range(training.images, device), to_range(held_out.images, device)
    print(f"{len(images)} training images, {len(held_out_images)} evaluation images", flush=True)

    vae = train_autoencoder(images, arguments.autoencoder_steps, arguments.autoencoder_batch, generator)
    captions = ["", *sorted(set(digits.captions))]
    pipeline = make_pipeline(vae, captions)
    model = Velocity(pipeline, captions).to(device)

    def packed(pictures: Tensor) -> Tensor:
        latents = encode(vae, pictures)
        rows: Tensor = pipeline._pack_latents(latents, *latents.shape)
        return rows

    copies = [images, *(augment(images, generator) for _ in range(arguments.copies - 1))]
    latents = torch.stack([packed(pictures) for pictures in copies])
    numbers = {caption: number for number, caption in enumerate(captions)}
    evaluation = Evaluation.of(
        packed(held_out_images), torch.tensor([numbers[caption] for caption in held_out.captions], device=device)
    )
    captions_of = digits.captions_by_label(numbers).to(device)
    average, curve, steps = train(
        model, latents, training.labels.to(device), captions_of, evaluation, generator, arguments
    )

    for name in TRAINED:
        setattr(pipeline, name, average.parts[name].to("cpu", torch.bfloat16))
    pipeline.vae.to("cpu", torch.bfloat16)
    pipeline.save_pretrained(arguments.output)
    seconds = time.time() - start

    stored = LIBRARY.FluxPipeline.from_pretrained(arguments.output, dtype=torch.float32, trust_remote_code=False)
    stored.to(device)
    stored.set_progress_bar_config(disable=True)
    labels = torch.arange(len(captions_of))
    shown = [captions[captions_of[label, label % captions_of.shape[1]]] for label in labels]
    pictures = draw(stored, shown, arguments.samples, arguments.sample_steps)
    save_grid(pictures[:4], arguments.output / "samples.png")
    words = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if argv is None else argv)]
    means = ClassMeans.of(images.cpu(), training.labels)
    decoded = vae.float().to(device).decode(vae.encode(held_out_images).latent_dist.mode()).sample
    record = {
        "command": f"python -m scripts.make_reference_pipeline {' '.join(words)}",
        "seed": arguments.seed,
        "steps": steps,
        "batch": arguments.batch,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "caption_dropout": arguments.caption_dropout,
        "copies": arguments.copies,
        "autoencoder_steps": arguments.autoencoder_steps,
        "autoencoder_batch": arguments.autoencoder_batch,
        "captions": sorted({captions[number] for number in captions_of[3]}),
        "training_images": len(images),
        "evaluation_images": len(held_out_images),
        "parameters": {name: sum(p.numel() for p in getattr(stored, name).parameters()) for name in (*TRAINED, "vae")},
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "reconstruction_mse": round(functional.mse_loss(decoded, held_out_images).item(), 6),
        "best_evaluation_loss": min(point["evaluation"] for point in curve),
        "bfloat16_evaluation_loss": round(evaluation.loss(Velocity(stored, captions).to(device)), 5),
        "drawn_digits_recognized": round(means.share_right(pictures.flatten(0, 1), labels.repeat(len(pictures))), 4),
        "held_out_digits_recognized": round(means.share_right(held_out_images.cpu(), held_out.labels), 4),
        "drawn_digits": len(pictures) * len(shown),
        "curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "README.md").write_text(card(record, arguments.output))
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}))


if __name__ == "__main__":
    main()
