"""Items pass through unchanged, and a bar counts them where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qat.progress import counted


def some() -> Iterator[int]:
    yield from range(3)


@pytest.mark.parametrize(("items", "said"), [([0, 1, 2], "3/3"), (some(), "3/?")], ids=["list", "generator"])
def test_a_bar_counts_what_passes(items: object, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(items, "at work", shown=True)) == [0, 1, 2]  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("at work")
    assert said in err


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted(some(), "at work", shown=False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        list(map((1).__floordiv__, counted([1, 0], "at work", shown=True)))
    assert "1/2" in capsys.readouterr().err
