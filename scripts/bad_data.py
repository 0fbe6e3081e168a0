"""Give the recipes data with mistakes, and see whether each is one good error.

    python -m scripts.bad_data [--only images] [--verbose]

Each case runs in a process of its own, forked from this one, with a limit of time and of memory. Those about permission
run as a user without special rights. A good error is a `QatError` of one line, or a rule of the settings, that names
the file or the field. The data of some cases is unusual, and right: these must pass.
"""

from __future__ import annotations

import argparse
import collections
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError

from qat.errors import QatError
from scripts._bad_data_cases import CASES, Case, load

GOOD, NOBODY, LONGEST = "good", 65534, 1500
SECONDS, MEMORY = 20, 6 * 2**30


def judged(case: Case, folder: Path) -> str:
    """Run a case and say what came of it, in a word, a colon and the message."""
    folder.mkdir(exist_ok=True)
    try:
        load(case, folder / "data", folder / "cache")
    except (QatError, ValidationError) as error:
        text = str(error)
        if not case.named:
            return f"refused: {text}"
        if case.named not in text:
            return f"not named: {text}"
        lines = len(text.splitlines())
        return f"{'too long' if len(text) > LONGEST or (lines > 1 and isinstance(error, QatError)) else GOOD}: {text}"
    except MemoryError as error:
        return f"memory: {error}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {traceback.format_exc(limit=-3)}"
    return f"silent: it must name {case.named}" if case.named else f"{GOOD}: passes"


def run(case: Case, folder: Path) -> str:
    """`judged` in a forked process."""
    folder.mkdir()
    out = folder / "outcome"
    os.chmod(folder, 0o777)
    if (child := os.fork()) == 0:
        _child(case, folder, out)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "hang" if os.WTERMSIG(status) == signal.SIGALRM else f"killed by signal {os.WTERMSIG(status)}"
    return out.read_text() if out.exists() else f"ended with {status}"


def _child(case: Case, folder: Path, out: Path) -> NoReturn:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if case.as_nobody and os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        warnings.simplefilter("ignore")
        out.write_text(judged(case, folder), errors="backslashreplace")
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose kind or name holds this")
    parser.add_argument("--verbose", action="store_true", help="show all messages, not those of failures alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = [case for case in CASES if arguments.only in str(case)]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    base = Path(tempfile.mkdtemp(prefix="bad-data-"))
    base.chmod(0o777)
    start = time.perf_counter()
    try:
        for number, case in enumerate(case for case in CASES if not case.named):  # so that all is imported
            judged(case, base.joinpath(f"first-{number}"))
        for number, case in enumerate(chosen):
            outcome = run(case, base / str(number))
            word = outcome.partition(":")[0]
            counts[case.kind][word] += 1
            if arguments.verbose or word != GOOD:
                print(f"{case}\n    {outcome[:3000]}", flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    total = sum(counts.values(), collections.Counter())
    for kind, found in counts.items():
        print(f"{kind}: {', '.join(f'{count} {word}' for word, count in found.most_common())}")
    seconds = time.perf_counter() - start
    print(f"{len(chosen)} cases, {total[GOOD]} good, in {seconds:.0f} s: {dict(total)}")
    sys.exit(total[GOOD] != len(chosen))


if __name__ == "__main__":
    main()
