"""A bar that counts what is worked on, for the verbs that may take minutes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

__all__ = ["counted"]

Item = TypeVar("Item")


def counted(items: Iterable[Item], description: str, shown: bool, total: int | None = None) -> Iterator[Item]:
    """Yield ``items``; if ``shown``, a bar on the standard error stream counts them, where that is a terminal.

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
    with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task(description, total=total or length_hint(items) or None)
        for item in items:
            yield item
            bar.advance(task)
