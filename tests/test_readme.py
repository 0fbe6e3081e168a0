"""The README does what it says: its Python blocks run, its commands name things that exist.

Every ```python block runs, in order and in one namespace, as one script in a fresh process; its folder is empty but
for the checkout's recipes, so that the reference checkpoint is found and nothing is written into the checkout. What
is not meant to run is fenced as ```text.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
OWN_FOLDERS = ("recipes", "scripts", "qat", "tests", "docs")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the file on which the text begins."""

    language: str
    text: str
    line: int


def blocks(markdown: str, *languages: str) -> list[Block]:
    found = [
        Block(match["language"], match["text"], markdown.count("\n", 0, match.start("text")) + 1)
        for match in FENCE.finditer(markdown)
    ]
    return [block for block in found if block.language in languages]


def as_script(python_blocks: list[Block]) -> str:
    """Join the blocks, each on the lines that it has in the file, so that a traceback names the file's lines."""
    lines: list[str] = []
    for block in python_blocks:
        lines += [""] * (block.line - 1 - len(lines))
        lines += block.text.splitlines()
    return "\n".join(lines) + "\n"


def commands(shell_blocks: list[Block]) -> list[str]:
    joined = "\n".join(block.text for block in shell_blocks).replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def missing_files(command: str) -> list[str]:
    """What a command names in the checkout that is not there: scripts, modules of ours, configuration files."""
    words = shlex.split(command, comments=True)
    missing = []
    for place, word in enumerate(words):
        if word.startswith("./"):
            path = ROOT / word
            if not (path.exists() and (path.parent.name != "scripts" or os.access(path, os.X_OK))):
                missing.append(word)
        elif place > 0 and words[place - 1] == "-m":
            module = ROOT / word.replace(".", "/")
            if word.startswith(OWN_FOLDERS) and not (module.with_suffix(".py").exists() or module.is_dir()):
                missing.append(word)
        elif word.partition("/")[0] in OWN_FOLDERS and "/" in word and not (ROOT / word).exists():
            missing.append(word)
    return missing


def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_blocks_keep_their_lines() -> None:
    text = "# Title\n\n```python\na = 1\n```\n\n```bash\nls\n```\n\n```python\nb = a\n```\n"
    found = blocks(text, "python")
    assert [block.line for block in found] == [4, 12]
    assert as_script(found).splitlines()[11] == "b = a"


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("./scripts/test -n 0", []),
        ("./scripts/no_such_script --flag", ["./scripts/no_such_script"]),
        ("python -m recipes.no_such_recipe", ["recipes.no_such_recipe"]),
        ("python -m pip install -e .", []),
        ("./scripts/test recipes/configs/no_such.yaml  # why", ["recipes/configs/no_such.yaml"]),
        ("qat verify outputs/int4", []),
    ],
)
def test_missing_files_are_noticed(command: str, missing: list[str]) -> None:
    assert missing_files(command) == missing


def test_commands_name_what_exists() -> None:
    missing = {line: found for line in commands(blocks(readme(), "bash", "sh")) if (found := missing_files(line))}
    assert not missing


def test_both_commands_are_shown() -> None:
    shown = "\n".join(commands(blocks(readme(), "bash", "sh")))
    assert "./scripts/quickstart" in shown
    assert "./scripts/test" in shown


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra.strip()
        for group in re.findall(r"(?:qat|\.)\[([\w, ]+)\]", "\n".join(commands(blocks(readme(), "bash", "sh"))))
        for extra in group.split(",")
    }
    assert named <= set(extras)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", readme())
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_python_blocks_run(tmp_path: Path, page: str) -> None:
    python_blocks = blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    assert python_blocks, f"{page} shows no library example"
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    script = tmp_path / "page.py"
    script.write_text(as_script(python_blocks))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}, by its own line numbers:\n{done.stderr}"
