"""One run of a recipe in a process of its own, as a user would start it, for the scripts that compare many runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Metrics", "run_recipe"]

Metrics = dict[str, dict[str, float]]


def run_recipe(recipe: str, kind: str, seed: int, output: Path, jobs: int, options: Sequence[str]) -> Metrics:
    """Run a recipe and return the metrics of each model that it judged, by the model's name.

    Args:
        recipe: its module's name.
        kind: the name of its YAML file.
        seed: of the run.
        output: where its export goes.
        jobs: how many runs share the processor, and so its threads.
        options: further arguments.

    Raises:
        RuntimeError: the recipe failed.
    """
    command = [sys.executable, "-m", f"recipes.{recipe}", f"recipes/configs/{recipe}/{kind}.yaml", *options]
    command += ["--seed", str(seed), "--output", str(output)]
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    rows = json.loads(output.with_name(f"{output.name}-results.json").read_text())
    return {row["name"]: row["metrics"] for row in rows}
