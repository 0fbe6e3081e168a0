"""What is shown at the terminal: tables, one-line errors, and nothing from other libraries.

Commands and recipes share this: a function for each kind of result that makes a rich table of it, `run_command`, which
turns a user's mistake into one line and an exit code, and `quiet_libraries`, which silences, by name, the messages of
other libraries that say nothing about the user's run. A library must never do the last two; a program's edge may.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
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
    "stage",
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
    """Write the rows of a result table as JSON, for scripts that compare runs.

    A metric that is no finite number, such as the loss of a timestep bin that no image fell into, is written as null:
    JSON has no such numbers.
    """
    written = [asdict(row) for row in rows]
    for row in written:
        row["metrics"] = {name: value if isfinite(value) else None for name, value in row["metrics"].items()}
    path.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")


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


class _Output(Console):
    """The standard output."""

    def on_broken_pipe(self) -> None:
        """Leave it to `run_command` to end the program when the reader has left."""
        raise BrokenPipeError


def print_table(table: Table) -> None:
    """Print to the standard output, as wide as the terminal, or wide enough for a file."""
    console = _Output()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = _Output(width=WIDTH_OF_FILES)
    console.print(table)


class _ProgressLines(Progress):
    """Progress where nobody watches: a line when a stage begins, and one with its time when it ends."""

    def start(self) -> None:
        """Draw nothing."""

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        """Begin a stage."""
        self._say(f"{description} ...")
        return super().add_task(description, *args, **options)

    def stop(self) -> None:
        """End all stages: finished ones, and those that an error stopped."""
        for task in self.tasks:
            count = f"{task.completed:.0f} of {task.total:.0f}" if task.total is not None else f"{task.completed:.0f}"
            took = _duration(task.elapsed or 0)
            note = f", {task.fields['note']}" if task.fields.get("note") else ""
            ended = f"{count} in {took}" if task.finished else f"stopped at {count} after {took}"
            self._say(f"{task.description}: {ended}{note}")
            self.remove_task(task.id)

    def _say(self, line: str) -> None:
        if not self.disable:
            print(line, file=sys.stderr, flush=True)


def progress_bar() -> Progress:
    """Make a progress display on the standard error stream; a task may have a field ``note``, shown at its end.

    In a file or a pipe a task is two lines, one when it begins and one when the display stops.
    """
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    display = Progress if console.is_interactive else _ProgressLines
    return display(*columns, TextColumn("{task.fields[note]}"), console=console)


def track(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """Yield ``items`` while a progress bar counts them."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)  # rich's own `track` counts in a thread that ends where nothing is drawn


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Frame work that another library shows on a terminal: elsewhere, by a line when it begins and one when it ends."""
    if Console(stderr=True).is_interactive:
        yield
        return
    start = time.monotonic()
    print(f"{description} ...", file=sys.stderr, flush=True)
    yield
    print(f"{description}: done in {_duration(time.monotonic() - start)}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def run_command(main: Callable[[], object]) -> NoReturn:
    """Run a program and exit: 0 when it returns, 1 when a verification failed, 2 on a user's mistake.

    Both failures are told on the standard error stream, without a traceback. Any other exception is a fault of the
    program and keeps its traceback. When whoever read the output has left (``qat verify DIR --json | head``), the
    program ends with 141, as one that the signal ends, and says nothing.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a reader that has left is noticed here rather than when Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        sys.exit(128 + signal.SIGPIPE)
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
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    for name in ("transformers", "diffusers"):  # both draw bars while they read weights
        if find_spec(name) is not None:
            import_module(f"{name}.utils.logging").disable_progress_bar()
    if downloads:  # which transformers hides too, but which can take minutes
        enable_progress_bars()
