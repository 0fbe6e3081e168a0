"""Kill a recipe of several ranks, or on a GPU, at random moments; start it again, and compare with a whole run.

    python -m scripts.kill_ranks --strategy fsdp2 --devices 2 --accelerator cpu --kills 6 [--seed 0]
    python -m scripts.kill_ranks --strategy auto --devices 1 --accelerator gpu --kills 6

Lightning starts the other ranks. All are killed at once, imports included, at a moment of the whole run, or each
second time after its first checkpoint. Then the same command is started again, until it ends. All files of the export
and the table of results must be those of the run without a break, byte for byte. The model is that of
`scripts.kill_and_resume`, and tokens are drawn. On a GPU, torch is told to use deterministic algorithms alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.kill_and_resume import OPTIONS, files_of, make_model

ROOT = Path(__file__).parents[1]
FIT = ["--no-report", "--optimization.steps", "60", "--optimization.batch-size", "4", "--trainer.checkpoint-every", "4"]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start the recipe in a folder, as the leader of a group of processes."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.kill_ranks", *arguments],
            cwd=folder,
            env=environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def train() -> None:
    """Run the recipe on drawn tokens."""
    import torch

    from recipes import causal_lm
    from recipes.data import text

    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4096, (64,), generator=draw)} for _ in range(264)]
    vars(text)["load_blocks"] = lambda *_: (rows[:256], rows[256:])
    causal_lm.main(sys.argv[1:])


def main() -> int:
    """Run, and print a line for each kill and one of JSON for all; the number of runs that ended otherwise."""
    if sys.argv[1:2] == ["--model"]:
        train()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/kills"))
    given, more = parser.parse_known_args()
    root = given.folder.absolute() / f"{given.strategy}_{given.accelerator}"
    shutil.rmtree(root, ignore_errors=True)
    (source, kind), sizes, _ = OPTIONS["causal_lm"]
    make_model(source, kind, sizes, root / "model")
    arguments = ["--model", "../model", "--output", "out", *FIT, "--algorithm.start", "clip"]
    for name in ("strategy", "devices", "accelerator"):
        arguments += [f"--trainer.{name}", vars(given)[name]]
    if given.accelerator == "gpu":
        arguments += ["--trainer.deterministic"]
    arguments += more
    took, ends = 0.0, []
    for number in range(2):  # the second has warm caches, and shows that runs repeat
        begun = time.monotonic()
        if code := start(arguments, root / f"whole{number}").wait():
            raise SystemExit(f"the whole run ended with {code}: {root / f'whole{number}' / 'log.txt'}")
        took = time.monotonic() - begun
        ends.append(files_of(root / f"whole{number}"))
    wanted = ends[1]
    if wanted != ends[0]:
        raise SystemExit(f"two whole runs differ in {[name for name in wanted if wanted[name] != ends[0].get(name)]}")
    draw, faults, resumed = random.Random(given.seed), 0, 0
    for number in range(given.kills):
        folder, moment = root / f"kill{number}", draw.uniform(0, took / (1 + 3 * (number % 2)))
        process = start(arguments, folder)
        while number % 2 and process.poll() is None and not any((folder / "out-checkpoints").glob("step-*.json")):
            time.sleep(0.01)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() and (code := start(arguments, folder).wait()):
            faults += 1
            print(
                f"kill {number} at {moment:.2f} s: started again it ended with {code}: {folder / 'log.txt'}", flush=True
            )
            continue
        log, found = (folder / "log.txt").read_text(), files_of(folder)
        step = log.rpartition("going on from step ")[2].split(" ")[0] if "going on from step" in log else "none"
        resumed += step != "none"
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        faults += bool(other)
        print(f"kill {number}, {moment:.2f} s: went on from step {step}: {other or 'equal'}", flush=True)
    print(json.dumps({
        "arguments": arguments, "kills": given.kills, "seed": given.seed, "went_on_from_a_checkpoint": resumed,
        "other_ends": faults, "files": len(wanted), "seconds": round(took, 2),
    }))  # fmt: skip
    return faults


if __name__ == "__main__":
    sys.exit(bool(main()))
