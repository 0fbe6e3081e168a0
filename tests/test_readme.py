"""README, docs/, gallery and notebook do what they say: Python blocks run, commands name things that exist.

Fences are balanced on every page, and no code stands outside of them. Every ```python block runs, in order and in one
namespace a page, as one script in a process of its own; its folder is empty but for the checkout's recipes, so that the
reference checkpoint is found and nothing is written into the checkout. What is not meant to run is fenced as ```text.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.pages import run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
PEERS = {"modelopt": "modelopt", "quanto": "optimum.quanto", "torchao": "torchao"}
EXAMPLES = sorted([*ROOT.glob("docs/gallery/*.py"), *ROOT.glob("docs/notebooks/*.ipynb")])
PAGES = [path for pattern in ("*.md", "docs/**/*.md") for path in sorted(ROOT.glob(pattern))]
STRAY = "line 2: a fence closes nothing, or opens without a language"
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


def is_code(line: str) -> bool:
    """Whether a line of prose is a statement of Python, or a command."""
    if line.startswith(("python -m ", "./scripts/", "qat ", "$ ")):
        return True
    try:
        statements = ast.parse(line).body
    except SyntaxError:
        return False
    return any(not isinstance(s, ast.Expr) or isinstance(s.value, ast.Call | ast.Await) for s in statements)


def faults(markdown: str) -> list[str]:
    """What a page holds in the wrong place: fences that do not pair, code outside of them, headings within text."""
    found: list[str] = []
    opened, before, text = 0, "", ""
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.lstrip().startswith("```"):
            named = line.strip() != "```"
            if opened and named:
                found.append(f"line {number}: a fence opens within the one of line {opened}")
            elif not opened and not named:
                found.append(f"line {number}: a fence closes nothing, or opens without a language")
            opened = 0 if opened and not named else number
        elif not opened and line.startswith("#") and before:
            found.append(f"line {number}: a heading follows text without an empty line")
        elif not opened and is_code(line):
            found.append(f"line {number}: code stands outside a fence")
        elif not opened and line.startswith("    ") and not before and text.startswith(("- ", "  ")):
            found.append(f"line {number}: indented code belongs to the list above it: fence it")
        before, text = line.strip(), line if line.strip() and not opened else text
    return found + [f"line {opened}: a fence never closes"] * bool(opened)


def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_blocks_keep_their_lines() -> None:
    text = "# Title\n\n```python\na = 1\n```\n\n```bash\nls\n```\n\n```python\nb = a\n```\n"
    found = blocks(text, "python")
    assert [block.line for block in found] == [4, 12]
    assert as_script(found).splitlines()[11] == "b = a"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Text.\n\n```python\na = 1\n```\n\n    python -m indented\n", []),
        ("```python\na = 1\n", ["line 1: a fence never closes"]),
        (
            "Text.\n```\n",
            [STRAY, "line 2: a fence never closes"],
        ),
        ("```text\nText.\n```python\na = 1\n```\n", ["line 3: a fence opens within the one of line 1"]),
        ("Text.\nprint(report)\n", ["line 2: code stands outside a fence"]),
        ("batches = [1]  # yours\n", ["line 1: code stands outside a fence"]),
        ("python -m recipes.causal_lm\n", ["line 1: code stands outside a fence"]),
        ("Text:\n## Heading\n", ["line 2: a heading follows text without an empty line"]),
        ("- a\n\n    python -m b\n", ["line 3: indented code belongs to the list above it: fence it"]),
    ],
    ids=["good", "open", "stray", "nested", "call", "assignment", "command", "heading", "list"],
)
def test_what_stands_in_the_wrong_place_is_noticed(text: str, found: list[str]) -> None:
    assert faults(text) == found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_fences_are_balanced_and_hold_all_code(page: Path) -> None:
    assert not faults(page.read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_name_what_exists(page: Path) -> None:
    """Commands within text too; a log of experiments, or of changes, names what there was."""
    if page.stem.startswith(("experiments", "CHANGELOG")):
        return
    text = page.read_text(encoding="utf-8")
    shown = [Block("bash", found, 0) for found in re.findall(r"\.venv/bin/python -m [\w.]+", text)]
    missing = {
        line: found for line in commands([*blocks(text, "bash", "sh"), *shown]) if (found := missing_files(line))
    }
    assert not missing


def test_both_commands_are_shown() -> None:
    shown = "\n".join(commands(blocks(readme(), "bash", "sh")))
    assert "./scripts/quickstart" in shown
    assert "./scripts/test" in shown


def test_the_readme_and_the_pages_show_library_examples() -> None:
    assert {"README.md", "docs/start.md"} <= set(WITH_PYTHON)


def test_lines_are_short() -> None:
    """But for results and the tables of loaders, which scripts write."""
    pages = [page for page in PAGES if "results" not in page.parts]
    lines = [(page.name, *line) for page in pages for line in enumerate(page.read_text().splitlines(), 1)]
    long = [(name, number, line) for name, number, line in lines if len(line) > 120]
    assert not [(name, number) for name, number, line in long if name != "loaders.md" or "](../tests/" not in line]


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra.strip()
        for group in re.findall(r"(?:qat|\.)\[([\w, ]+)\]", "\n".join(commands(blocks(readme(), "bash", "sh"))))
        for extra in group.split(",")
    }
    assert named <= set(extras)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


WITH_PYTHON = [str(page.relative_to(ROOT)) for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(tmp_path: Path, page: str) -> None:
    python_blocks = blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    script = tmp_path / "page.py"
    script.write_text(as_script(python_blocks))
    code, said = run(script)
    assert code == 0, f"{page}, by its own line numbers:\n{said}"


def cells(notebook: Path) -> list[str]:
    """The sources of its code cells."""
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_run(tmp_path: Path, example: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    script = tmp_path / f"{example.stem}.py"
    script.write_text("\n".join(cells(example)) if example.suffix == ".ipynb" else example.read_text())
    code, said = run(script)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("peer", sorted(path.stem for path in ROOT.glob("docs/peers/*.py")))
def test_lines_of_other_libraries_run(tmp_path: Path, peer: str) -> None:
    if find_spec(PEERS[peer]) is None:
        pytest.skip(f"needs {PEERS[peer]}")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    script = tmp_path / f"with_{peer}.py"  # under its own name it would be imported in the library's place
    script.write_text((ROOT / "docs" / "peers" / f"{peer}.py").read_text())
    code, said = run(script)
    assert code == 0, said


def test_a_notebook_has_ten_cells_and_no_outputs() -> None:
    assert [len(cells(path)) for path in EXAMPLES if path.suffix == ".ipynb"] == [10]
    assert all('"outputs": []' in path.read_text() for path in EXAMPLES if path.suffix == ".ipynb")


def test_the_gallery_shows_all_of_its_examples() -> None:
    shown = re.findall(r"literalinclude} (.+)", (ROOT / "docs" / "gallery" / "index.md").read_text())
    assert sorted(shown) == sorted(path.name for path in EXAMPLES if path.suffix == ".py")
