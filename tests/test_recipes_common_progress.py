from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace

import pytest

from recipes.common import progress
from recipes.common.progress import progress_bar, quiet_libraries, stage, track


def test_tracking_changes_nothing() -> None:
    assert list(track([3, 1, 2], "counting", 3)) == [3, 1, 2]


def test_progress_in_a_file_is_two_lines_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    for item in track(range(100), "counting", 100):
        if item == 0:
            assert capsys.readouterr().err == "counting ...\n"
    assert capsys.readouterr().err == "counting: 100 of 100 in 0:00:00\n"


def test_progress_in_a_file_says_where_a_stage_stopped_and_its_last_note(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar()
    bar.start()
    bar.update(bar.add_task("training", total=80, note=""), completed=17, note="loss 1.234")
    for _ in range(2):  # a second time when a later callback fails at the end of a fit
        bar.stop()
    assert capsys.readouterr().err == "training ...\ntraining: stopped at 17 of 80 after 0:00:00, loss 1.234\n"


def test_a_disabled_display_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar()
    bar.disable = True
    bar.start()
    bar.add_task("training", total=80, note="")
    bar.stop()
    assert capsys.readouterr().err == ""


def test_a_stage_is_framed_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with stage("tokenizing"):
        assert capsys.readouterr().err == "tokenizing ...\n"
    assert capsys.readouterr().err == "tokenizing: done in 0:00:00\n"


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(track([3, 1, 2], "counting", 3)) == [3, 1, 2]
    assert "━" in capsys.readouterr().err
    with stage("tokenizing"):
        assert capsys.readouterr().err == ""


def test_only_named_warnings_are_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_libraries()
        warnings.warn("Checkpoint directory x exists and is not empty.", stacklevel=1)
        with pytest.raises(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)
    assert logging.getLogger("qat").level == logging.NOTSET


def test_progress_in_a_file_says_a_count_once_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    bar = progress_bar()
    task = bar.add_task("training", total=80, note="")
    for step in range(1, 7):
        now += 25.0
        bar.update(task, completed=step, note=f"loss {step}.0")
    for _ in range(6):
        now += 25.0
        bar.advance(task)
    assert [line.split(" after")[0] for line in capsys.readouterr().err.splitlines()] == [
        "training ...",
        "training: 3 of 80",
        "training: 6 of 80",
        "training: 9 of 80",
        "training: 12 of 80",
    ]
