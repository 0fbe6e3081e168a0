"""No command or snippet of the pages escapes: a script runs it, a test does, or a list says why not."""

from __future__ import annotations

import ast
import re
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qat import cli, cli_runs
from recipes.common.config import load_config
from scripts import run_commands
from tests.test_readme import PAGES, ROOT, blocks

COMMANDS = sorted({command for _, command in run_commands.commands() if run_commands.reason(command) is None})
# Python that no test runs as it stands: the beginning of its first line, and why.
NOT_RUN = {
    "torch.distributed.init_process_group()": "several devices: tests/test_distributed.py does the same on two ranks",
    "class MyModule(lightning.LightningModule):": "several devices, as above",
    "import qat.integrations.diffusers": "a line, or a file of weights that nobody has: test_integrations_diffusers.py",
    "from optimum.quanto import qfloat8_e4m3fn": "needs CUDA and a model that an older library made",
    'state = torch.load("outputs/causal_lm': "needs the files of a run: tests/test_recipes_checkpoints.py",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of it exists; `scripts/run_commands.py` runs it."""
    _, _, module, *words = run_commands.program(command)
    run_commands.prepare(tmp_path, module.removeprefix("recipes."))
    monkeypatch.chdir(tmp_path)
    if module.startswith("recipes."):
        load_config(import_module(module).Config, words, "")
    elif module == "qat":
        called: list[str] = []
        place, name = next((m, n) for m in (cli, cli_runs) for n in (f"_{words[0]}", words[0]) if hasattr(m, n))
        verb = getattr(place, name)

        @wraps(verb)
        def noted(*arguments: Any, **options: Any) -> None:
            called.append(name)

        monkeypatch.setattr(place, name, noted)
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert (called, ended.value.code) == ([name], 0)
    else:
        assert hasattr(import_module(module), "main")


def test_each_exception_is_of_a_command() -> None:
    shown = [command for _, command in run_commands.commands()]
    assert not [part for part in run_commands.NOT_RUN if not any(part in command for command in shown)]


def is_python(text: str) -> bool:
    try:
        return any(not isinstance(part, ast.Expr) for part in ast.parse(text).body)
    except SyntaxError:
        return False


def test_each_block_of_python_runs_or_has_a_reason() -> None:
    """Blocks of ```python run in test_readme.py; what is fenced otherwise and is Python too is listed here."""
    texts = [block.text for page in PAGES for block in blocks(page.read_text(), "text", "yaml", "console", "sh")]
    escaped = [text for text in texts if is_python(text)]
    assert not [text for text in escaped if not text.startswith(tuple(NOT_RUN))]
    assert not [start for start in NOT_RUN if not any(text.startswith(start) for text in escaped)]


def test_included_code_is_run() -> None:
    """Of a file that a test runs whole, or of a test."""
    included = [
        (page.parent / name).resolve().relative_to(ROOT).as_posix()
        for page in PAGES
        for name in re.findall(r"literalinclude} (\S+)", page.read_text())
    ]
    assert included
    assert not [name for name in included if not name.startswith(("tests/test_", "docs/gallery/", "docs/peers/"))]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_name_the_environment(page: Path) -> None:
    """After ./scripts/quickstart a command can be copied; the log of experiments says what its `python` is."""
    if page.name.startswith("experiments") or page.name == "CHANGELOG.md":
        return
    assert not re.findall(r"(?<![/\w])python3? -m (?:scripts|recipes|pytest|pip)", page.read_text())
