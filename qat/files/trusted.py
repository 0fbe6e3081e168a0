"""Which files of an exported directory may be opened: a directory may come from anybody.

A name is a plain one, below the directory. What it names is a regular file there: a pipe or a device would never end,
and a link would lead elsewhere. Links of the hub's cache are the exception, since its snapshots consist of them.
Loaders open files by their names again, so the directory must not change during a load.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qat.errors import LoadError

__all__ = ["MOST_TEXT", "file_fault", "read_json", "regular_file", "strays"]

MOST_TEXT = 100_000_000
"""Bytes that a header, or a JSON file, may have: both are read as a whole. Rust's safetensors has the same bound."""

# What the loaders of model libraries look for by name, whether or not a manifest lists it.
_SOUGHT = re.compile(
    r"(config(\..*)?|generation_config|adapter_config|.*\.index)\.json|.*\.(safetensors|gguf)"
    r"|((diffusion_)?pytorch_|adapter_|tf_|flax_)model.*\.(bin|h5|msgpack)"
)


def file_fault(directory: Path, name: str) -> str | None:
    """Why a name of a directory may not be opened, or None.

    >>> file_fault(Path("/"), "../etc/passwd")
    "'../etc/passwd' is no plain name of a file in the directory"
    """
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & {*name.split("/")}:
        return f"{name[:200]!r} is no plain name of a file in the directory"
    path = os.path.join(directory, name)
    try:
        folder, found = os.path.realpath(directory), os.path.realpath(path)
        if not os.path.lexists(path):
            return f"{name} is missing"
        snapshots = os.path.dirname(folder)
        in_cache = os.path.basename(snapshots) == "snapshots" and os.path.dirname(found) == os.path.join(
            os.path.dirname(snapshots), "blobs"
        )
        if found != os.path.join(folder, name) and not in_cache:
            return f"{name} is a link, or lies below one: put the file itself there"
        if not stat.S_ISREG(os.lstat(found).st_mode):
            return f"{name} is not a regular file"
    except OSError as error:
        return f"{name[:200]} cannot be read: {error.strerror}"
    return None


def regular_file(directory: Path, name: str, most: int | None = None) -> Path:
    """The path of a file that may be opened, of at most so many bytes.

    Raises:
        LoadError: it may not, or is larger.
    """
    fault, path = file_fault(directory, name), directory / name
    if fault is None and most is not None and (size := path.stat().st_size) > most:
        fault = f"{name} has {size} bytes, and at most {most} are read"
    if fault is not None:
        raise LoadError(f"{str(directory)!r}: {fault}: export the model again with qat.export, or restore its files")
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        LoadError: it may not be opened, is too large, or holds no mapping in JSON.
    """
    try:
        fields: Any = json.loads(regular_file(directory, name, MOST_TEXT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{name} in {str(directory)!r} is no JSON that can be read: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise LoadError(f"{name} in {str(directory)!r} must hold a mapping, got a {type(fields).__name__}")
    return fields


def strays(directory: Path, listed: Collection[str], *sought: str) -> list[str]:
    """Files that loaders would open, and no manifest lists: an index beside a single file wins over it."""
    names = sorted(os.listdir(directory))
    return [
        f"{name} is not one of the exported files, and loaders would open it: move it elsewhere"
        for name in names
        if name not in listed and (name in sought or _SOUGHT.fullmatch(name))
    ]
