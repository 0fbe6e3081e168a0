from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
import tyro

from qat.command_line import parsed, require_first
from qat.errors import QatError


def program(
    model: str,
    /,
    steps: int = 3,
    kind: Literal["int8", "int4"] = "int8",
    first_kind: Annotated[Literal["int8", "int4"], tyro.conf.arg(name="later.kind")] = "int8",
    flag: bool = False,
) -> tuple[Any, ...]:
    """A program.

    Args:
        model: What is read.
        steps: How many.
        kind: Which.
        first_kind: Which is first.
        flag: Whether.
    """
    return model, steps, kind, first_kind, flag


def parse(words: Sequence[str]) -> Any:
    verbs = {"go": program, "stop": lambda: "stopped"}
    return tyro.extras.subcommand_cli_from_dict(verbs, prog="p", args=words, config=(positional,))


positional = tyro.conf.PositionalMetavarFromFieldName


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("go x --kind int44", "--kind: must be one of int8, int4, got 'int44' (did you mean 'int4'?)"),
        ("go x --kind float", "--kind: must be one of int8, int4, got 'float'"),
        ("go x --stepps 3", "'--stepps': there is no such option (did you mean --steps?)"),
        ("go x --stepps=3", "'--stepps=3': there is no such option (did you mean --steps?)"),
        ("go x --section.steps 3", "'--section.steps': there is no such option (did you mean --steps?)"),
        ("go x --a.kind int8", "'--a.kind': there is no such option (did you mean --kind or --later.kind?)"),
        ("go --model x", "'--model': there is no such option; MODEL is given by its place, without a name"),
        ("go --stepps 3", "'--stepps': there is no such option (did you mean --steps?)"),
        ("go x --qqq", "'--qqq': there is no such option"),
        ("go x --qqq --stepps 3", "'--qqq': there is no such option; '--stepps': there is no such option (did you"),
        ("go x y", "'y': one word too many, leave it out"),
        ("go x --flag=3", "'--flag=3': there is no such option (did you mean --flag?)"),
        ("go x y.yaml", "'y.yaml': a configuration file comes before all options"),
        ("go", "MODEL (what is read) must be given"),
        ("go x --steps", "Missing value for argument '--steps'"),
        ("go x --steps many", "Error parsing --steps: invalid literal"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_remedy(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(QatError, match=f"^{re.escape(expected)}.*: p go --help lists what there is$"):
        parsed(parse, line.split(), "p", "go")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["40", None], ids=["narrow", "unknown"])
def test_a_narrow_terminal_breaks_no_word(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns or "")
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    with pytest.raises(QatError, match=r"^MODEL \(what is read\) must be given: "):
        parsed(parse, ["go"], "p", "go")
    assert os.environ.get("COLUMNS") == columns


def test_what_is_right_is_returned_and_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(parse, ["go", "x", "--steps", "4"], "p", "go") == ("x", 4, "int8", "int8", False)
    with pytest.raises(SystemExit) as caught:
        parsed(parse, ["go", "--help"], "p", "go")
    assert caught.value.code == 0
    assert "usage: p go" in capsys.readouterr().out


def test_a_name_comes_first() -> None:
    require_first("verb", ["go", "--x"], ["go", "stop"], "p")
    with pytest.raises(QatError, match=r"^verb: must be one of go, stop, got 'sotp' \(did you mean 'stop'\?\): p "):
        require_first("verb", ["sotp"], ["go", "stop"], "p")
    with pytest.raises(QatError, match=r"^verb: must come before its options, got '--x': write p stop --x$"):
        require_first("verb", ["--x", "3", "stop"], ["go", "stop"], "p")
