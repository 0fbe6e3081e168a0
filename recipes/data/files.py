"""The one place that opens a user's files: regular files that may be read, and text that is UTF-8.

A pipe, a socket or a device would never end, and a link to nothing holds nothing: each is an error that names it, and
nothing is read before. Hidden files and folders, whose names begin with a dot, are no data: programs leave them behind.

Text is read in pieces, since a tokenizer takes some two hundred bytes of memory for each byte that it is given at once.
A piece ends at a line end between two characters that are no white space. There the tokenizers that split at white
space give the tokens of the whole text. Some others put a mark in front of each text, and so one more before a piece.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from recipes.data import DataError

__all__ = ["PIECE", "check_text", "file_fault", "files_below", "pieces", "pieces_of", "read_text", "require_file"]

PIECE = 2**20
"""Characters a piece, at most."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def file_fault(path: Path) -> str | None:
    """Why a path is no file to read, or None.

    >>> file_fault(Path("/"))
    'is a folder, no file'
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be opened ({getattr(error, 'strerror', error)})"
    if kind != stat.S_IFREG:
        return f"is {_KINDS.get(kind, 'something else')}, no file"
    if str(path).encode("utf-8", "replace").decode() != str(path):
        return "has a name that is no UTF-8"
    return None if os.access(path, os.R_OK) else "may not be read (no permission)"


def require_file(path: Path) -> os.stat_result:
    """Return the facts of a regular file that may be read.

    Raises:
        DataError: it is none.
    """
    if (fault := file_fault(path)) is not None:
        raise DataError(f"data.source: {str(path)[:500]!r} {fault}: give a regular file, or remove it")
    return path.stat()


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a folder that have one of these suffixes, hidden ones left out, sorted by path.

    Raises:
        DataError: one of them is no regular file that may be read, or a folder may not be.
    """
    found: list[Path] = []
    for at, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(at, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.suffix.lower() in suffixes]
    for file in found:
        require_file(file)
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"data.source: {error.filename!r} cannot be read ({error.strerror}): allow it, or remove it")


def pieces_of(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most `PIECE` characters; pieces of white space alone are left out.

    >>> list(pieces_of("one piece"))
    ['one piece']
    """
    return _pieces([text])


def pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file as `pieces_of` does, without ever holding all of it. A byte order mark is left out.

    Raises:
        DataError: it is no regular file, is not UTF-8, or holds NUL.
    """
    return _pieces(_chunks(path))


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > PIECE:
            stop = start + _piece_end(rest[start : start + PIECE + 1])
            if not (piece := rest[start:stop]).isspace():
                yield piece
            start = stop
        rest = rest[start:]
    if rest and not rest.isspace():
        yield rest


def _piece_end(text: str) -> int:
    """Where the first piece of a text ends, given one character more than a piece has."""
    for mark, kept in (("\n", 1), (" ", 0)):  # the space stays before its word, of which it is a part for a tokenizer
        place = PIECE
        while (place := text.rfind(mark, PIECE // 2, place)) > 0:
            if not text[place - 1].isspace() and text[place + 1].isalnum():
                return place + kept
    return text.rfind("\n", PIECE // 2, PIECE) + 1 or PIECE


def _chunks(path: Path) -> Iterator[str]:
    require_file(path)
    lines = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            while chunk := file.read(PIECE):
                if "\0" in chunk:
                    lines += chunk[: chunk.index("\0")].count("\n")
                    raise DataError(
                        f"data.source: {str(path)!r} holds NUL in line {lines + 1}: it is no text, remove it"
                    )
                lines += chunk.count("\n")
                yield chunk
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.source: {str(path)!r} is not UTF-8 ({error.reason} in line {lines + 1} or later): save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"data.source: {str(path)!r} cannot be read ({error.strerror}): mend or remove it") from error


def check_text(path: Path) -> None:
    """Check that a file is UTF-8 text.

    Raises:
        DataError: as `pieces`.
    """
    for _ in _chunks(path):
        pass


def read_text(path: Path, most: int | None = None) -> str:
    """Return the text of a file.

    Raises:
        DataError: as `pieces`, or it has more than ``most`` bytes.
    """
    if most is not None and (size := require_file(path).st_size) > most:
        raise DataError(f"data.source: {str(path)!r} has {size} bytes, and at most {most} are read: shorten it")
    return "".join(_chunks(path))
