from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table
from torch import nn

from qat.errors import SpecError, VerifyError
from qat.inspection import inspect
from qat.report import (
    ResultRow,
    inspect_totals,
    print_table,
    progress_bar,
    quiet_libraries,
    results_table,
    run_command,
    show_results,
    show_size,
    stage,
    track,
    verify_table,
    write_results,
)
from qat.spec import QuantSpec


def shown(table: Table, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (2**31, "2.00 GiB")],
    ids=str,
)
def test_sizes(count: int, expected: str) -> None:
    assert show_size(count) == expected


def test_the_result_table_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ResultRow("float", {"loss": 2.0}, 2**20, 0), ResultRow("trained", {"loss": 1.98769}, 2**19, 80, 2e-4)]
    assert shown(results_table(rows), capsys) == [
        ["float", "2.0000", "1.00 MiB", "0", "-"],
        ["trained", "1.9877", "512.00 KiB", "80", "0.0002"],
    ]


def test_results_are_written_for_programs(tmp_path: Path) -> None:
    rows = [ResultRow("float", {"loss": 2.0}, 2**20, 0), ResultRow("trained", {"loss": 1.5}, 2**19, 80, 2e-4)]
    write_results(tmp_path / "results.json", rows)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [ResultRow(**row) for row in written] == rows


def test_what_is_no_finite_number_is_written_as_null(tmp_path: Path) -> None:
    metrics = {"loss": 2.0, "loss_bin_0": float("nan"), "loss_bin_1": float("inf")}
    write_results(tmp_path / "results.json", [ResultRow("float", metrics, 2**20, 0)])
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written[0]["metrics"] == {"loss": 2.0, "loss_bin_0": None, "loss_bin_1": None}


def test_results_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_results([ResultRow("float", {"loss": 2.0}, 2**20, 0)], tmp_path / "results.json")
    assert "1.00 MiB" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())[0]["name"] == "float"


def test_the_totals_of_an_inspection_come_with_its_notes() -> None:
    report = inspect(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64, bias=False)), QuantSpec(exclude=("1",)))
    said = inspect_totals(replace(report, notes=("one", "two")))
    assert said.splitlines() == [
        "79.8% of 20,544 parameters are quantized; linear weights 40.00 KiB in bfloat16 -> 24.12 KiB as exported",
        "one",
        "two",
    ]


def test_the_verification_table_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    checks = (
        SimpleNamespace(name="files", passed=True, detail="9 files"),
        SimpleNamespace(name="layers", passed=False, detail="[a]: codes differ"),  # not rich's markup
    )
    report = SimpleNamespace(directory="out", target="quanto", ok=False, checks=checks)
    assert shown(verify_table(report), capsys) == [  # type: ignore[arg-type]
        ["files", "ok", "9 files"],
        ["layers", "FAILED", "[a]: codes differ"],
    ]


def fails(error: BaseException) -> Callable[[], None]:
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (lambda: None, 0, ""),
        (fails(VerifyError("differs")), 1, "error: differs\n"),
        (fails(SpecError("wrong")), 2, "error: wrong\n"),
        (fails(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
    ids=["success", "failed verification", "mistake", "interrupt"],
)
def test_exit_codes(program: Callable[[], None], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(program)
    assert caught.value.code == code
    assert capsys.readouterr().err == said


def test_other_exceptions_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(fails(ZeroDivisionError()))


PRINT_MUCH = "print(('x' * 79 + chr(10)) * 10_000)"
PRINT_LITTLE = "print('x')"
PRINT_A_TABLE = "from rich.table import Table; report.print_table(Table('column'))"
PRINT_AND_EXIT = "print('x'); raise SystemExit"


@pytest.mark.parametrize(
    "program",
    [PRINT_MUCH, PRINT_LITTLE, PRINT_A_TABLE, PRINT_AND_EXIT],
    ids=["more than a buffer", "a line", "a table", "help"],
)
def test_a_reader_that_has_left_ends_the_program_quietly(program: str) -> None:
    code = f"from qat import report\ndef main():\n  {program}\nreport.run_command(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


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
