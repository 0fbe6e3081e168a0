"""Files and directories that appear whole or not at all, and what is said where they cannot be written.

What is written goes into a folder of its own beside the destination, such as ``.NAME.1f2e3d4c.tmp``: the same file
system, so that a rename is atomic. At the end all of it is on the disk (fsync), and one rename puts it in its place. A
directory that is there already changes places with the new one in that same step (Linux, ``RENAME_EXCHANGE``). Where
the system or the file system cannot do that, it is moved aside first. A process that dies between these two renames
leaves nothing under the name, and the next writing puts the old directory back.

Such a folder is locked (``flock``) as long as its process lives. So the next writing to the same destination removes
what dead processes left, and nothing of a live one. Where a file system has no locks, leftovers stay.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qat.errors import ExportError, QatError

__all__ = ["clear_leftovers", "explained", "sync", "whole_directory", "whole_file"]

_OLD = "old"  # a directory that was moved aside
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REMEDIES = {
    errno.ENOSPC: "free space or choose another disk",
    errno.EDQUOT: "free space of your quota or choose another disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f) or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}


@contextmanager
def whole_file(path: Path, *, beside: Path | None = None) -> Iterator[Path]:
    """Give a path of the same name to write a file to, which takes the place of ``path`` when the block ends well.

    Args:
        path: the file; its folder must exist.
        beside: what to make the temporary folder beside, on the same file system; none: ``path``.

    Raises:
        ExportError: the disk does not take it. Nothing is left behind then, and an old file is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder, "scores.json")) as made:
    ...         _ = made.write_text("{}")
    ...     [path.name for path in Path(folder).iterdir()]
    ['scores.json']
    """
    with _folder_beside(beside or path, path) as folder:
        yield (made := folder / path.name)
        sync(made)
        made.replace(path)
    _settle(path)


@contextmanager
def whole_directory(
    destination: Path, *, wanted: int = 0, check: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Give a directory to write into, which takes the place of ``destination`` when the block ends well.

    Args:
        destination: missing, empty or to be replaced; folders above it are made.
        wanted: the bytes that are needed at least, where the caller knows, for the error of a full disk.
        check: called once more before the directory takes its place, to say with an error that it must not.

    Raises:
        ExportError: the disk does not take it. Nothing is left behind then, and an old directory is untouched.
    """
    with explained(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
    with _folder_beside(destination, destination, wanted) as folder:
        (made := folder / "new").mkdir()
        yield made
        for path in made.rglob("*"):
            sync(path)
        sync(made)
        check()
        _put(made, destination)
    _settle(destination)


@contextmanager
def explained(destination: Path, *, parts: Path | None = None, wanted: int = 0) -> Iterator[None]:
    """Turn what a disk refuses into one error that says what could not be written where, why, and what helps.

    Args:
        destination: what is written.
        parts: the file or folder that holds what was written until then.
        wanted: the bytes that are needed at least, where the caller knows.

    Raises:
        ExportError: for an error of the system. All other exceptions pass.
    """
    try:
        yield
    except QatError:
        raise
    except Exception as error:
        if (number := _number(error)) is None:
            raise
        named = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        raise ExportError(
            f"{str(destination)!r} could not be written, and nothing is left of it: "
            f"{_reason(number, destination, parts, wanted)}{named}"
        ) from error


def clear_leftovers(destination: Path) -> None:
    """Remove what processes that died left beside ``destination``; a directory that they moved aside comes back."""
    ours = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(destination.parent)):
            with suppress(OSError):
                lock = os.open(folder := destination.with_name(name), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which one of a live process refuses
                    _give_back(folder / _OLD, destination)
                    _remove(folder)
                finally:
                    os.close(lock)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _folder_beside(neighbour: Path, destination: Path, wanted: int = 0) -> Iterator[Path]:
    """A locked folder that is removed at the end."""
    clear_leftovers(neighbour)
    with explained(destination):
        folder, lock = _locked_folder(neighbour)
    try:
        with explained(destination, parts=folder, wanted=wanted):
            yield folder
    finally:
        os.close(lock)
        with suppress(OSError):
            _remove(folder)


def _locked_folder(neighbour: Path) -> tuple[Path, int]:
    """A new folder, with the rights of an ordinary one, and the handle that locks it."""
    while True:
        folder = neighbour.with_name(f".{neighbour.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # before it was locked, another process took it for a leftover
            continue
        except OSError:
            folder.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, lock
        except BlockingIOError:  # that process removes it now
            pass
        except OSError:  # a file system without locks
            return folder, lock
        os.close(lock)


def _put(made: Path, destination: Path) -> None:
    try:
        made.rename(destination)  # which takes the place of an empty directory too
        return
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
    if _exchange(made, destination):
        return
    destination.rename(old := made.with_name(_OLD))
    try:
        made.rename(destination)
    except BaseException:
        old.rename(destination)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _settle(destination: Path) -> None:
    """Wait until the new name is on the disk."""
    try:
        sync(destination.parent)
    except OSError as error:
        raise ExportError(
            f"{str(destination)!r} is written, but may be lost when the machine stops: {error.strerror}; check the disk"
        ) from error


def _remove(folder: Path) -> None:
    """Remove a folder with all in it, with one open file at a time: `shutil.rmtree` needs several."""
    for name in os.listdir(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink()
    folder.rmdir()


def _give_back(old: Path, destination: Path) -> None:
    """Give a directory that was moved aside its name back, unless the new one has it."""
    try:
        old.rename(destination)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise


def _number(error: BaseException | None) -> int | None:
    """The error number of the system that an exception stands for.

    Libraries in Rust write it into their message. ``torch.save`` raises an error of its own while it handles one.
    """
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _reason(number: int, destination: Path, parts: Path | None, wanted: int) -> str:
    """What an error number of the system means here, with the space that is there and wanted, and the remedy."""
    reason = os.strerror(number)
    if number in _FULL:
        written, left = _size(parts) if parts else 0, ""
        if number == errno.ENOSPC:
            with suppress(OSError):
                left = f" and has {shutil.disk_usage(destination.parent).free:,} left"
        least = f"at least {wanted:,} are" if wanted > written else "more is"
        reason += f": {str(destination.parent)!r} took {written:,} bytes{left}, and {least} wanted"
    return f"{reason}; {_REMEDIES.get(number, 'check the path and its rights')}, then run it again"


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    with suppress(OSError):
        files = [path] if path.is_file() else path.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0
