"""The data of a diffusion run, made with a pipeline that is then let go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from recipes.common.batches import TrainingBatches, require_whole_batch
from recipes.common.diffusion_config import DiffusionConfig, sequence
from recipes.common.progress import track
from recipes.common.results import inspect_totals
from recipes.data import DataError
from recipes.data.conditioning import call_arguments
from recipes.data.diffusion import DiffusionCollate, EvaluationBatches, sampler_batches
from recipes.data.images import load_images
from recipes.data.latents import encode, fingerprint, release_encoders
from recipes.data.noising import NoiseSchedule

__all__ = ["DiffusionData", "diffusion_data", "inspected", "move_encoders"]

SHOWN = 8  # images a row of the grid, unless prompts are given


@dataclass(frozen=True)
class DiffusionData:
    """What a diffusion run trains on and is judged by."""

    batches: TrainingBatches
    """To train on."""
    evaluation: EvaluationBatches
    """To judge by."""
    example: dict[str, Any]
    """The arguments of the transformer for two images."""
    sampled: list[dict[str, Any]]
    """Its arguments in the real sampler, over all timesteps."""
    captions: list[Any]
    """What to draw."""


def inspected(model: nn.Module, spec: qat.QuantSpec, target: str, example: Mapping[str, Any]) -> str:
    """Say how much of a model will be quantized, and why which layers stay float; arguments as for `qat.inspect`.

    Raises:
        SpecError, TargetError: the spec does not fit the model or the target.
    """
    report = qat.inspect(model, spec, target=target, example_inputs=example)
    reasons = Counter(layer.reason for layer in report.layers if layer.weights is None)
    kept = [f"{count} of {len(report.layers)} linear layers stay float: {why}" for why, count in reasons.items()]
    return "\n".join([inspect_totals(report), *kept])


def move_encoders(pipeline: Any, device: torch.device) -> None:
    """Move every module of a pipeline but its transformer."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name != "transformer":
            part.to(device)


def diffusion_data(
    pipeline: Any, folder: Path, config: DiffusionConfig, device: torch.device, batch_size: int, sampled: int
) -> DiffusionData:
    """Load and encode the images with a pipeline, whose encoders are then released.

    Args:
        pipeline: all its parts on the CPU, where its transformer stays.
        folder: its files.
        config: which images, and how.
        device: where the encoders run.
        batch_size: examples a batch.
        sampled: batches to record in the real sampler; 0: it does not run.

    Raises:
        DataError: the images, the captions, the prompts or the pipeline's parts do not fit, or there are fewer images
            than a batch holds; before any training.
    """
    _check_prompts(pipeline, config)
    schedule = NoiseSchedule(pipeline.scheduler)
    images = load_images(config.data)
    print(images)
    require_whole_batch(len(images.train), batch_size)
    key = fingerprint(folder)
    move_encoders(pipeline, device)
    encoded = encode(pipeline, images, config.data, key=key, track=track, **sequence(config))
    collate = DiffusionCollate(encoded, schedule, config.caption_dropout)
    batches = TrainingBatches(encoded.train, batch_size, collate, config.seed)
    evaluation, few = (
        EvaluationBatches(encoded.evaluation, encoded, schedule, size, config.seed) for size in (batch_size, 2)
    )
    captions = list(dict.fromkeys(images.evaluation["caption"][:]))
    recorded = []
    if sampled:
        pipeline.transformer.to(device)  # nothing but the sampler runs it
        options: dict[str, Any] = {"steps": config.sampler_steps, "seed": config.seed, **sequence(config)}
        recorded = sampler_batches(pipeline, captions, sampled, config.data.size, **options)
    release_encoders(pipeline)
    pipeline.transformer.cpu()
    example = next(iter(few))["inputs"]
    return DiffusionData(batches, evaluation, example, recorded, list(config.prompts) or captions[:SHOWN])


def _check_prompts(pipeline: Any, config: DiffusionConfig) -> None:
    if not config.prompts:
        return
    try:
        call_arguments(pipeline, config.prompts, config.data.size)
    except DataError as error:
        raise DataError(
            f"prompts: {type(pipeline).__name__} cannot draw {tuple(config.prompts)}: give texts to a pipeline that "
            "takes prompts, and to one that takes class labels integers or labels that it knows"
        ) from error
