"""GGUF files of exports, read by the package gguf, and changed behind the manifest's hashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf

from tests.exports import forge_files


def gguf_file(directory: Path) -> Path:
    (path,) = directory.glob("*.gguf")
    return path


def stored(directory: Path) -> dict[str, Any]:
    """The tensors of the file, by its own names."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file(directory)).tensors}


def forge(directory: Path, content: bytes) -> None:
    """Another content of the file, with its size and hash in the manifest."""
    gguf_file(directory).write_bytes(content)
    forge_files(directory)


def flipped(directory: Path, tensor: str, byte: int) -> bytes:
    """The content of the file with one other bit in a byte of a tensor."""
    content = bytearray(gguf_file(directory).read_bytes())
    content[stored(directory)[tensor].data_offset + byte] ^= 1
    return bytes(content)


def rewritten(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the file again behind forged hashes; ``change`` changes its metadata, each a value and its types."""
    reader = gguf.GGUFReader(gguf_file(directory))
    fields = {
        name: (field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    change(fields)
    other = directory / "other"
    writer = gguf.GGUFWriter(other, fields.pop("general.architecture")[0])
    for name, field in fields.items():
        writer.add_key_value(name, *field)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = other.read_bytes()
    other.unlink()
    forge(directory, content)
