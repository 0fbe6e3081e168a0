"""Long work in threads, and its bar."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from qat.errors import QatError
from qat.jobs import begun, in_threads


def test_results_come_in_order_though_calls_end_in_another() -> None:
    second_ended = threading.Event()

    def first() -> int:
        assert second_ended.wait(5)
        return 1

    def second() -> int:
        second_ended.set()
        return 2

    assert list(in_threads([first, second], threads=3)) == [1, 2]


def test_a_call_that_has_begun_is_asked_for_its_result_and_its_error() -> None:
    go_on = threading.Event()
    waiting, failing = begun(lambda: go_on.wait(5)), begun(lambda: 1 // 0)
    go_on.set()
    assert waiting()
    with pytest.raises(ZeroDivisionError):
        failing()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_no_more_calls_are_begun_than_threads(threads: int) -> None:
    prepared, given = 0, 0
    most = 0

    def calls() -> Iterator[Callable[[], int]]:
        nonlocal prepared, most
        for number in range(20):
            prepared += 1
            most = max(most, prepared - given)
            yield lambda number=number: number  # type: ignore[misc]

    for _ in in_threads(calls(), threads):
        given += 1
    assert given == prepared == 20
    assert most == threads


def test_an_error_in_a_thread_is_the_callers_and_ends_the_work() -> None:
    prepared: list[int] = []

    def calls() -> Iterator[Callable[[], int]]:
        for number in range(20):
            prepared.append(number)
            yield lambda number=number: fails() if number == 3 else number  # type: ignore[misc]

    def fails() -> int:
        raise QatError("layer 3: a fault")

    with pytest.raises(QatError, match=r"^layer 3: a fault$"):
        list(in_threads(calls(), threads=3))
    assert len(prepared) <= 3 + 3


def test_an_error_while_a_call_is_prepared_is_the_callers() -> None:
    ended = threading.Event()

    def calls() -> Iterator[Callable[[], None]]:
        yield ended.set
        raise QatError("no second call")

    with pytest.raises(QatError, match="no second call"):
        list(in_threads(calls(), threads=2))
    assert ended.is_set()
