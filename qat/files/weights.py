"""The weight files of an export, and the small JSON files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import ExportError
from qat.files.manifest import FileRecord, TensorRecord
from qat.files.shards import ALIGNMENT, TensorEntry, plan_shards, read_header, shard_names, write_shard

__all__ = ["write_json", "write_weights"]


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_weights(
    entries: Sequence[TensorEntry], fetch: Callable[[str], Tensor], directory: Path, max_shard_size: int, stem: str
) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
    """Write the weight files (and the index, when there are several), and check each by opening it again.

    Raises:
        ExportError: when a file does not open, or a code tensor is not aligned in it.
    """
    shards = plan_shards(entries, max_shard_size)
    names = shard_names(len(shards), stem)
    files: dict[str, FileRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    for name, shard in zip(names, shards, strict=True):
        files[name], written = write_shard(directory / name, shard, fetch)
        tensors |= written
        _reopen(directory / name, shard.entries)
    if len(shards) > 1:
        weight_map = {name: tensors[name].file for name in sorted(tensors)}
        fields = {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", fields)
    return files, {entry.name: tensors[entry.name] for entry in entries}


def _reopen(path: Path, planned: tuple[TensorEntry, ...]) -> None:
    try:
        found = read_header(path)
    except ValueError as error:
        raise ExportError(f"{path.name} was written but does not open again: {error}; check the disk") from error
    codes = {entry.name for entry in planned if entry.is_code}
    unaligned = [name for name, header in found.items() if name in codes and header.start % ALIGNMENT]
    if found.keys() != {entry.name for entry in planned} or unaligned:
        raise ExportError(
            f"{path.name} was written but holds other keys, or unaligned codes {unaligned}; check the disk"
        )
