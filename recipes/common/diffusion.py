"""The data of a diffusion run, made with a pipeline that is then let go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

import qat
from qat.data.diffusion import DiffusionCollate, EvaluationBatches, sampler_batches
from qat.data.images import ImageData, load_images
from qat.data.latents import encode, fingerprint, release_encoders
from qat.data.noising import NoiseSchedule
from qat.report import inspect_totals, track
from recipes.common.training import training_batches

__all__ = ["DiffusionConfig", "DiffusionData", "diffusion_data", "inspected", "sequence", "source_of"]

REFERENCE = Path(__file__).parent.parent / "reference_flux"
REFERENCE_LENGTH = 16
SHOWN = 8  # images a row of the grid, unless prompts are given


@dataclass(frozen=True)
class DiffusionData:
    """What a diffusion run trains on and is judged by."""

    batches: DataLoader[Any]
    """To train on."""
    evaluation: EvaluationBatches
    """To judge by."""
    example: dict[str, Any]
    """The arguments of the transformer for two images."""
    sampled: list[dict[str, Any]]
    """Its arguments in the real sampler, over all timesteps."""
    captions: list[Any]
    """What to draw."""


class DiffusionConfig(Protocol):
    """What a recipe's configuration says of the data and of the pictures."""

    @property
    def model(self) -> str | None:
        """The pipeline's directory or hub name; none: the reference pipeline."""

    @property
    def data(self) -> ImageData:
        """The images."""

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens a caption; none: the pipeline's own default, or what the reference pipeline was trained with."""

    @property
    def caption_dropout(self) -> float | None:
        """See `DiffusionCollate`."""

    @property
    def prompts(self) -> Sequence[str]:
        """What to draw; none: captions of the evaluation images."""

    @property
    def sampler_steps(self) -> int:
        """Steps of the sampler."""

    @property
    def seed(self) -> int:
        """Of the noise to evaluate with, of calibration and of the pictures."""


def inspected(model: nn.Module, spec: qat.QuantSpec, target: str) -> str:
    """Say how much of a model will be quantized, and why which layers stay float.

    Raises:
        SpecError, TargetError: the spec does not fit the model or the target.
    """
    report = qat.inspect(model, spec, target)
    reasons = Counter(layer.reason for layer in report.layers if layer.weights is None)
    kept = [f"{count} of {len(report.layers)} linear layers stay float: {why}" for why, count in reasons.items()]
    return "\n".join([inspect_totals(report), *kept])


def source_of(config: DiffusionConfig) -> str:
    """Where the pipeline is."""
    return config.model or str(REFERENCE)


def sequence(config: DiffusionConfig) -> dict[str, Any]:
    """Return the length of captions in tokens, as an argument."""
    length = REFERENCE_LENGTH if config.model is None else None
    return {"max_sequence_length": config.max_sequence_length or length}


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
        DataError: the images, the captions or the pipeline's parts do not fit; before any training.
    """
    schedule = NoiseSchedule(pipeline.scheduler)
    images = load_images(config.data)
    print(images)
    key = fingerprint(folder)
    encoded = encode(pipeline.to(device), images, config.data, key=key, track=track, **sequence(config))
    batches = training_batches(encoded.train, batch_size, DiffusionCollate(encoded, schedule, config.caption_dropout))
    evaluation, few = (
        EvaluationBatches(encoded.evaluation, encoded, schedule, size, config.seed) for size in (batch_size, 2)
    )
    captions = list(dict.fromkeys(images.evaluation["caption"][:]))
    recorded = []
    if sampled:
        options: dict[str, Any] = {"steps": config.sampler_steps, "seed": config.seed, **sequence(config)}
        recorded = sampler_batches(pipeline, captions, sampled, config.data.size, **options)
    release_encoders(pipeline)
    pipeline.transformer.cpu()
    example = next(iter(few))["inputs"]
    return DiffusionData(batches, evaluation, example, recorded, list(config.prompts) or captions[:SHOWN])
