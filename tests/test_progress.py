"""Items pass through unchanged, and a bar counts them where it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest

from qat.progress import counted


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rich take the standard error stream for a terminal."""
    for name, value in {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "120", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)


def some() -> Iterator[int]:
    yield from range(3)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("items", "total", "said"),
    [([0, 1, 2], None, "3/3"), (some(), None, "3/?"), (some(), 3, "3/3")],
    ids=["list", "generator", "generator with a total"],
)
def test_a_bar_counts_what_passes(
    items: Iterable[int], total: int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted(items, "at work", True, total)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "at work" in err
    assert said in err


@pytest.mark.parametrize("shown", [False, True])
def test_quick_work_is_shown_on_a_terminal_alone(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(some(), "at work", shown)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 1000, 20))
    monkeypatch.setattr("qat.progress.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert list(counted([5, 6, 7], "at work", True)) == [5, 6, 7]
    assert list(counted(some(), "again", True)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "at work: 2 of 3\nagain: 2 of ?\n")


@pytest.mark.usefixtures("terminal")
def test_an_error_ends_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        list(map((1).__floordiv__, counted([1, 0], "at work", shown=True)))
    assert "1/2" in capsys.readouterr().err
