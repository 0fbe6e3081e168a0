"""Mistakes that newcomers make: each is one error that says what to do.

`scripts.check_mistakes --only newcomer` measures the time of the answers. Here a few are made as processes, the rest
in this one, through the function that the command calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.cli import main
from scripts.newcomers import COMMAND_LINES, REFERENCE, fill

INT8 = qat.QuantSpec(weights="int8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what mistakes name below it."""
    monkeypatch.setenv("RECIPE_COMMAND", "")  # so that what the verb sets is undone
    monkeypatch.delenv("RECIPE_COMMAND")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    fill(tmp_path)
    return tmp_path


def check(code: int, said: str, words: tuple[str, ...]) -> None:
    assert code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("line", "words"), COMMAND_LINES, ids=[line.replace(str(REFERENCE), "REF") for line, _ in COMMAND_LINES]
)
def test_a_mistake_is_one_error_with_a_remedy(
    line: str, words: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.replace("@", str(place)).split()[1:])
    said = capsys.readouterr()
    assert said.out == ""
    check(int(caught.value.code or 0), said.err, words)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("number", [0, 5], ids=["command", "option"])
def test_a_process_says_the_same(number: int, place: Path) -> None:
    line, words = COMMAND_LINES[number]
    environment = {**os.environ, "PYTHONPATH": str(REFERENCE.parents[1]), "COLUMNS": "60"}
    command = [sys.executable, "-m", "qat", *line.split()[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    check(done.returncode, done.stderr, words)


def _model(**prepared: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(256, 64))
    if prepared:
        qat.prepare(model, **prepared)
    return model


@pytest.mark.parametrize(
    ("mistake", "error", "words"),
    [
        (lambda: qat.prepare(_model(spec=INT8), INT8), qat.StateError, "prepared"),
        (lambda: qat.freeze(_model()), qat.StateError, "qat.prepare"),
        (lambda: qat.export(_model(spec=INT8), "out"), qat.StateError, "freeze"),
        (lambda: qat.export(_model(), "out"), qat.StateError, "not frozen: call qat.freeze"),
        (lambda: qat.QuantSpec(weights="int44"), qat.SpecError, "weights: .*'int4'.*got 'int44'"),  # type: ignore[arg-type]
        (lambda: qat.QuantSpec("int4"), qat.SpecError, r"write QuantSpec\(weights="),
        (lambda: qat.QuantSpec(weight="int4"), qat.SpecError, "weight: .*choose from weights"),  # type: ignore[call-arg]
        (lambda: qat.QuantSpec(dtype=torch.int8), qat.SpecError, "dtype: .*'float32'.*got 'int8'"),  # type: ignore[arg-type]
        (lambda: qat.prepare(_model(), "int8"), qat.SpecError, r"spec: .*write QuantSpec"),  # type: ignore[arg-type]
        (lambda: qat.prepare(_model(), INT8, target="gguff"), qat.TargetError, "did you mean 'gguf'"),
        (lambda: qat.prepare(_model(), INT8, algorithm="best"), qat.StateError, "such as Straight"),  # type: ignore[arg-type]
        (lambda: qat.load("nowhere"), qat.LoadError, "'nowhere' is not a directory.*name what qat.export wrote"),
    ],
    ids=[
        *("prepare twice", "freeze a float model", "export unfrozen", "export a float model", "unknown type"),
        *("no name", "misspelt name", "integer dtype", "spec a text", "target", "algorithm a text", "load nothing"),
    ],
)
def test_a_mistake_in_a_program_is_one_error(mistake: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        mistake()


def test_bash_completes_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tyro-print-completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    ask = f"source {tmp_path}/completion; COMP_WORDS=(qat ins); COMP_CWORD=1; _tyro_qat; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "inspect\n")
