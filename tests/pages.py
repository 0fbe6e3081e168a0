"""Scripts made of pages run in processes of their own, which are forks of one that has imported the large libraries."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

LIBRARIES = [
    *("torch", "lightning", "optimum.quanto", "peft", "transformers.models.llama.modeling_llama"),
    "diffusers.pipelines.flux.pipeline_flux",
]


def _run(script: Path, said: Path) -> None:
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(script.parent)
    sys.argv = [str(script)]
    runpy.run_path(str(script), run_name="__main__")


def run(script: Path) -> tuple[int | None, str]:
    """The exit code of a script, run in its own folder, and all that it said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    said = script.with_suffix(".log")
    process = context.Process(target=_run, args=(script, said))
    process.start()
    process.join()
    return process.exitcode, said.read_text()
