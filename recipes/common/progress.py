"""What a run shows on the standard error stream while it works: bars on a terminal, lines in a file."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qat import report

_EVERY = 60.0
"""Seconds between two lines about one task where nobody watches."""

__all__ = ["progress_bar", "quiet_libraries", "stage", "track"]

Item = TypeVar("Item")

_UNHELPFUL_WARNINGS = (
    "You defined a `validation_step` but have no `val_dataloader`",  # a task module can validate, a recipe need not
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"Checkpoint directory .* exists and is not empty",  # a second run of the same recipe
    r"The '.*_dataloader' does not have many workers",  # token blocks in memory need none
    "Be aware that when using `ckpt_path`, callbacks",  # a run resumed with another interval of checkpoints
    "The dirpath has changed from",  # a run resumed for another output
)


class _ProgressLines(Progress):
    """Progress where nobody watches: a line when a task begins, one a minute, and one with its time when it ends."""

    _said_at = 0.0

    def start(self) -> None:
        """Draw nothing."""

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        """Begin a stage."""
        self._say(f"{description} ...")
        return super().add_task(description, *args, **options)

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Note what is done, and say it once in a while."""
        super().update(task_id, **fields)
        self._say_count(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Note one more item, as `update` does."""
        super().advance(task_id, advance)
        self._say_count(task_id)

    def _say_count(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        if time.monotonic() - self._said_at >= _EVERY and not task.finished:
            self._say(f"{task.description}: {_count(task)} after {_duration(task.elapsed or 0)}{_note(task)}")

    def stop(self) -> None:
        """End all stages: finished ones, and those that an error stopped."""
        for task in self.tasks:
            count, took = _count(task), _duration(task.elapsed or 0)
            ended = f"{count} in {took}" if task.finished else f"stopped at {count} after {took}"
            self._say(f"{task.description}: {ended}{_note(task)}")
            self.remove_task(task.id)

    def _say(self, line: str) -> None:
        self._said_at = time.monotonic()
        if not self.disable:
            print(line, file=sys.stderr, flush=True)


def _count(task: Task) -> str:
    return f"{task.completed:.0f}" if task.total is None else f"{task.completed:.0f} of {task.total:.0f}"


def _note(task: Task) -> str:
    return f", {task.fields['note']}" if task.fields.get("note") else ""


def progress_bar() -> Progress:
    """Make a progress display on the standard error stream; a task may have a field ``note``, shown at its end.

    In a file or a pipe a task is a line when it begins, one a minute, and one when the display stops.
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
    """Frame work that has no count: where nobody watches, by a line when it begins and one when it ends.

    A terminal shows nothing: what takes long there has a bar of another library.
    """
    if Console(stderr=True).is_interactive:
        yield
        return
    start = time.monotonic()
    print(f"{description} ...", file=sys.stderr, flush=True)
    yield
    print(f"{description}: done in {_duration(time.monotonic() - start)}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def quiet_libraries() -> None:
    """Silence, in this process, what other libraries say about themselves and about training with Lightning."""
    report.quiet_libraries()
    for name in ("lightning.pytorch", "lightning.fabric", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
