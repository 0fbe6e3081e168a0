"""Whether a new directory can be made at a place: asked before hours of training, not after them."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from qat.errors import ExportError, shown

__all__ = ["check_place", "like_folder"]

_BESIDE = 48
"""The most characters that a name beside the directory has more, while it is written and for checkpoints."""


def check_place(place: str | os.PathLike[str], argument: str) -> Path:
    """The absolute path of a place where a directory can be made, or replaced.

    Nothing is left there: a folder is made and removed in the nearest folder that exists.

    Args:
        place: what the user gave.
        argument: what the user calls it, for the message.

    Raises:
        ExportError: it names no folder of its own (as an empty text, ".", "/" do), is a file or a link, lies below a
            file, begins with the name of no user, is too long, or nothing can be written there.
    """
    path, told = Path(os.path.abspath(os.fspath(place) or ".")), shown(os.fspath(place))
    try:
        if Path.cwd().is_relative_to(path):
            raise ExportError(f"{argument}: {told} is the current folder, or holds it: give the name of a new one")
        if os.fspath(place).startswith("~"):
            raise ExportError(f"{argument}: {told} begins with ~, and there is no user of that name here: write it out")
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ExportError(f"{argument}: {told} is a file or a link: choose another name")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path.with_name(path.name + "x" * _BESIDE))
        nearest = next(parent for parent in path.parents if os.path.lexists(parent))
        if not nearest.is_dir():
            raise ExportError(f"{argument}: {told} lies below {str(nearest)!r}, which is a file: choose another name")
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=nearest))
    except OSError as error:
        raise ExportError(
            f"{argument}: {told} cannot be written: {error.strerror}: choose another place or a shorter name"
        ) from error
    except ValueError as error:  # a NUL character
        raise ExportError(f"{argument}: {told} is no path: {error}: choose another name") from error
    return path


def like_folder(path: str | os.PathLike[str]) -> str:
    """The folder that a path is a misspelling of, as a question for the end of an error; empty if there is none."""
    folder, name = os.path.split(os.fspath(path).rstrip("/"))
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except (OSError, ValueError):  # of a folder that cannot be read, and of a NUL character
        return ""
    close = get_close_matches(name, names, n=1)
    return f" (did you mean {shown(os.path.join(folder, close[0]))}?)" if close else ""
