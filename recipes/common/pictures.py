"""What a diffusion model is looked at by: images drawn in its pipeline, and the loss along the timesteps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qat.files.whole import whole_file
from recipes.data.conditioning import call_arguments

__all__ = ["draw_images", "plot_losses", "show_grid"]


def draw_images(pipeline: Any, captions: Sequence[Any], size: int, *, seed: int, **options: Any) -> list[Any]:
    """Draw one image a caption, with the pipeline's default guidance.

    Args:
        pipeline: its parts in one dtype, on one device.
        captions: texts, or labels for a pipeline that takes these.
        size: pixels a side.
        seed: of the first noise; each caption has a seed of its own.
        options: ``max_sequence_length``, ``num_inference_steps`` and the like.
    """
    options["generator"] = [torch.Generator().manual_seed(seed + number) for number in range(len(captions))]
    images: list[Any] = pipeline(**call_arguments(pipeline, captions, size, **options)).images
    return images


def show_grid(rows: Mapping[str, Sequence[Any]], captions: Sequence[Any], path: Path) -> None:
    """Write a PNG: one row a model, one column a caption.

    Args:
        rows: the model's name to its images.
        captions: one for each column.
        path: the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(captions) + 1, 1.5 * len(rows) + 0.5), layout="constrained")
    for row, (name, images) in enumerate(rows.items()):
        for column, image in enumerate(images):
            axes = figure.add_subplot(len(rows), len(captions), row * len(captions) + column + 1, xticks=[], yticks=[])
            axes.imshow(image)
            if row == 0:
                axes.set_title(_folded(str(captions[column])), fontsize=8)
            if column == 0:
                axes.set_ylabel(_folded(name), fontsize=8)
    with whole_file(path) as made:
        figure.savefig(made, dpi=150)


def plot_losses(losses: Mapping[str, Sequence[float]], baseline: str, path: Path) -> None:
    """Write a PNG: the loss along the timesteps, and by how much each model is above the baseline.

    Args:
        losses: the model's name to its loss in each bin, from the least noise to the most.
        baseline: one of the names.
        path: the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        places = [(number + 0.5) / len(values) for number in range(len(values))]
        left.plot(places, values, marker=".", label=name)
        above = [value - base for value, base in zip(values, losses[baseline], strict=True)]
        right.plot(places, above, marker=".", label=name)
    left.set(title="loss", xlabel="timestep, from clean to noise", yscale="log")
    right.set(title=f"loss above: {baseline}", xlabel="timestep, from clean to noise")
    left.legend(fontsize=8)
    with whole_file(path) as made:
        figure.savefig(made, dpi=150)


def _folded(text: str, width: int = 18) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
