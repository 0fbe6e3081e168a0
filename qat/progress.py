"""A bar that counts what is worked on, for the verbs that may take minutes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

__all__ = ["counted"]

Item = TypeVar("Item")


def counted(items: Iterable[Item], description: str, shown: bool) -> Iterator[Item]:
    """Yield ``items``; if ``shown``, a bar on the standard error stream counts them.

    How many there will be is said where the items know it. In a file or a pipe the bar is one line, at the end.

    >>> list(counted([1, 2], "counting", shown=False))
    [1, 2]
    """
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=length_hint(items) or None)
        for item in items:
            yield item
            bar.advance(task)
