"""The figures of the documentation, from the rows in docs/results: SVG that is readable in light and in dark.

A figure has a background of its own, and both change with the reader's colour scheme: so it fits any page::

    python -m scripts.draw_figures [--output docs/figures]
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from scripts.show_quality import arms_of

__all__ = ["FIGURES", "main"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
WIDTH = 5.2
"""Inches: a phone shows the figure at about two thirds, so that 10 points stay readable."""
INK, PAPER, FAINT = "#1b1b1c", "#fdfdfe", "#c9c9ca"
OURS, QUANTO, TORCHAO = "#2f81d6", "#d9730d", "#8a63c9"
SCHEME = f"""<style>
:root {{ --ink: {INK}; --paper: {PAPER}; --faint: {FAINT} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e4e6; --paper: #1c1d20; --faint: #4b4c50 }} }}
</style>"""
STEPS = (
    ("inspect", "what will be quantized, and what will not"),
    ("prepare", "layers get fake quantization, in place"),
    ("calibrate", "scales and starts, from some batches"),
    ("train", "in any loop: plain tensors, a float teacher"),
    ("freeze", "codes and scales are packed as trained"),
    ("export", "files with hashes, written whole or not at all"),
    ("verify", "reload them, compare codes and outputs"),
    ("load", "transformers, diffusers, llama.cpp, quanto"),
)
FLOORS = (
    ("cli", "the command qat"),
    ("integrations", "Trainer; plug-ins for the loaders"),
    ("training", "schedule, callback, distillation"),
    ("exporting loading verification", "files and back"),
    ("preparation calibration freezing", "verbs on a model"),
    ("hosts", "which library builds and loads"),
    ("formats", "how a weight is stored"),
    ("layers", "modules with fake quantization"),
    ("quantizers starts observers", "how scales are found"),
    ("kernels", "the arithmetic, fast"),
    ("numerics", "the arithmetic: the specification"),
)
"""From the roof down; a floor imports those below it alone (`tests/test_architecture.py` has the whole order)."""


def line() -> Figure:
    """The path from a float model to loaded files."""
    return _stack([("float model", ""), *STEPS, ("the same numbers, to the bit", "")], width=26)


def house() -> Figure:
    """The parts of the library, of which each imports those below it."""
    for parts, _ in FLOORS:
        for part in parts.split():
            if not (ROOT / "qat" / part).is_dir() and not (ROOT / "qat" / f"{part}.py").is_file():
                raise ValueError(f"FLOORS: must name parts of qat, got {part!r}")
    return _stack([(parts.replace(" ", ", "), meaning) for parts, meaning in FLOORS], width=47)


def _stack(rows: list[tuple[str, str]], width: float) -> Figure:
    """Boxes from top to bottom, each with what it means beside it, or as wide as the figure where that is empty."""
    figure = Figure(figsize=(WIDTH, 0.42 * len(rows)), facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(len(rows), 0))
    axis.axis("off")
    for place, (name, meaning) in enumerate(rows):
        middle, wide = place + 0.5, width if meaning else 96
        box = FancyBboxPatch((2, middle - 0.32), wide, 0.64, "round,pad=0,rounding_size=0.8", mutation_aspect=0.1)
        box.set(facecolor=OURS if meaning else PAPER, edgecolor=OURS)
        axis.add_patch(box)
        colour, size = "#ffffff" if meaning else INK, 8.5 if len(name) > 20 and meaning else 10
        axis.text(2 + wide / 2, middle, name, color=colour, ha="center", va="center", fontsize=size, weight="bold")
        axis.text(width + 5, middle, meaning, color=INK, va="center", fontsize=9)
    return figure


def quality() -> Figure:
    """Share of the loss of quantization that training wins back, against steps, beside stock quanto and torchao."""
    rows = [json.loads(text) for text in (RESULTS / "quality_starts_h200.jsonl").read_text().splitlines()]
    arms = arms_of(row for row in rows if row["arm"] == "FT" or row["activations"] is None)
    curves = (
        ("learned", "qat, from clip", OURS, "-"),
        ("best, hidden x 10", "qat, from best", OURS, "--"),
        ("torchao, kl", "torchao, with our loss", TORCHAO, "-"),
        ("torchao", "torchao, as documented", TORCHAO, "--"),
        ("quanto, kl", "stock quanto, with our loss", QUANTO, "-"),
        ("quanto", "stock quanto, as documented", QUANTO, "--"),
    )
    figure = Figure(figsize=(WIDTH, 4.1), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, ("int2", "int4"), strict=True):
        for arm, label, colour, style in curves:
            points = [
                (steps, statistics.mean(found[arm].closed))
                for (weights, activations, steps), found in arms.items()
                if weights == kind and activations is None and arm in found and found[arm].closed
            ]
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker="o", markersize=4)
        axis.set(title=kind, xscale="log", xlabel="steps of 2,048 tokens", xlim=(65, 2200), ylim=(0, 1.2))
        axis.set_xticks([80, 400, 1600], ["80", "400", "1600"])
        axis.minorticks_off()
        _plain(axis)
    axes[0].set_ylabel("share won back", color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def speed() -> Figure:
    """Time and peak memory of a training step against plain training, beside stock quanto and torchao."""
    peers, ours = _ratios("speed_8b_eager.json"), _ratios("speed_learned_eager.json")
    arms = (
        ("qat", OURS, ours, "qat"),
        ("qat, learned ranges", OURS, ours, "learned"),
        ("stock quanto", QUANTO, peers, "quanto"),
        ("torchao", TORCHAO, peers, "torchao"),
    )
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(2, 2, sharey=True)
    for row, kind in zip(axes, ("int8", "int4"), strict=True):
        for axis, what in zip(row, ("time", "memory"), strict=True):
            values = [rows[arm, kind][f"{what}_ratio"] for _, _, rows, arm in arms]
            names, colours = [name for name, *_ in arms], [colour for _, colour, *_ in arms]
            axis.barh(names, [min(value, 1.5) for value in values], color=colours)
            for place, value in enumerate(values):
                cut = " →" if value > 1.5 else ""
                axis.text(0.03, place, f"{value:.2f}{cut}", color="#ffffff", va="center", fontsize=9, weight="bold")
            axis.axvline(1, color=INK, linewidth=1)
            axis.set(title=f"{kind}: {what}", xlim=(0, 1.55))
            axis.set_xticks([0, 0.5, 1, 1.5])
            _plain(axis)
    axes[0][0].invert_yaxis()
    return figure


def _ratios(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["arm"], row["type"]): row for row in json.loads((RESULTS / name).read_text())["rows"]}


def _plain(axis: Axes) -> None:
    """Without a frame, with faint lines behind."""
    axis.set_facecolor(PAPER)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
    axis.title.set_fontsize(10)


FIGURES: dict[str, Callable[[], Figure]] = {"line": line, "house": house, "quality": quality, "speed": speed}


def main(output: Path = ROOT / "docs" / "figures") -> None:
    """Write each figure as SVG; equal rows give equal files.

    Args:
        output: The folder.
    """
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {"svg.hashsalt": "qat", "font.size": 9} | dict.fromkeys(inked, INK)
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = output / f"{name}.svg"
        with matplotlib.rc_context(settings):
            draw().savefig(path, metadata={"Date": None})
        text = path.read_text()
        for colour, variable in ((INK, "ink"), (PAPER, "paper"), (FAINT, "faint")):
            text = text.replace(colour, f"var(--{variable})")
        head, tag, rest = text.partition("<defs>")
        lines = f"{head}{SCHEME}\n {tag}{rest}".splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
