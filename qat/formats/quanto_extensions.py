"""Quanto's compiled kernels, which it builds when they are first used: what hinders that is an error with a name.

Most int4 and int2 weights need them. Torch makes a file ``lock`` in the folder of the build, and removes it at the
end. Where a process is killed in between, all later ones wait for that file, silently and without end. So the file is
looked at before: a living process has it open, as ``/proc`` shows. Another machine, or another container, may build in
a shared folder too. So a lock that no process here holds is waited for until it is older than any build.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qat.errors import StateError

__all__ = ["guard_extensions"]

logger = logging.getLogger("qat")
_LONGEST_BUILD = 600.0  # seconds


@functools.cache
def guard_extensions() -> None:
    """Let quanto's extensions, once, raise a `StateError` where they cannot be built, and not wait without end."""
    from optimum.quanto.library.extensions.extension import Extension

    load: Callable[[Any], Any] = Extension.lib.fget
    Extension.lib = property(functools.partial(_loaded, load))


def _loaded(load: Callable[[Any], Any], extension: Any) -> Any:
    if extension._lib is None:
        _await(Path(extension.build_directory, "lock"))
    try:
        return load(extension)
    except Exception as error:
        raise StateError(
            f"optimum-quanto's kernels {extension.name!r}, which these weights need here, could not be built in "
            f"{extension.build_directory!r}: {type(error).__name__}: {' '.join(str(error).split())[:500]}; make that "
            "folder writable for you, and install ninja and a C++ compiler"
        ) from error


def _await(lock: Path) -> None:
    """Wait until a build has ended; `StateError` when its lock is old and no process here has it open."""
    told = False
    while (age := _age(lock)) is not None:
        if not _is_open(lock):
            remedy = f"if nothing builds there, delete {str(lock)!r}"
            if age > _LONGEST_BUILD:
                raise StateError(
                    f"a killed build of optimum-quanto's kernels left a lock, {age / 60:.0f} minutes old, for which "
                    f"these weights would wait without end: {remedy}"
                )
            if not told:
                logger.warning(
                    "optimum-quanto's kernels have a lock that no process of this machine holds: waiting until it is "
                    "%d minutes old; %s",
                    *(_LONGEST_BUILD / 60, remedy),
                )
                told = True
        time.sleep(0.2)


def _age(lock: Path) -> float | None:
    """Seconds since a file was made; None if there is none."""
    with suppress(FileNotFoundError):
        return time.time() - lock.stat().st_mtime
    return None


def _is_open(path: Path) -> bool:
    """Whether a process has a file open, as far as this system shows."""
    wanted = os.path.realpath(path)
    for process in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(OSError):  # it has ended, or is another user's
            for name in os.listdir(handles := Path("/proc", process, "fd")):
                with suppress(OSError):
                    if os.readlink(handles / name) == wanted:
                        return True
    return False
