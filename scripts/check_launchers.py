"""Start a small recipe on two ranks by each launcher, and compare what they export, byte for byte.

    python -m scripts.check_launchers [--strategies ddp fsdp2] [--folder FOLDER]

The launchers: Lightning itself, torchrun with one node, torchrun with two nodes of a rank each (both on this machine),
and two processes with the variables that ``srun`` would set for two nodes. All train on the CPU (gloo). With the same
strategy, all exports and results must be equal, but for the files that hold settings such as the number of nodes.
Then rank 1 fails within a forward: each launcher must end all ranks with an error, and leave no process behind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.kill_and_resume import OPTIONS, files_of, make_data, make_model

ROOT = Path(__file__).parents[1]
FIT = ["--optimization.steps", "4", "--optimization.batch-size", "4", "--algorithm.start", "clip"]
FIT += ["--no-report", "--trainer.accelerator", "cpu", "--no-float-baseline", "--optimization.distillation.weight", "0"]
TORCHRUN, PORT = ["-m", "torch.distributed.run"], 29461
FAIL = "scripts.check_launchers"  # run as a recipe's module, it lets rank 1 fail
SETTINGS = ("qat_config.yaml", "qat_manifest.json")
SECONDS = 240.0


def commands(launcher: str, module: str, arguments: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """The processes that a user, or a scheduler, would start: their arguments and variables."""
    nodes, devices = ("2", "1") if "nodes" in launcher else ("1", "2")
    own = [*arguments, "--trainer.devices", devices, "--trainer.num-nodes", nodes]
    if launcher == "Lightning":
        return [(["-m", module, *own], {})]
    if launcher == "torchrun":
        return [([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", module, *own], {})]
    if launcher == "torchrun, two nodes":
        shared = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(PORT)]
        return [([*TORCHRUN, *shared, "--node-rank", str(rank), "-m", module, *own], {}) for rank in range(2)]
    shared_variables = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    shared_variables |= {"SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    shared_variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "SLURM_LOCALID": "0"}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    return [(["-m", module, *own], shared_variables | own_variables) for own_variables in ranks]


LAUNCHERS = ("Lightning", "torchrun", "torchrun, two nodes", "SLURM, two nodes")


def launch(launcher: str, module: str, arguments: list[str], folder: Path) -> tuple[bool, int]:
    """Run in a folder; whether every process ended well, and how many were left when the last of ours had ended."""
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("ab") as log:
        started = [
            subprocess.Popen(
                [sys.executable, *own],
                cwd=folder,
                env=environment | given,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for own, given in commands(launcher, module, arguments)
        ]
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and any(process.poll() is None for process in started):
        time.sleep(0.2)
        if "SLURM" in launcher and any(process.poll() for process in started):  # srun --kill-on-bad-exit
            for process in started:
                process.kill()
    time.sleep(1)
    left = _processes_in(folder)
    for number in left:
        os.kill(number, signal.SIGKILL)
    return all(process.wait() == 0 for process in started), len(left)


def _processes_in(folder: Path) -> list[int]:
    """Running processes whose working directory is a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == folder
            if here and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def fail() -> None:
    """Run the recipe, with a block that fails in the third step of rank 1, while others wait for its shards."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP

    from recipes import causal_lm

    inner, calls = LlamaMLP.forward, [0]

    def forward(module: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 3 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("a failure of rank 1")
        return inner(module, x)  # type: ignore[no-any-return,no-untyped-call]

    LlamaMLP.forward = forward  # type: ignore[method-assign]
    causal_lm.main(sys.argv[1:])


def main() -> int:
    """Print a line for each launcher; the number of faults."""
    if any(argument.startswith("--trainer.") for argument in sys.argv):
        fail()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--folder", type=Path, default=Path("outputs/launchers"))
    given = parser.parse_args()
    root = given.folder.absolute()
    shutil.rmtree(root, ignore_errors=True)
    (source, kind), sizes, own = OPTIONS["causal_lm"]
    make_data(root / "data")
    make_model(source, kind, sizes, root / "model")
    data = [str(root / word[3:]) if word.startswith("../") else word for word in own]
    faults = 0
    for strategy in given.strategies:
        arguments = ["--model", str(root / "model"), "--output", "out", *data, *FIT, "--trainer.strategy", strategy]
        wanted: dict[str, bytes] = {}
        for launcher in LAUNCHERS:
            folder = root / strategy / launcher.replace(", ", "_").replace(" ", "_")
            well, left = launch(launcher, "recipes.causal_lm", arguments, folder)
            found = files_of(folder) if well else {}
            found = {name: file for name, file in found.items() if not name.endswith(SETTINGS)}
            wanted = wanted or found
            equal = well and found == wanted and not left
            faults += not equal
            print(
                f"{strategy}, {launcher}: {'equal' if equal else f'ended well: {well}, left: {left}, other files'}",
                flush=True,
            )
            broken = folder.with_name(f"{folder.name}_fails")
            well, left = launch(launcher, FAIL, arguments, broken)
            told = "a failure of rank 1" in (broken / "log.txt").read_text()
            faults += well or left > 0 or not told
            print(
                f"{strategy}, {launcher}, rank 1 fails: error: {not well}, told: {told}, processes left: {left}",
                flush=True,
            )
    return faults


if __name__ == "__main__":
    sys.exit(bool(main()))
