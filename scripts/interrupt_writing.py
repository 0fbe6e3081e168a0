"""Interrupt whatever writes files, at random moments and at system calls, and fill the disk; see what is left.

    python -m scripts.interrupt_writing kills --count 50 [--seed 0] [--only export]
    python -m scripts.interrupt_writing calls [--only export]
    python -m scripts.interrupt_writing full --points 20
    python -m scripts.interrupt_writing errors --points 20

Each writing replaces what an earlier one wrote, in a forked process. `kills` sends SIGKILL at random moments. `calls`
does so at each system call that opens, writes or renames (by strace). After each kill the old or the new must be there,
byte for byte; both were verified before. After one more writing, nothing else may be there. `full` mounts small tmpfs
of growing size (as root), and `errors` lets system calls fail by strace: one `QatError` must say so, the old must be
untouched, and nothing may be left. Prints a line for each writing, and one of JSON for all.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qat.errors import QatError
from qat.files import whole
from qat.files.whole import clear_leftovers
from scripts._writings import WRITINGS, Writing

CALLS = (
    *("mkdir", "openat", "write", "pwrite64", "ftruncate", "fsync", "flock", "rename", "renameat2"),
    *("unlink", "unlinkat", "rmdir", "close"),
)
ERRORS = {
    "ENOSPC": ("write", "mkdir"),
    "EDQUOT": ("write", "mkdir"),
    "EIO": ("write", "fsync", "rename"),
    "EROFS": ("mkdir", "rename"),
}
GOOD = (
    *("old", "new", "between", "old, put back"),
    *("error, old", "error, between", "written, old", "written, new", "written, between"),
)
PAGE = 4096  # of tmpfs
_LEFT = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{8}\.tmp(/|$)|\.partial$")


class Ended(NamedTuple):
    """How a writing ended: its exit code, negative for a signal, and the error that it told."""

    code: int
    error: str


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(writing: Writing, folder: Path, files: int) -> tuple[int, int, int]:
    """Fork a process that writes when it is told to: its id, the handle to tell it by, and that of what it says."""
    told, tell = os.pipe()
    heard, hear = os.pipe()
    if child := os.fork():
        os.close(told)
        os.close(hear)
        return child, tell, heard
    code = 3
    try:
        os.close(tell)
        os.read(told, 1)
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        with contextlib.redirect_stdout(io.StringIO()):
            writing.write(folder, 1)
        code = 0
    except BaseException as fault:
        code = 2 if isinstance(fault, QatError) else 3
        os.writev(hear, [f"{type(fault).__name__}: {fault}".encode()[:4000]])  # a call that no fault is injected into
    os._exit(code)


def run(writing: Writing, folder: Path, inject: str = "", after: float | None = None, files: int = 0) -> Ended:
    """Write once more, with faults that strace injects, a kill after some seconds, or few files that may be open."""
    child, tell, heard = start(writing, folder, files)
    tracer = None
    if inject:
        traced = ["-e", f"trace={inject.partition(':')[0]}", "-e", f"inject={inject}"]
        tracer = subprocess.Popen(["strace", "-qqq", "-f", "-p", str(child), "-o", os.devnull, *traced])
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            time.sleep(0.001)
    os.write(tell, b"x")
    os.close(tell)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(heard, encoding="utf-8") as said:
        error = said.read()
    if tracer is not None:
        tracer.wait()
    return Ended(code, error)


class Trial:
    """A folder in which a writing replaces an older one, and what each leaves when nothing goes wrong."""

    def __init__(self, writing: Writing, root: Path) -> None:
        self.writing, self.folder, self.states = writing, root / writing.name, list[dict[str, bytes]]()
        for number in (0, 1):
            self.prepared(number == 0)
            self.write(number)
            self.states.append(files_of(self.folder))
            writing.check(self.folder)

    def write(self, number: int) -> None:
        """Write in this process, and say nothing."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.writing.write(self.folder, number)

    def prepared(self, anew: bool = True) -> Path:
        """The folder, with the older writing in it, or as it was before any."""
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.writing.prepare(self.folder)
        return self.folder

    def restored(self) -> Path:
        """The folder with the older writing in it."""
        self.prepared()
        for name, data in self.states[0].items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)
        return self.folder

    def found(self) -> str:
        """What is there: old, new, or what differs from both. Leftovers that the next writing removes do not count."""
        there = {name: data for name, data in files_of(self.folder).items() if not _LEFT.search(name)}
        if there in self.states:
            return ("old", "new")[self.states.index(there)]
        if not there and self.states[0]:  # in the gap between two renames
            clear_leftovers(self.folder / "out")
            return "old, put back" if files_of(self.folder) == self.states[0] else "missing"
        if self.writing.files_count_alone:  # such as a model card and its pictures: each is whole
            strange = [name for name, data in there.items() if data not in [state.get(name) for state in self.states]]
            missing = [name for name in self.states[0] if name in self.states[1] and name not in there]
            return self.writing.between(self.folder) if not strange + missing else f"mixture: {strange + missing}"
        return f"mixture of {sorted(there)}"

    def after_another(self) -> str:
        """What is there after one more writing: no leftover, and the new."""
        self.write(1)
        whole = files_of(self.folder) == self.states[1] and not self.leftovers()
        return "" if whole else f"left: {sorted(files_of(self.folder)) + self.leftovers()}"

    def leftovers(self) -> list[str]:
        """What a process leaves that dies while it writes."""
        names = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        return [name for name in names if _LEFT.search(name)]


