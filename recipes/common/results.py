"""The table that a recipe ends with, at the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from rich.table import Table

from qat.report import print_table, show_size

__all__ = ["ResultRow", "show_results"]


@dataclass(frozen=True)
class ResultRow:
    """One line of a recipe's result table."""

    name: str
    """What was judged."""
    metrics: dict[str, float]
    """Metric name to value; the same names in every row."""
    bytes_on_disk: int
    """Size of the weight files."""
    steps: int
    """Optimizer steps of training on top of the model that the recipe started from."""
    learning_rate: float | None = None
    """The peak learning rate of those steps; None where there were none."""


def show_results(rows: Sequence[ResultRow], path: Path, metrics: Sequence[str]) -> None:
    """Print a table, one line a row, and write the rows as JSON, for scripts that compare runs.

    A metric that is no finite number, such as the loss of a timestep bin that no image fell into, is written as null:
    JSON has no such numbers.

    Args:
        rows: one for each model.
        path: the JSON file.
        metrics: names of those to print; all are written.
    """
    written = [asdict(row) for row in rows]
    for row in written:
        row["metrics"] = {name: value if isfinite(value) else None for name, value in row["metrics"].items()}
    path.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")

    table = Table()
    table.add_column("model", no_wrap=True)
    for name in [*metrics, "on disk", "steps", "learning rate"]:
        table.add_column(name, justify="right", no_wrap=True)
    for shown in rows:
        values = [f"{shown.metrics[name]:.4f}" for name in metrics]
        rate = "-" if shown.learning_rate is None else f"{shown.learning_rate:.3g}"
        table.add_row(shown.name, *values, show_size(shown.bytes_on_disk), str(shown.steps), rate)
    print_table(table)
