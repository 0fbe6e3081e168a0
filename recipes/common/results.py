"""What a recipe shows: the totals of an inspection, and the table that it ends with, which is written as JSON too."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import qat
from qat.files.manifest import CARD_NAME
from qat.files.whole import whole_file
from qat.run_report import write_report
from qat.run_report.page import show_size
from recipes.common.gate import Comparison

if TYPE_CHECKING:
    from recipes.common.run import Run

__all__ = ["ResultRow", "inspect_totals", "show_end", "show_results"]


logger = logging.getLogger("qat")
WIDTH_OF_FILES = 160  # columns where the output is no terminal, which has no width of its own


@dataclass(frozen=True)
class ResultRow:
    """One line of a recipe's result table."""

    name: str
    """What was judged."""
    metrics: dict[str, float]
    """Metric name to value; the same names in every row."""
    bytes_on_disk: int
    """Size of the exported weight files. Of a float model: what its parameters take in the serving dtype."""
    steps: int
    """Optimizer steps of training on top of the model that the recipe started from."""
    learning_rate: float | None = None
    """The peak learning rate of those steps; None where there were none."""
    comparison: Comparison | None = None
    """How its loss differs from another row's, where they are compared."""


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
    with whole_file(path) as made:
        made.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")

    table = Table()
    table.add_column("model", no_wrap=True)
    for name in [*metrics, "size to serve", "steps", "learning rate"]:
        table.add_column(name, justify="right", no_wrap=True)
    for shown in rows:
        values = [f"{shown.metrics[name]:.4f}" for name in metrics]
        rate = "-" if shown.learning_rate is None else f"{shown.learning_rate:.3g}"
        table.add_row(shown.name, *values, show_size(shown.bytes_on_disk), str(shown.steps), rate)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH_OF_FILES)
    with console.capture() as shown_table:
        console.print(table)
    print(shown_table.get(), end="")  # which raises where rich would end the program: when the reader has left


def show_end(run: Run, verified: qat.VerifyReport) -> None:
    """Say what a run leaves, where it is, and how the exported model is loaded.

    Args:
        run: of the recipe, after `show_results`.
        verified: what the verification of its export found.
    """
    checks = len(verified.checks)
    print(f"exported model: {run.output} (reloaded in a fresh process, compared and found equal: {checks} checks)")
    print(f"load it: qat.load({str(run.output)!r}); its {CARD_NAME} shows other loaders")
    print(f"results: {run.beside('results.json')}; checkpoints: {run.beside('checkpoints')}")
    if run.report and find_spec("matplotlib") is not None:
        try:
            print(f"report: {write_report(run.output, run.beside('report.html'), verified=verified)}")
        except qat.QatError as error:  # all that counts is done
            logger.warning("no report was written: %s", error)


def inspect_totals(report: qat.InspectReport) -> str:
    """Say in one line how much will be quantized, and below it the inspection's notes, a line each."""
    totals = (
        f"{report.quantized_share:.1%} of {report.parameters:,} parameters are quantized; linear weights "
        f"{show_size(report.bytes_before)} in {report.spec.dtype} -> {show_size(report.bytes_after)} as exported"
    )
    return "\n".join([totals, *report.notes])
