"""A directory that appears whole or not at all.

Everything is written into a temporary directory beside the destination (the same file system, so that a rename is
atomic) and renamed at the end. An old directory is moved aside first and removed last; whatever fails in between
puts it back.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import ExportError, LoadError, QatError, listed, shown
from qat.files.manifest import CARD_NAME, MANIFEST_NAME, read_manifest
from qat.files.places import check_place

__all__ = ["as_path", "atomic_directory", "check_destination", "sync"]


def as_path(directory: object, error: type[QatError]) -> Path:
    """The path that a user gave as ``directory``; ``error`` when it is none."""
    if not isinstance(directory, str | os.PathLike):
        raise error(f"directory: must be a path, a text or a Path, got {shown(directory)}: name the directory")
    return Path(directory)


def check_destination(destination: Path, overwrite: bool, argument: str = "directory") -> None:
    """Raise when a destination cannot be written, before any work is done.

    Raises:
        ExportError: as `qat.files.places.check_place`, or when it is a non-empty directory and ``overwrite`` is off, or
            one with anything but an export: nothing else is ever removed.
    """
    check_place(destination, argument)
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    strange = _strange_files(destination, argument)
    if strange:
        raise ExportError(
            f"{argument}: {str(destination)!r} holds files that its export did not write ({listed(strange, 5)}), and "
            "overwrite=True would remove them: move them elsewhere, or choose another directory"
        )
    if not overwrite:
        raise ExportError(
            f"{argument}: {str(destination)!r} holds an export: choose another one, or pass overwrite=True "
            "(--overwrite)"
        )


def _strange_files(destination: Path, argument: str) -> list[str]:
    """The files that neither the manifest of an export lists nor its model card shows, as pictures."""
    try:
        known = {*read_manifest(destination).files, MANIFEST_NAME, CARD_NAME}
    except LoadError as error:
        raise ExportError(
            f"{argument}: {str(destination)!r} is not empty, and no manifest says of what: choose another one ({error})"
        ) from error
    card = destination / CARD_NAME
    shown = card.read_text(encoding="utf-8") if card.is_file() else ""
    files = sorted(path for path in destination.rglob("*") if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(destination).as_posix() for path in files]
    return [name for name in names if name not in known and f"]({name.replace(' ', '%20')})" not in shown]


@contextmanager
def atomic_directory(destination: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary directory that becomes ``destination`` when the block ends well.

    Raises:
        ExportError: for everything that fails inside, with nothing left behind and an old directory untouched.
    """
    check_destination(destination, overwrite)
    temporary: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(destination, "tmp")
        yield temporary
        sync(temporary)
        _replace(temporary, destination)
        sync(destination.parent)
    except QatError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            full = error.errno == errno.ENOSPC
            remedy = "free space or choose another disk" if full else "check the path and its rights"
            reason = f"{error.strerror or error}; {remedy}, then export again"
        raise ExportError(f"export to {str(destination)!r} failed and left nothing behind: {reason}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
        return
    old = _beside(destination, "old")
    destination.rename(old)  # onto an empty directory, which rename allows
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(destination: Path, suffix: str) -> Path:
    """An empty directory with the rights of an ordinary one, unlike those of `tempfile`."""
    directory = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.{suffix}")
    directory.mkdir()
    return directory
