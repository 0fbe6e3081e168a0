"""Long work on a model's layers, beside the caller in a few threads.

Hashing lets go of Python's lock, so that threads hash while the caller computes the next layer. A model is not held
twice for that: each thread holds one layer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["begun", "in_threads"]

Item = TypeVar("Item")

_THREADS = min(5, os.cpu_count() or 1)


def begun(call: Callable[[], Item]) -> Callable[[], Item]:
    """Begin a call in a thread of its own; what is returned waits for its result, or raises what it raised.

    >>> begun(lambda: 3)()
    3
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="qat")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future.result


def in_threads(calls: Iterable[Callable[[], Item]], threads: int = _THREADS) -> Iterator[Item]:
    """The results of ``calls``, in their order; each call is made in a thread while the next ones are prepared.

    ``threads`` counts the caller's too: at most ``threads - 1`` calls are unfinished while the next one is prepared.
    What a call, or the preparation of one, raises arrives here; no further call is prepared then.

    >>> list(in_threads(lambda n=n: n * n for n in range(4)))
    [0, 1, 4, 9]
    """
    begun: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="qat") as pool:
        for future in map(pool.submit, calls):  # which keeps no call, and so no layer, alive
            begun.append(future)
            if len(begun) == threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
