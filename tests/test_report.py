from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qat.errors import SpecError, VerifyError
from qat.report import run_command


def fails(error: BaseException) -> Callable[[list[str]], None]:
    def program(_: list[str]) -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (lambda _: None, 0, ""),
        (fails(VerifyError("differs")), 1, "error: differs\n"),
        (fails(SpecError("wrong")), 2, "error: wrong\n"),
        (fails(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
    ids=["success", "failed verification", "mistake", "interrupt"],
)
def test_exit_codes(
    program: Callable[[list[str]], None], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(program, [])
    assert caught.value.code == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), KeyError("a")], ids=lambda e: type(e).__name__)
def test_a_fault_of_the_program_is_one_line_with_its_place(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        run_command(fails(error), [])
    said = capsys.readouterr().err
    assert caught.value.code == 4
    assert said.startswith(f"error: {type(error).__name__}: {error} ({__file__}, line ")
    (kept,) = tmp_path.iterdir()
    assert said.endswith(f"this was not expected: report it with its traceback, which is in {kept}\n")
    assert said.count("\n") == 1
    assert kept.read_text().startswith("Traceback (most recent call last):")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    with pytest.raises(SystemExit):
        run_command(fails(error), [])
    assert capsys.readouterr().err.endswith("report it with its traceback, which --debug shows\n")


@pytest.mark.parametrize(
    ("words", "variable", "shown"),
    [([], "", False), ([], "0", False), ([], "1", True), (["a", "--debug", "b"], "0", True)],
    ids=["neither", "variable of 0", "variable", "option"],
)
@pytest.mark.parametrize("error", [SpecError("wrong"), ZeroDivisionError("by zero")], ids=lambda e: type(e).__name__)
def test_a_traceback_is_shown_on_demand(
    error: Exception,
    words: list[str],
    variable: str,
    shown: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QAT_DEBUG", variable)
    with pytest.raises(SystemExit):
        run_command(fails(error), words)
    said = capsys.readouterr().err
    assert ("Traceback" in said) == shown
    assert said.splitlines()[-1].startswith("error: ")


def test_a_program_never_sees_the_option_for_tracebacks() -> None:
    seen: list[str] = []
    with pytest.raises(SystemExit):
        run_command(seen.extend, ["a", "--debug", "b"])
    assert seen == ["a", "b"]


PRINT_MUCH = "print(('x' * 79 + chr(10)) * 10_000)"
PRINT_LITTLE = "print('x')"
PRINT_AND_EXIT = "print('x'); raise SystemExit"


@pytest.mark.parametrize(
    "program",
    [PRINT_MUCH, PRINT_LITTLE, PRINT_AND_EXIT],
    ids=["more than a buffer", "a line", "help"],
)
def test_a_reader_that_has_left_ends_the_program_quietly(program: str) -> None:
    code = f"from qat import report\ndef main(_):\n  {program}\nreport.run_command(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["", "1>&-", "2>&-", "1>&- 2>&-"], ids=["ascii", "output", "errors", "both"])
def test_streams_that_are_closed_or_lack_a_character_are_no_fault(closed: str) -> None:
    code = "from qat import report\nreport.run_command(lambda _: print(chr(177)))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "" if "1" in closed else "?\n", "")


def test_the_broken_pipe_of_a_worker_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(fails(BrokenPipeError("a worker died")), [])
    assert ended.value.code == 4
    assert "error: BrokenPipeError: a worker died" in capsys.readouterr().err
