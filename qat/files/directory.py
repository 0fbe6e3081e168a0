"""The directory of an export: what may be replaced there, and its writing as a whole (`qat.files.whole`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import ExportError, LoadError, QatError, listed, shown
from qat.files.manifest import CARD_NAME, MANIFEST_NAME, read_manifest
from qat.files.places import check_place
from qat.files.whole import clear_leftovers, explained, whole_directory

__all__ = ["as_path", "atomic_directory", "check_destination"]


def as_path(directory: object, error: type[QatError]) -> Path:
    """The path that a user gave as ``directory``; ``error`` when it is none."""
    if not isinstance(directory, str | os.PathLike):
        raise error(f"directory: must be a path, a text or a Path, got {shown(directory)}: name the directory")
    return Path(directory)


def check_destination(place: str | os.PathLike[str], overwrite: bool, argument: str = "directory") -> Path:
    """The absolute path of a directory that can be written; asked before any work is done.

    What a process left there that died while it wrote is cleared first, so that its old export is back.

    Raises:
        ExportError: as `qat.files.places.check_place`, or when it is a non-empty directory and ``overwrite`` is off, or
            one with anything but an export: nothing else is ever removed.
    """
    destination = check_place(place, argument)
    clear_leftovers(destination)
    with explained(destination):
        _check(destination, overwrite, argument)
    return destination


def _check(destination: Path, overwrite: bool, argument: str) -> None:
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
def atomic_directory(destination: Path, overwrite: bool, wanted: int = 0) -> Iterator[Path]:
    """Give a temporary directory that becomes ``destination`` when the block ends well.

    Raises:
        ExportError: for everything that fails inside, with nothing left behind and an old directory untouched.
    """
    check_destination(destination, overwrite)
    try:
        with whole_directory(
            destination, wanted=wanted, check=lambda: check_destination(destination, overwrite)
        ) as made:
            yield made
    except QatError:
        raise
    except Exception as error:
        raise ExportError(
            f"{str(destination)!r} could not be written, and nothing is left of it: {type(error).__name__}: {error}"
        ) from error
