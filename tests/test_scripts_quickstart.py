"""scripts/quickstart and the environment it makes, with stand-ins for Python: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Answers as Python does, but installs nothing, and instead of running a module names it with its arguments.
PYTHON = f"""#!/usr/bin/env bash
case "$1 $2" in
    "-m pip") printf '%s\\n' "$*" >>"$PIP_LOG" ;;
    "-P -m") echo "$RECIPE_COMMAND: ${{*:2}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an environment, and nothing that needs one."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "recipes").mkdir()
    for name in ("__init__", "causal_lm", "image_classification", "sequence_classification", "text_to_image"):
        (tmp_path / "recipes" / f"{name}.py").touch()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    program(tmp_path / ".venv" / "bin" / "python", PYTHON)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def quickstart(checkout: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PIP_LOG": str(checkout / "pip.log"), "PATH": path or os.environ["PATH"]}
    environment.pop("PYTHON", None)
    command = ["./scripts/quickstart", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout, env=environment)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "./scripts/quickstart: -m recipes.causal_lm"),
        (["--spec.weights", "int2"], "./scripts/quickstart: -m recipes.causal_lm --spec.weights int2"),
        (["a/int2.yaml", "--seed", "1"], "./scripts/quickstart: -m recipes.causal_lm a/int2.yaml --seed 1"),
        (["causal_lm", "int2.yaml"], "./scripts/quickstart causal_lm: -m recipes.causal_lm int2.yaml"),
        (
            ["image_classification", "a/int8.yaml"],
            "./scripts/quickstart image_classification: -m recipes.image_classification a/int8.yaml",
        ),
        (["text_to_image", "--help"], "./scripts/quickstart text_to_image: -m recipes.text_to_image --help"),
    ],
    ids=["nothing", "options", "configuration", "recipe", "images", "other recipe"],
)
def test_a_recipe_is_run_with_the_arguments(arguments: list[str], expected: str, checkout: Path) -> None:
    done = quickstart(checkout, *arguments)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


@pytest.mark.parametrize("name", ["image_to_text", "text-to-image", "Text2Image"])
def test_an_unknown_recipe_is_an_error_before_an_installation(name: str, checkout: Path) -> None:
    done = quickstart(checkout, name)
    assert done.returncode == 2
    there = "causal_lm image_classification sequence_classification text_to_image"
    assert done.stderr == f"error: {name}: no such recipe; there are: {there}\n"
    assert not (checkout / "pip.log").exists()


def test_a_second_run_does_not_install_again(checkout: Path) -> None:
    for _ in range(2):
        assert quickstart(checkout).returncode == 0
    installs = [line for line in (checkout / "pip.log").read_text().splitlines() if " install " in line]
    assert len(installs) == 1
    assert "transformers" in installs[0]
    assert "diffusers" in installs[0]


@pytest.mark.parametrize(("version", "usable"), [("3.10", False), ("3.11", True), ("3.12", True), ("3.13", False)])
def test_python_is_one_of_those_that_are_tested(version: str, usable: bool, checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    numbers = version.replace(".", ", ")
    answers = f"import sys; sys.version_info = ({numbers}, 0); exec(sys.argv[1])"
    stand_in = f"""#!/usr/bin/env bash
if [[ "$1" == -c ]]; then exec {sys.executable} -c '{answers}' "$2"; fi
if [[ "$1" == --version ]]; then echo "Python {version}"; exit; fi
mkdir -p "$3/bin" && cp "{checkout}/stand_in" "$3/bin/python"
"""
    program(checkout / "stand_in", PYTHON)
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        program(tmp_path / "programs" / name, stand_in)
    done = quickstart(checkout, path=f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    assert (done.returncode == 0) is usable
    assert ("3.11 or 3.12" in done.stderr) is not usable
