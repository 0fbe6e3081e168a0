"""Run every command of README.md and docs, in a folder of its own where the names that stand for a user's files exist.

    .venv/bin/python -m scripts.run_commands [--quick] [--only TEXT]

`./scripts/quickstart` becomes the recipe, and the environment's programs become this Python: so nothing is installed,
and nothing is written into the checkout. `NOT_RUN` has the exceptions, each with its reason.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from qat.report import run_command
from scripts._bad_data_files import png

__all__ = ["NOT_RUN", "commands", "main", "program", "reason"]

ROOT = Path(__file__).parent.parent
NOT_RUN = {
    "./scripts/test": "installs, then runs the tests: it is run by itself",
    "./scripts/docs": "installs, then builds the site: a test does so without the installation",
    "-m ruff": "scripts/test runs it",
    "-m mypy": "scripts/test runs it",
    "-m pytest": "scripts/test runs it",
    "scripts.bad_data": "135 processes; docs/recipes.md says what it shows",
    "scripts.measure_text_memory 5 50 500": "text of 5 GB; docs/recipes.md has what it gave",
    "~/.": "writes into the home folder; tests/test_newcomer_mistakes.py lets bash complete by what it writes",
    "path/to/cache": "needs a cache of a teacher's logits; docs/distillation.md makes and reads one in Python",
}
"""Commands that are not run here, by a part of them, and why. Pages below docs/results show what made their rows: hours
of a GPU."""


def commands() -> list[tuple[str, str]]:
    """Each command in a fence of bash, with its page; a command that goes on in the next line is one."""
    found: list[tuple[str, str]] = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = [shlex.join(shlex.split(line, comments=True)) for line in block.replace("\\\n", " ").splitlines()]
            found += [(page.relative_to(ROOT).as_posix(), line) for line in lines if line]
    return found


def reason(command: str) -> str | None:
    """Why it is not run; none: it is."""
    return next((why for part, why in NOT_RUN.items() if part in command), None)


def program(command: str) -> list[str]:
    """The same command for this Python, without an installation before it."""
    first, *words = shlex.split(command, comments=True)
    if operators := {"&&", "||", "|", ">", ">>", "<", ";"}.intersection(words):
        raise ValueError(f"command: must be one program, got {sorted(operators)} in {command!r}")
    if first == "./scripts/quickstart":
        named = bool(words) and re.fullmatch(r"[a-z_]+", words[0]) is not None
        recipe = words.pop(0) if named else "causal_lm"
        return [sys.executable, "-m", f"recipes.{recipe}", *words]
    if first in (".venv/bin/qat", "qat"):
        return [sys.executable, "-m", "qat", *words]
    if first == ".venv/bin/python":
        return [sys.executable, *words]
    raise ValueError(
        f"command: must begin with ./scripts/quickstart, .venv/bin/qat or .venv/bin/python, got {command!r}"
    )


def prepare(folder: Path, recipe: str) -> None:
    """Make `path/to/model` and the like of the pages, with the classes that the models of the checkout know."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name in ("FOLDER", "my-texts"):
        shutil.copytree(ROOT / "docs" / "decisions", folder / name)
    given = folder / "path" / "to"
    (given / "images").mkdir(parents=True)
    (folder / "my-images").mkdir()
    models = {"image_classification": "reference_vit", "sequence_classification": "reference_encoder"}
    (given / "model").symlink_to(ROOT / "recipes" / models.get(recipe, "reference"))
    names = json.loads((given / "model" / "config.json").read_text()).get("id2label") or {"0": "a class"}
    classes = [names[key] for key in sorted(names, key=int)]
    (given / "pipeline").symlink_to(ROOT / "recipes" / "reference_flux")
    for number in range(200):
        name = f"{number}.png"
        (folder / "my-images" / name).write_bytes(png(16))
        place = given / "images" / (classes[number % len(classes)] if recipe == "image_classification" else "")
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(png(16))
        if recipe == "text_to_image":
            (place / f"{number}.txt").write_text("a square")
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "category"])
        writer.writerows([f"This is review {number}.", classes[number % len(classes)]] for number in range(400))


def run(command: str, quick: bool) -> tuple[int, str]:
    """The exit code of a command, and the end of what it said."""
    words = program(command)
    recipe = words[2].removeprefix("recipes.") if words[2].startswith("recipes.") else ""
    if recipe and quick:
        words += ["--optimization.steps", "2", "--optimization.warmup-steps", "1"]
        if "--data.size" in words:
            words[words.index("--data.size") + 1] = "32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, recipe)
        if "verify" in words:  # it checks what the recipe before it wrote
            made = [sys.executable, "-m", "recipes.causal_lm", "--optimization.steps", "2", "--no-float-baseline"]
            subprocess.run(made, cwd=folder, env=environment(), check=True, capture_output=True)
        done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def environment() -> dict[str, str]:
    """The caller's, with the checkout's modules."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def main(quick: bool = False, only: str = "") -> None:
    """Run every command of the pages, and print how each ended.

    Args:
        quick: Two training steps each, and images of 32 pixels, whatever the command says.
        only: Run those alone that hold this text.
    """
    failed = found = 0
    pages: dict[str, str] = {}
    for page, command in commands():
        pages.setdefault(command, page)
    for command, page in pages.items():
        if only not in command:
            continue
        found += 1
        if why := reason(command):
            print(f"left out   {page}: {command} ({why})", flush=True)
            continue
        begin = time.perf_counter()
        code, said = run(command, quick)
        failed += code != 0
        print(
            f"{'ok' if code == 0 else f'exit {code}':10} {time.perf_counter() - begin:6.1f} s  {page}: {command}",
            flush=True,
        )
        if code:
            print(said, flush=True)
    if not found:
        raise SystemExit(f"only: no command holds {only!r}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(lambda words: tyro.cli(main, args=words))
