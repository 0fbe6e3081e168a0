"""Make every mistake of `scripts.mistakes`, on command lines, in YAML and in model folders, and judge the answer.

The answer is right when it comes in time, has the documented exit code and the expected words, is short, shows no
traceback, and leaves no file behind. One process imports the libraries; each mistake is made in a fork of it, in an
empty folder, with a limit of time and of memory. Prints a line for each answer that is not right, and the count::

    python -m scripts.check_mistakes [--only resume] [--patience 4] [--verbose] [--cold]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import logging
import os
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts._mistaken_files import prepare, prepare_models
from scripts.mistakes import CASES, Mistake
from scripts.newcomers import fill

__all__ = ["SLOW", "Answer", "faults", "make"]

_ADDRESSES = 8 << 30  # bytes that a fork may map beyond what it begins with
_LIBRARIES = "datasets lightning transformers.utils.logging diffusers.utils.logging torch.utils.flop_counter"
_OURS = "qat.verification qat.conversion qat.calibration recipes.common.experiment recipes.common.run"
SLOW = [*_LIBRARIES.split(), *_OURS.split(), "recipes.common.models", "recipes.text_to_image"]
"""What a program imports when it has work to do; here once, before all forks."""
_LONGEST = 2000  # characters of a good message


class Answer(NamedTuple):
    """What a program did about a mistake."""

    code: int
    """Its exit code; that of the signal, below 0, where one ended it."""
    told: str
    """All that it wrote, without the frames of the command line's parser."""
    seconds: float
    left: tuple[str, ...]
    """Files that it left behind."""


def _run(words: Sequence[str]) -> None:
    """Be the program: ``qat`` or a recipe."""
    if words[0] == "qat":
        importlib.import_module("qat.cli").main(words[1:])
    recipe = importlib.import_module(f"recipes.{words[0]}")
    importlib.import_module("qat.report").run_command(recipe.main, words[1:])


def _be(words: Sequence[str], folder: Path, output: Path, cold: bool) -> None:
    os.chdir(folder)
    os.setpgid(0, 0)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if cold:
        module = "qat" if words[0] == "qat" else f"recipes.{words[0]}"
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-m", module, *words[1:]])
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESSES, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for handler in logging.getLogger().handlers:
        logging.getLogger().removeHandler(handler)
    warnings.simplefilter("ignore")
    code: object = 0
    try:
        _run(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _names(folder: Path) -> set[str]:
    """What lies in the folder that mistakes name, two levels deep."""
    return {str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("[!t]*/*"))}


def make(mistake: Mistake, folder: Path, patience: float = 1.0, *, cold: bool = False) -> Answer:
    """Make a mistake in a fork, or in a new program, with the files of `scripts._mistaken_files` in a folder."""
    known = _names(folder)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        empty = Path(place, "empty")
        empty.mkdir()
        output = Path(place, "output")
        argv = mistake.words(folder, Path(place))
        began = time.monotonic()
        process = os.fork()
        if process == 0:
            _be(argv, empty, output, cold)
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            time.sleep(0.005)
            if time.monotonic() - began > patience * mistake.seconds + 1:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGKILL)
                ended = os.waitpid(process, 0)
                break
        seconds = time.monotonic() - began
        told = " ".join(re.sub("[│╭╮╰╯─]", " ", output.read_text(errors="replace")).split())
        left = sorted(str(path.relative_to(empty)) for path in empty.rglob("*"))
        left += sorted(_names(folder) - known - {Path(place).name})
        return Answer(os.waitstatus_to_exitcode(ended[1]), told, seconds, tuple(left))


def faults(mistake: Mistake, answer: Answer, patience: float = 1.0) -> list[str]:
    """What is not right about an answer, by kind."""
    found = {
        f"no answer in {mistake.seconds:g} s": answer.seconds > patience * mistake.seconds,
        "a traceback": "Traceback (most recent" in answer.told,
        f"exit code {answer.code}, not {mistake.code}": answer.code != mistake.code,
        "other words": re.search(mistake.expected, answer.told) is None,
        f"{len(answer.told)} characters": len(answer.told) > _LONGEST,
        f"left {', '.join(answer.left[:3])}": bool(answer.left),
    }
    return [fault for fault, wrong in found.items() if wrong]


def main() -> None:
    """Make the mistakes, and print what is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the names of the mistakes to make")
    parser.add_argument("--patience", type=float, default=1.0, help="how much longer answers may take")
    parser.add_argument("--cold", action="store_true", help="a new program for each, as a user starts it")
    parser.add_argument("--verbose", action="store_true", help="print all answers")
    options = parser.parse_args()
    chosen = [mistake for mistake in CASES if options.only in mistake.name]
    for module in () if options.cold else SLOW:
        importlib.import_module(module)
    kinds: collections.Counter[str] = collections.Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        prepare_models(Path(directory))
        fill(Path(directory))
        for mistake in chosen:
            answer = make(mistake, Path(directory), options.patience, cold=options.cold)
            found = faults(mistake, answer, options.patience)
            wrong += bool(found)
            kinds.update(re.sub(r"\d+|left.*", "N", fault) for fault in found)
            if found or options.verbose:
                told = answer.told if len(answer.told) < 700 else f"{answer.told[:350]} ... {answer.told[-350:]}"
                print(f"{mistake.name}: {'; '.join(found) or 'ok'} ({answer.seconds:.1f} s)\n    {told}", flush=True)
    print(f"{len(chosen)} mistakes, {wrong} answered wrongly: {dict(kinds)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
