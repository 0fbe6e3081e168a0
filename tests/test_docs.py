"""The site builds without a warning; its figures are those of the rows, and the messages that it quotes exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli import main as command
from scripts.draw_figures import main
from tests.sources import ROOT, code_of, library_modules

DOCS = ROOT / "docs"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """All pages, links and docstrings are read; HTML, which has no more rules, is not written.

    In a process of its own, for Sphinx imports modules anew, so that classes would be two.
    """
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="needs the extra docs")
    build = [sys.executable, "-W", "ignore", "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "dummy"]
    done = subprocess.run([*build, str(DOCS), str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    """Otherwise draw them again: ``python -m scripts.draw_figures``."""
    main(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "figures").iterdir()}


def messages() -> str:
    """All texts of the library but its docstrings; a value within one is a brace, a constant's name its text."""
    trees = [ast.parse(code_of(path)) for path in library_modules().values()]
    constants = {
        target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def text(part: ast.expr) -> str:
        if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            return str(constants.get(part.value.id, "{"))
        return str(part.value) if isinstance(part, ast.Constant) else "{"

    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]
    return "\n".join("".join(map(text, node.values if isinstance(node, ast.JoinedStr) else [node])) for node in nodes)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) == page.count("\n### ") >= 30
    known = messages()
    assert not [text for text in quoted if text not in known]


def test_each_command_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    commands = re.findall(r"• (\w+) ", capsys.readouterr().out)
    assert commands == re.findall(r"^\| `(\w+)` ", (DOCS / "cli.md").read_text(), re.MULTILINE)