def kills(trial: Trial, count: int, draw: random.Random) -> Iterator[str]:
    """Kill at random moments."""
    took = 0.0
    for _ in range(2):  # the second is warm
        trial.restored()
        begun = time.monotonic()
        run(trial.writing, trial.folder)
        took = time.monotonic() - begun
    for _ in range(count):
        trial.restored()
        run(trial.writing, trial.folder, after=draw.uniform(0, took))
        yield trial.found()
        if fault := trial.after_another():
            yield fault


def calls(trial: Trial) -> Iterator[str]:
    """Kill before each of the system calls that open, write, rename or remove."""
    for call in CALLS:
        for number in range(1, 10_000):
            trial.restored()
            if run(trial.writing, trial.folder, f"{call}:signal=KILL:when={number}").code == 0:
                break
            yield trial.found()
            if fault := trial.after_another():
                yield fault


def told(trial: Trial, ended: Ended, disk: bool) -> str:
    """Whether a writing that failed said so in one error, and left the old and nothing else."""
    if ended.code == 0:
        return trial.found()
    there, names = trial.found(), trial.leftovers()
    if ended.code != 2:
        return f"another error: {ended}"
    if str(trial.folder) not in ended.error or (disk and "wanted" not in ended.error):
        return f"an error without its place: {ended.error}"
    return f"left: {names}" if names else f"{'written' if 'is written' in ended.error else 'error'}, {there}"


def errors(trial: Trial, points: int) -> Iterator[str]:
    """Let one kind of system call fail, from one of its calls on: at some of these calls."""
    for name, failing in ERRORS.items():
        for call in failing:
            count = next(
                number
                for number in range(1, 10_000)
                if run(trial.writing, trial.restored(), f"{call}:signal=KILL:when={number}").code == 0
            )
            for number in sorted({1 + point * (count - 1) // points for point in range(points)} - {count}):
                ended = run(trial.writing, trial.restored(), f"{call}:error={name}:when={number}+")
                yield told(trial, ended, name == "ENOSPC" and call == "write")
    opened = max(int(name) for name in os.listdir("/proc/self/fd"))
    for more in range(points):
        yield told(trial, run(trial.writing, trial.restored(), files=opened + more), False)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A folder on a file system of some bytes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def full(trial: Trial, points: int) -> Iterator[str]:
    """Write over an older one on disks that are too small, of growing size, and on one that is just large enough."""

    def on(pages: int) -> str:
        with small_disk(pages * PAGE) as disk:
            trial.folder = disk / trial.writing.name
            return told(trial, run(trial.writing, trial.restored()), True)

    with small_disk(64 << 20) as disk:
        trial.folder = disk / trial.writing.name
        trial.restored()
        used = shutil.disk_usage(disk).used // PAGE
    most = used + 20 + sum(-(-len(data) // PAGE) + 2 for data in trial.states[1].values())
    enough = bisect.bisect_left(range(used, most), 1, key=lambda pages: on(pages) == "new")
    for pages in sorted({used + point * enough // points for point in range(points)} | {used + enough}):
        yield on(pages)


def main() -> int:
    """Interrupt, and print what was left; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["kills", "calls", "full", "errors"])
    parser.add_argument("--two-renames", action="store_true", help="as on a file system that cannot exchange")
    parser.add_argument("--only", nargs="*", default=[writing.name for writing in WRITINGS])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.two_renames:
        vars(whole)["_exchange"] = lambda *_: False
    summary: dict[str, Any] = {"how": given.how, "count": given.count, "points": given.points, "seed": given.seed}
    faults = 0
    for writing in WRITINGS:
        if writing.name not in given.only:
            continue
        with tempfile.TemporaryDirectory() as root:
            trials: dict[str, Callable[[], Iterator[str]]] = {
                "kills": lambda: kills(Trial(writing, Path(root)), given.count, random.Random(given.seed)),  # noqa: B023
                "calls": lambda: calls(Trial(writing, Path(root))),  # noqa: B023
                "errors": lambda: errors(Trial(writing, Path(root)), given.points),  # noqa: B023
                "full": lambda: full(Trial(writing, Path(root)), given.points),  # noqa: B023
            }
            outcomes: dict[str, int] = {}
            for outcome in trials[given.how]():
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
        faults += sum(outcomes[kind] for kind in outcomes if kind not in GOOD)
        summary[writing.name] = outcomes
        print(writing.name, outcomes, flush=True)
    print(json.dumps({**summary, "faults": faults}))
    return faults


if __name__ == "__main__":
    sys.exit(bool(main()))
