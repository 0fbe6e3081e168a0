"""How a user's files go wrong: what `scripts._bad_data_cases` writes in place of good data."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = [
    "SPECIAL",
    "TABLE",
    "WORDS",
    "Make",
    "Write",
    "all_of",
    "bomb",
    "captioned",
    "classes",
    "damaged_table",
    "files",
    "halved",
    "images",
    "index",
    "lines",
    "metadata",
    "named",
    "one",
    "other_tensors",
    "png",
    "replaced",
    "saved",
    "shards",
    "sparse",
    "texts",
    "under",
    "written",
]

Make = Callable[[Path], object]
"""Writes data into a folder; what it returns, if anything, is the source in place of the folder."""
WORDS = " ".join(f"w{number}" for number in range(40)) + "\n"
TABLE = "text,label\n" + "".join(f"some words {number},{'ab'[number % 2]}\n" for number in range(20))
Write = Callable[[Path], object]


def png(side: int = 8, **how: Any) -> bytes:
    made = io.BytesIO()
    Image.new("L", (side, side), 9).save(made, "PNG", **how)
    return made.getvalue()


def bomb(path: Path) -> None:
    """A picture of 10^10 black pixels, said in its header alone."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(99)),
        b"IEND": b"",
    }
    made = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(made))


def _socket(path: Path) -> None:
    there = os.open(path.parent, os.O_RDONLY)  # a socket's path may have 107 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{there}/{path.name}")
    finally:
        os.close(there)


def _unreadable(path: Path) -> None:
    path.write_bytes(png() if path.suffix == ".png" else WORDS.encode())
    path.chmod(0)


SPECIAL: dict[str, Write] = {
    "a named pipe": os.mkfifo,
    "a socket": _socket,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a file without read permission": _unreadable,
}


def written(content: bytes | str) -> Write:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def all_of(*steps: Make) -> Make:
    """The folder, after all these."""

    def make(folder: Path) -> None:
        for step in steps:
            step(folder)

    return make


def under(name: str, write: Write) -> Make:
    """One more file of the folder."""
    return lambda folder: write(folder / name)


def sparse(path: Path) -> None:
    """A terabyte of NUL that takes no room."""
    path.touch()
    os.truncate(path, 2**40)


def texts(name: str, write: Write) -> Make:
    def make(folder: Path) -> None:
        for number in range(12):
            (folder / f"{number}.txt").write_text(WORDS)
        write(folder / name)

    return make


def one(name: str, write: Write) -> Make:
    """A single file, which is the source."""

    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


def files(**contents: str) -> Make:
    def make(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name.replace("_", ".").replace("SLASH", "/")).write_text(content)

    return make


def captioned(folder: Path, names: tuple[str, ...] = tuple("abcdef")) -> None:
    for name in names:
        (folder / f"{name}.png").write_bytes(png())
        (folder / f"{name}.txt").write_text(f"a picture {name}")


def images(name: str, write: Write, caption: Write | None = None) -> Make:
    def make(folder: Path) -> None:
        captioned(folder)
        (caption or written("a caption"))((folder / name).with_suffix(".txt"))
        if write is not None:
            write(folder / name)

    return make


def metadata(name: str, content: bytes | str) -> Make:
    def make(folder: Path) -> None:
        captioned(folder)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def classes(name: str | None = None, write: Write | None = None, classes: tuple[str, ...] = ("cat", "dog")) -> Make:
    def make(folder: Path) -> None:
        for number, kind in enumerate(classes):
            (folder / kind).mkdir()
            for image in range(4):
                Image.new("L", (8, 8), 40 * number + image).save(folder / kind / f"{image}.png")
        if name is not None and write is not None:
            write(folder / name)

    return make


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def named(*names: Any) -> str:
    return lines(*({"file_name": name, "caption": "words"} for name in names))


def index(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(folder: Path) -> None:
        file = next(folder.glob("*.json"))
        index = json.loads(file.read_text())
        changed = change(index)
        file.write_text(json.dumps(index if changed is None else changed))

    return make


def shards(write: Write) -> Make:
    def make(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            write(file)

    return make


def replaced(write: Write) -> Write:
    def replace(path: Path) -> None:
        path.unlink()
        write(path)

    return replace


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_tensors(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor[:1] for name, tensor in load_file(path).items()}, path)


def saved(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_dict({"text": [WORDS] * 20, "label": ["a", "b"] * 10}).save_to_disk(folder / "saved")
    return folder / "saved"


def damaged_table(folder: Path) -> Path:
    there = saved(folder)
    halved(next(there.glob("*.arrow")))
    return there
