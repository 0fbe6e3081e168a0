from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.table import Table
from torch import nn

from qat.errors import SpecError, VerifyError
from qat.inspection import inspect
from qat.report import inspect_totals, print_table, run_command, show_size, verify_table
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
