r"""The table and the plot of `benchmark_quality`'s rows: R* of every arm, with standard errors over paired seeds.

R* compares runs of one seed with each other: the fine-tuned model, its post-training quantization, the trained one. So
the order of the batches, which moves all three, cancels. It counts from the best of min-max, clip and HQQ. The column
"from best PTQ" counts from the best post-training quantization of all, with data too. An arm's rate is the best one on
seed 0. ``--ablation-at`` shows what each part gives::

    python -m scripts.show_quality docs/results/quality_starts_h200.jsonl --types int2 int4 \
        --plot docs/results/quality.png
    python -m scripts.show_quality docs/results/quality_starts_h200.jsonl --types int2 int4 --ablation-at 80
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tyro

__all__ = ["HELD_OUT", "PTQ", "Subject", "ablation", "draw", "subject_of", "table"]

PTQ = ("PTQ minmax", "PTQ clip", "PTQ hqq", "PTQ output", "PTQ gptq", "PTQ best")
BASES = PTQ[:3]  # the best of which R* is measured from
ABLATION = (
    ("loss, FT, cosine", "straight-through, kl", "straight-through"),
    ("loss, FT, cosine", "quanto, kl", "quanto"),
    ("loss, FT, cosine", "torchao, kl", "torchao"),
    ("quantizer", "learned", "straight-through, kl"),
    ("hidden states", "learned, hidden", "learned"),
    ("quantizer, hidden", "learned, hidden", "straight-through, kl"),
    ("hidden states", "best, hidden x 3", "best"),
    ("hidden states", "best, hidden x 10", "best"),
    ("start", "output", "learned, hidden"),
    ("start", "gptq", "learned, hidden"),
    ("start", "best", "learned, hidden"),
    ("quantizer", "dual", "learned, hidden"),
    ("quantizer", "clipping", "learned, hidden"),
    ("quantizer", "seq", "learned, hidden"),
    ("gradient", "best, stable", "best"),
    ("gradient", "best, quest", "best"),
    ("gradient", "best, hidden x 10, stable", "best, hidden x 10"),
    ("rate of scales", "best, scales x 1", "best"),
    ("rate of scales", "best, scales x 0.1", "best"),
    ("teacher", "best, kl alone", "best, labels"),
    ("hidden states", "best", "best, kl alone"),
    ("loss", "best, reverse kl", "best"),
    ("loss", "best, both kl", "best"),
    ("begin with FT", "best", "best, float start"),
    ("schedule", "best", "best, constant rate"),
    ("schedule", "best, linear", "best"),
    ("schedule", "best, cage", "best"),
    ("schedule", "best, delayed", "best"),
    ("schedule", "best, int4 first", "best"),
    ("schedule", "best, held", "best"),
    ("schedule", "best, averaged", "best"),
    ("block-wise", "reconstructed 100", "output"),
    ("block-wise", "reconstructed 400", "output"),
    ("block-wise", "clip, reconstructed 400", "learned, hidden"),
)
"""A part, an arm that has it, and the arm that is the same but for it."""
Row = dict[str, Any]
Setting = tuple[str, str | None, int]
HELD_OUT = 512


class Subject(NamedTuple):
    """What rows are of. Rows of two subjects cannot be compared."""

    model: str
    held_out: int
    """Blocks to judge by."""


def subject_of(row: Row) -> Subject:
    """Of a row; before rows said it, they were of the language model."""
    return Subject(row.get("model", "language"), row.get("held_out", HELD_OUT))


class Arm:
    """The runs of one arm at its best rate, each with the fine-tuned and the quantized model of its seed."""

    def __init__(self, rows: list[Row], floats: dict[int, Row], base: dict[int, Row], best: dict[int, Row]) -> None:
        first = [row for row in rows if row["seed"] == 0]
        self.rate = min(first, key=lambda row: row["loss"])["rate"] if first else 0.0
        self.rows = {row["seed"]: row for row in rows if row["rate"] == self.rate}
        seeds = sorted(self.rows.keys() & floats.keys() & base.keys() & best.keys())
        self.above = [self.rows[n]["loss"] - floats[n]["loss"] for n in seeds]
        self.by_seed = {n: self._share(n, base, floats) for n in seeds}
        self.closed = list(self.by_seed.values())
        self.closed_from_best = [self._share(n, best, floats) for n in seeds]

    def _share(self, seed: int, start: dict[int, Row], floats: dict[int, Row]) -> float:
        """Of the loss between ``start`` and the fine-tuned model, what this arm wins back."""
        cost = start[seed]["loss"] - floats[seed]["loss"]
        return float((start[seed]["loss"] - self.rows[seed]["loss"]) / cost)

    def mean(self, name: str) -> float:
        """Over the seeds; 0 where rows do not have it."""
        return float(statistics.mean(row.get(name, 0.0) for row in self.rows.values()))


def arms_of(rows: Iterable[Row]) -> dict[Setting, dict[str, Arm]]:
    """By type and number of steps, post-training quantization first.

    Raises:
        ValueError: the rows are of several models, or were judged by several numbers of blocks.
    """
    rows = list(rows)
    if len(subjects := {subject_of(row) for row in rows}) > 1:
        shown = ", ".join(f"{model} by {held_out} held-out blocks" for model, held_out in sorted(subjects))
        raise ValueError(f"rows: must be of one model, got {shown}: choose with --model and --held-out")
    found: dict[Setting, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    tuned: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if "error" in row:
            continue
        if row["arm"] == "FT":
            tuned[row["steps"]].append(row)
        else:
            found[row["weights"], row["activations"], row["steps"]][row["arm"]].append(row)
    result: dict[Setting, dict[str, Arm]] = {}
    for setting, by_arm in found.items():
        if not any(by_arm.get(name) for name in BASES) or setting[2] not in tuned:
            continue
        base, best = _best_of(by_arm, BASES), _best_of(by_arm, PTQ)
        floats = Arm(tuned[setting[2]], {}, {}, {}).rows
        order = sorted(by_arm, key=lambda name: PTQ.index(name) if name in PTQ else len(PTQ))
        result[setting] = {name: Arm(by_arm[name], floats, base, best) for name in order if by_arm[name]}
    return dict(sorted(result.items(), key=lambda item: (item[0][0], item[0][1] or "", item[0][2])))


def _best_of(by_arm: dict[str, list[Row]], names: Iterable[str]) -> dict[int, Row]:
    """Of these post-training quantizations the one with the smallest mean loss, by seed."""
    found = [{row["seed"]: row for row in by_arm[name]} for name in names if by_arm.get(name)]
    return min(found, key=lambda of: statistics.mean(row["loss"] for row in of.values()))


def table(rows: Iterable[Row]) -> str:
    """Markdown: mean and standard error over the seeds of R* and of the distance from FT."""
    lines = [
        "| type | steps | arm | rate | seeds | loss | R* | from best PTQ | above FT | KL | changed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (weights, activations, steps), arms in arms_of(rows).items():
        for name, arm in arms.items():
            if not arm.closed:
                continue
            cells = [
                "_".join(filter(None, (weights, activations))),
                str(steps),
                name,
                f"{arm.rate:g}",
                str(len(arm.closed)),
                f"{arm.mean('loss'):.4f}",
                _mean(arm.closed, "{:.3f}"),
                _mean(arm.closed_from_best, "{:.3f}"),
                _mean(arm.above, "{:+.4f}"),
                f"{arm.mean('kl'):.4f}",
                f"{arm.mean('changed'):.3%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation(rows: Iterable[Row], steps: int) -> str:
    """Markdown: R* of an arm, and what its part adds to that of the arm without, over the seeds that both have."""
    settings = {
        "_".join(filter(None, setting[:2])): arms for setting, arms in arms_of(rows).items() if setting[2] == steps
    }
    lines = [f"| part | arm | instead of | {' | '.join(settings)} |", "|---" * (3 + len(settings)) + "|"]
    for part, name, other in ABLATION:
        cells = []
        for arms in settings.values():
            arm, without = arms.get(name), arms.get(other)
            seeds = sorted(arm.by_seed.keys() & without.by_seed.keys()) if arm and without else []
            if arm and without and seeds:
                gains = [arm.by_seed[n] - without.by_seed[n] for n in seeds]
                cells.append(f"{statistics.mean(arm.closed):.3f}, {_mean(gains, '{:+.3f}')}")
            else:
                cells.append("-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {part} | {name} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Iterable[Row], path: Path) -> None:
    """A plot of R* against steps, one panel a type; bars are standard errors.

    Arms of one length are left out, and of post-training quantization all but the best.
    """
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for (weights, activations, steps), arms in arms_of(rows).items():
        for name, arm in arms.items():
            if arm.closed:
                curves["_".join(filter(None, (weights, activations)))][name][steps] = arm.closed
    if not curves:
        raise ValueError(f"rows: hold no arm with a fine-tuned and a quantized model, so {path} cannot be drawn")
    figure = Figure(figsize=(5.5 * len(curves), 5), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (kind, by_arm) in zip(axes, curves.items(), strict=True):
        axis.set(title=kind, xlabel="steps", ylabel="R*", xscale="log", ylim=(0, 1))
        for name, points in by_arm.items():
            if len(points) < 2 or name in PTQ[:-1]:
                continue
            lengths = sorted(points)
            means = [statistics.mean(points[n]) for n in lengths]
            bars = [_error(points[n]) for n in lengths]
            style = "--" if name in PTQ else "-"
            axis.errorbar(lengths, means, bars, label=name, marker="o", markersize=3, linestyle=style, capsize=2)
        ticks = sorted({n for points in by_arm.values() for n in points})
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _mean(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(_error(values)).lstrip('+')}"


def main(
    rows: Path,
    /,
    types: tuple[str, ...] = (),
    plot: Path | None = None,
    model: str | None = None,
    held_out: int | None = None,
    ablation_at: int | None = None,
) -> None:
    """Print the table of a file of rows.

    Args:
        rows: A file of lines of JSON, as `benchmark_quality` writes it.
        types: Of weights alone, such as int4; default all, those with activations too.
        plot: A PNG of R* against steps.
        ablation_at: A number of steps: print what each part gives after these, in place of the table.
        model: Of these rows, where the file holds several models.
        held_out: Rows judged by as many blocks, where the file holds several numbers.
    """
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    found = [r for r in found if model in (None, subject_of(r).model) and held_out in (None, subject_of(r).held_out)]
    if types:
        found = [r for r in found if r["arm"] == "FT" or (r["weights"] in types and r["activations"] is None)]
    print(table(found) if ablation_at is None else ablation(found, ablation_at))
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    tyro.cli(main)
