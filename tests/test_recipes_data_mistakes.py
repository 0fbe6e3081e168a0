"""Every third mistake of `scripts.bad_data`, which runs all of them, each in a process of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts._bad_data_cases import CASES, Case
from scripts.bad_data import GOOD, judged


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A named pipe would be waited for without an end."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", [case for case in CASES if not case.as_nobody][::3], ids=str)
def test_a_mistake_is_one_error_that_names_it(case: Case, tmp_path: Path) -> None:
    outcome = judged(case, tmp_path)
    assert outcome.startswith(f"{GOOD}:"), outcome


def test_names_of_cases_are_unique() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
