"""Batches of diffusion training: noised latents, what the model is to predict, and their place in the noising.

A batch is ``{"inputs", "target", "fraction"}``: the transformer's arguments, by name and nested as its pipeline passes
them; the target, of the output's shape; and for each example its timestep's place among the training timesteps, from 0
(the least noise) to below 1 (the most). An evaluation batch may also carry ``"reference"``, another model's outputs.

Noise and timesteps are drawn when the batch is put together, so whoever is given the batch (a student, its teacher, any
arm of a comparison) is given the same noise. Timesteps are stratified: each of a batch's examples has a timestep from a
part of its own, which makes the loss of one batch far less a matter of luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from recipes.data import DataError
from recipes.data.conditioning import calls_of, timestep_of
from recipes.data.latents import Encoded
from recipes.data.noising import NoiseSchedule, stratified
from recipes.data.templates import Rows
from recipes.data.tensors import move
from recipes.tasks.diffusion import prediction

__all__ = ["DiffusionCollate", "EvaluationBatches", "sampler_batches"]

Batch = dict[str, Any]


class DiffusionCollate:
    """Puts examples of `Latents` together to a batch, with noise and timesteps of its own.

    Args:
        encoded: gives the transformer's arguments.
        schedule: gives noised latents and targets.
        caption_dropout: the share of examples that lose their caption; none: a tenth where the pipeline guides by
            running without a caption, which the model must therefore know, else 0.
        generator: for noise, timesteps and dropout; none: torch's global random numbers.

    Raises:
        DataError: captions are to be dropped, but the pipeline has no such thing as no caption.
    """

    def __init__(
        self,
        encoded: Encoded,
        schedule: NoiseSchedule,
        caption_dropout: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._encoded, self._schedule = encoded, schedule
        self.generator = generator  # of this name, so that a calibration within a fit puts it back
        self.caption_dropout = (0.1 if encoded.guided else 0.0) if caption_dropout is None else caption_dropout
        if self.caption_dropout > 0 and encoded.empty is None:
            raise DataError(f"caption_dropout: {caption_dropout} needs a pipeline that can do without: set it to 0")

    def __call__(self, examples: Sequence[dict[str, Any]], places: Tensor | None = None) -> Batch:
        """Return a batch on the CPU, in the dtypes of the recording.

        Args:
            examples: of `Latents`.
            places: (batch,), where in the noising each stands, from 0 to below 1; none: stratified over the batch.
        """
        template, schedule, generator = self._encoded.template, self._schedule, self.generator
        latents = torch.stack([example["latents"] for example in examples])
        noise = torch.randn(latents.shape, generator=generator)
        steps = len(schedule.timesteps)
        numbers = ((stratified(len(examples), generator) if places is None else places) * steps).long()
        dropped = torch.rand(len(examples), generator=generator) < self.caption_dropout
        rows: list[Rows] = [
            self._encoded.empty if drop and self._encoded.empty is not None else example["rows"]
            for example, drop in zip(examples, dropped.tolist(), strict=True)
        ]
        timesteps = schedule.timesteps[numbers]
        noised = schedule.noised(latents, noise, timesteps).to(template.sample_dtype)
        return {
            "inputs": template.fill(rows, noised, timesteps),
            "target": schedule.target(latents, noise, timesteps),
            "fraction": numbers / steps,
        }


class EvaluationBatches:
    """The same batches at every pass: examples in order, noise and timesteps by a seed; captions are kept.

    Timesteps are stratified over all examples, whatever the batch size, so that as many examples as there are parts of
    the noising have one in each part.

    Args:
        examples: `Latents`.
        encoded: as for `DiffusionCollate`.
        schedule: as for `DiffusionCollate`.
        batch_size: examples a batch; the last may be smaller.
        seed: of the noise and the timesteps.
    """

    def __init__(
        self, examples: Dataset[Any], encoded: Encoded, schedule: NoiseSchedule, batch_size: int, seed: int = 0
    ) -> None:
        self._examples, self._encoded, self._schedule = examples, encoded, schedule
        self._batch_size, self._seed = batch_size, seed
        self._references: list[Tensor] = []

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        collate = DiffusionCollate(self._encoded, self._schedule, 0.0, generator)
        count: int = len(self._examples)  # type: ignore[arg-type]
        places = stratified(count, generator)
        for number, start in enumerate(range(0, count, self._batch_size)):
            chosen = range(start, min(start + self._batch_size, count))
            batch = collate([self._examples[index] for index in chosen], places[chosen.start : chosen.stop])
            if self._references:
                batch["reference"] = self._references[number]
            yield batch

    @torch.no_grad()
    def compare_with(self, model: nn.Module) -> None:
        """From now on, batches carry what ``model`` returns for them, as ``"reference"``.

        Args:
            model: in evaluation mode or not, on any device; left as it is, but for its training mode.
        """
        device = next(model.parameters()).device
        self._references = []  # while these are made there are none
        model.eval()
        self._references = [
            prediction(model(**move(batch["inputs"], device)), batch["target"]).to("cpu", copy=True) for batch in self
        ]


def sampler_batches(
    pipeline: Any,
    captions: Sequence[Any],
    count: int,
    size: int,
    *,
    max_sequence_length: int | None = None,
    steps: int = 20,
    batch_size: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Record what a pipeline's real sampler calls its transformer with, for calibration over all timesteps.

    The sampler runs whole, with the pipeline's default guidance, so that latents, timesteps and both branches of
    guidance are those of serving. Of each run some steps are kept, evenly spaced, other ones in each run; of a step all
    calls, where a pipeline calls its transformer with and without the caption one after the other.

    Args:
        pipeline: with its encoders and the float transformer.
        captions: what to sample; they are used in turn.
        count: batches to return.
        size: pixels a side.
        max_sequence_length: tokens a caption; none: the pipeline's own default.
        steps: the sampler's.
        batch_size: captions a run.
        seed: of the first noise.

    Returns:
        ``count`` mappings of the transformer's arguments, on the CPU; a few more where the last step has several calls.

    Raises:
        DataError: the pipeline cannot run this.
    """
    kept: list[dict[str, Any]] = []
    wanted = -(-count // max(1, min(count, -(-len(captions) // batch_size))))  # of each run, if all captions are used
    run = 0
    while len(kept) < count:
        chosen = [captions[(run * batch_size + index) % len(captions)] for index in range(batch_size)]
        calls = calls_of(
            pipeline,
            chosen,
            size,
            max_sequence_length=max_sequence_length,
            seed=seed + run,
            num_inference_steps=steps,
        )
        taken = [list(group) for _, group in groupby(calls, timestep_of)]
        of_this = min(-(-min(wanted, count - len(kept)) // len(taken[0])), len(taken))
        offset = (0.5 + run * 0.618) % 1.0  # spreads the places of many runs evenly
        places = (int((part + offset) * len(taken) / of_this) for part in range(of_this))
        kept += [move(call, torch.device("cpu"), copy=True) for place in places for call in taken[place]]
        run += 1
    return kept
