"""What is shown at the terminal: tables, one-line errors, and nothing from other libraries.

Commands and recipes share this: a function for each kind of result that makes a rich table of it, `run_command`, which
turns a user's mistake into one line and an exit code, and `quiet_libraries`, which silences, by name, the messages of
other libraries that say nothing about the user's run. A library must never do the last two; a program's edge may.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qat.errors import QatError, VerifyError

if TYPE_CHECKING:
    from qat.inspection import InspectReport
    from qat.verification import VerifyReport

__all__ = [
    "ResultRow",
    "inspect_table",
    "inspect_totals",
    "print_table",
    "progress_bar",
    "quiet_libraries",
    "results_table",
    "run_command",
    "show_results",
    "show_size",
    "track",
    "verify_table",
    "write_results",
]

Item = TypeVar("Item")

_UNHELPFUL_WARNINGS = (
    "You defined a `validation_step` but have no `val_dataloader`",  # a task module can validate, a recipe need not
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"Checkpoint directory .* exists and is not empty",  # a second run of the same recipe
    r"The '.*_dataloader' does not have many workers",  # token blocks in memory need none
    "Be aware that when using `ckpt_path`, callbacks",  # a run resumed with another interval of checkpoints
    "The dirpath has changed from",  # a run resumed for another output
)
WIDTH_OF_FILES = 160  # columns where the output is no terminal, which has no width of its own


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


def results_table(rows: Sequence[ResultRow], title: str | None = None) -> Table:
    """Make the table that a recipe ends with, one line a model."""
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    names = list(rows[0].metrics) if rows else []
    for name in [*names, "on disk", "steps", "learning rate"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        values = [f"{row.metrics[name]:.4f}" for name in names]
        rate = "-" if row.learning_rate is None else f"{row.learning_rate:.3g}"
        table.add_row(row.name, *values, show_size(row.bytes_on_disk), str(row.steps), rate)
    return table


def write_results(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write the rows of a result table as JSON, for scripts that compare runs."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def show_results(rows: Sequence[ResultRow], path: Path) -> None:
    """Print the result table, and write it as JSON."""
    print_table(results_table(rows))
    write_results(path, rows)


def inspect_table(report: InspectReport) -> Table:
    """Make the table of what will be quantized, one line a linear layer, with the totals below."""
    table = Table(title=f"{report.spec.weights} for {report.target}", title_justify="left", caption_justify="left")
    for name, justify in (("layer", "left"), ("shape", "right"), ("weights", "left"), ("activations", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("group", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reason")
    for layer in report.layers:
        quantized = layer.weights is not None
        table.add_row(
            Text(layer.name),
            f"{layer.shape[0]} x {layer.shape[1]}",
            layer.weights or "float",
            layer.activations or "-",
            str(layer.group_size or "row") if quantized else "-",
            show_size(layer.bytes_before),
            show_size(layer.bytes_after),
            Text(layer.reason),
            style=None if quantized else "dim",
        )
    table.caption = Text(inspect_totals(report))
    return table


def inspect_totals(report: InspectReport) -> str:
    """Say in one line how much will be quantized, and below it the inspection's notes, a line each."""
    totals = (
        f"{report.quantized_share:.1%} of {report.parameters:,} parameters are quantized; linear weights "
        f"{show_size(report.bytes_before)} in {report.spec.dtype} -> {show_size(report.bytes_after)} as exported"
    )
    return "\n".join([totals, *report.notes])


def verify_table(report: VerifyReport) -> Table:
    """Make the table of what verification asked, one line a check."""
    verdict = "verified" if report.ok else "NOT what was frozen"
    table = Table(title=Text(f"{report.directory}, for {report.target}: {verdict}"), title_justify="left")
    for name in ("check", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("detail")
    for check in report.checks:
        result = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
        table.add_row(check.name, result, Text(check.detail))
    return table


def show_size(count: int) -> str:
    """Show a number of bytes.

    >>> show_size(11_534_336)
    '11.00 MiB'
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def print_table(table: Table) -> None:
    """Print to the standard output, as wide as the terminal, or wide enough for a file."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH_OF_FILES)
    console.print(table)


def progress_bar() -> Progress:
    """Make a progress display on the standard error stream; a task may have a field ``note``, shown at its end."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))


def track(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """Yield ``items`` while a progress bar counts them."""
    with progress_bar() as bar:
        yield from bar.track(items, total=total, task_id=bar.add_task(description, total=total, note=""))


def run_command(main: Callable[[], object]) -> NoReturn:
    """Run a program and exit: 0 when it returns, 1 when a verification failed, 2 on a user's mistake.

    Both failures are told on the standard error stream, without a traceback. Any other exception is a fault of the
    program and keeps its traceback.
    """
    try:
        main()
    except VerifyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except QatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def quiet_libraries() -> None:
    """Silence, in this process, what other libraries say about themselves; their errors still come through."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "datasets", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer would warn in every forked process
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
