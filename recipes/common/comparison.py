"""The models of a diffusion run side by side: losses, distances, sizes and images."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from qat.exporting.card import CARD_NAME
from recipes.common.card import add_results
from recipes.common.diffusion import DiffusionData, move_encoders
from recipes.common.diffusion_config import DiffusionConfig, sequence, source_of
from recipes.common.gate import Comparison
from recipes.common.judged import Judged, Scores
from recipes.common.models import load_pipeline
from recipes.common.pictures import draw_images, plot_losses, show_grid
from recipes.common.progress import track
from recipes.common.results import ResultRow, show_results
from recipes.common.run import Run
from recipes.data.latents import release_encoders
from recipes.tasks import Diffusion, evaluate

__all__ = ["DiffusionComparison"]

_SHOWN = ("loss", "output_mse")
TEXT = """\
Each row of images was drawn with the same seeds; the rows differ in the transformer alone, in the serving dtype.
The loss is that of held-out images at equal noise, by timestep; `output_mse` the squared distance from the outputs of
the fine-tuned float model."""


class DiffusionComparison:
    """Judges models by the same batches, and lets each draw the same images in its pipeline.

    A model is on its device only while it is judged there or draws.

    Args:
        config: the pipeline, and how it draws.
        data: to judge by.
        dtype: the serving dtype.
        reference: whose outputs the others' are compared with; float, on the CPU.
        device: where it makes them.
        folder: where scores and images are kept, for a run that goes on.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        data: DiffusionData,
        dtype: torch.dtype,
        reference: nn.Module,
        device: torch.device,
        folder: Path,
    ) -> None:
        self._kept = Judged(folder, config)
        self._config, self._data, self._dtype = config, data, dtype
        data.evaluation.compare_with(reference.to(device))
        reference.cpu()
        self._task = Diffusion(compares=True)
        self._rows: list[ResultRow] = []
        self.losses: dict[str, list[float]] = {}
        """The losses of each model, one a batch."""
        self._images: dict[str, Sequence[Any]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether an earlier start of this run judged a model."""
        return name in self._kept

    def judge(
        self, name: str, model: nn.Module, device: torch.device, steps: int, rate: float | None, draws: bool = True
    ) -> None:
        """Add a float model.

        Args:
            name: what tables and pictures call it.
            model: in float32, on the CPU; a copy of it in the serving dtype draws.
            device: where it is judged.
            steps: what it was trained for.
            rate: at which learning rate.
            draws: whether it draws.
        """
        size = sum(parameter.numel() for parameter in model.parameters()) * self._dtype.itemsize
        if name not in self._kept:
            judged = self._scores(name, model.to(device), None)
            model.cpu()
            images = self._draw(copy.deepcopy(model).to(self._dtype).to(device), device) if draws else []
            self._kept.keep(name, *judged, images)
        self._add(name, size, steps, rate)

    def judge_export(self, name: str, directory: Path | None, device: torch.device, steps: int, rate: float) -> None:
        """Add an export, as reloaded; arguments as for `judge`. Without a directory, an earlier start judged it."""
        size = 0
        if directory is not None:
            size = sum(file.stat().st_size for file in directory.glob("*model*.safetensors"))
            if name not in self._kept:
                model = _placed(qat.load(directory), device)
                self._kept.keep(name, *self._scores(name, model, self._dtype), self._draw(model, device))
                del model
        self._add(name, size, steps, rate)

    def _scores(self, name: str, model: nn.Module, dtype: torch.dtype | None) -> Scores:
        evaluation, losses = self._data.evaluation, list[float]()
        shown = track(evaluation, f"evaluating: {name}", len(evaluation))
        return evaluate(self._task, model, shown, dtype, losses), losses

    def _add(self, name: str, size: int, steps: int, rate: float | None) -> None:
        scores, self.losses[name] = self._kept[name]
        self._rows.append(ResultRow(name, scores, size, steps, rate))
        if images := self._kept.images(name):
            self._images[name] = images
        _free_memory()

    def _draw(self, model: nn.Module, device: torch.device) -> list[Any]:
        config = self._config
        # Encoders and all, as long as it draws.
        pipeline, _ = load_pipeline(
            source_of(config), self._dtype, transformer=model, trust_remote_code=config.trust_remote_code
        )
        move_encoders(pipeline, device)
        options: dict[str, Any] = {
            "num_inference_steps": config.sampler_steps,
            "seed": config.seed,
            **sequence(config),
        }
        images = draw_images(pipeline, self._data.captions, config.data.size, **options)
        release_encoders(pipeline)
        return images

    def report(self, baseline: str, run: Run, compared: Mapping[str, Comparison]) -> None:
        """Print the table, and write it and the pictures beside the export and into its model card.

        Args:
            baseline: the model that the others are compared with.
            run: whose export it is.
            compared: how losses differ, by the name of the model.
        """
        images, losses = run.beside("images.png"), run.beside("losses.png")
        served = self._rows[-1].bytes_on_disk  # of one layout with the export that an earlier start judged
        rows = [
            replace(row, comparison=compared.get(row.name), bytes_on_disk=row.bytes_on_disk or served)
            for row in self._rows
        ]
        show_results(rows, run.beside("results.json"), _SHOWN)
        print("output_mse: squared distance of the outputs from those of the fine-tuned float model, at equal noise")
        show_grid(self._images, self._data.captions, images)
        bins = [f"loss_bin_{number}" for number in range(self._task.bins)]
        plot_losses({row.name: [row.metrics[part] for part in bins] for row in self._rows}, baseline, losses)
        pictures = {"Images of each model": images, "Loss along the timesteps": losses}
        found = (rows, _SHOWN, self._config.data.source, TEXT, pictures)
        add_results(run.output, *found, task="text-to-image")
        print(f"pictures: {images}, {losses}; also in the model card {run.output / CARD_NAME}")


def _free_memory() -> None:
    gc.collect()  # parts of a model may refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a reloaded model, unless it stays on the CPU: moving packed weights may convert them."""
    return model if device.type == "cpu" else model.to(device)
