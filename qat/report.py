"""What is shown at the terminal: tables, one-line errors, and nothing from other libraries.

Commands and recipes share this: a function for each kind of report that makes a rich table of it, `run_command`, which
turns a user's mistake into one line and an exit code, and `quiet_libraries`, which silences, by name, the messages of
other libraries that say nothing about the user's run. A library must never do the last two; a program's edge may.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat.errors import QatError, VerifyError

if TYPE_CHECKING:
    from qat.inspection import InspectReport
    from qat.verification import VerifyReport

__all__ = [
    "inspect_table",
    "inspect_totals",
    "print_table",
    "quiet_libraries",
    "run_command",
    "show_size",
    "verify_table",
]

WIDTH_OF_FILES = 160  # columns where the output is no terminal, which has no width of its own


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
    for name in ("transformers", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer would warn in every forked process
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

    downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    for name in ("transformers", "diffusers"):  # both draw bars while they read weights
        if find_spec(name) is not None:
            import_module(f"{name}.utils.logging").disable_progress_bar()
    if downloads:  # which transformers hides too, but which can take minutes
        enable_progress_bars()
