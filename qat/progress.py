"""A bar that counts what is worked on, for the verbs that may take minutes; in a file or a pipe, lines now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

__all__ = ["counted"]

Item = TypeVar("Item")

_EVERY = 30.0
"""Seconds between two lines where nobody watches."""


def counted(items: Iterable[Item], description: str, shown: bool, total: int | None = None) -> Iterator[Item]:
    """Yield ``items``; if ``shown``, a bar on the standard error stream counts them, or a line every half a minute.

    How many there will be is ``total``, or what the items know of themselves.

    >>> list(counted([1, 2], "counting", shown=False))
    [1, 2]
    """
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    said_at = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task(description, total=total or length_hint(items) or None)
        for done, item in enumerate(items, 1):
            yield item
            bar.advance(task)
            if bar.disable and time.monotonic() - said_at >= _EVERY:
                said_at = time.monotonic()
                print(f"{description}: {done} of {bar.tasks[0].total or '?'}", file=sys.stderr, flush=True)
