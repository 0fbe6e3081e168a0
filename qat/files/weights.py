"""The weight files of an export, and the small JSON files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.errors import ExportError, LoadError, listed
from qat.files.manifest import FileRecord, TensorRecord
from qat.files.shards import TensorEntry, header_faults, plan_shards, read_headers, shard_names, write_shard

__all__ = ["write_json", "write_weights"]


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_weights(
    entries: Sequence[TensorEntry],
    fetch: Callable[[str], Tensor],
    directory: Path,
    max_shard_size: int,
    stem: str,
    progress: bool = False,
) -> tuple[dict[str, FileRecord], dict[str, TensorRecord]]:
    """Write the weight files (and the index, when there are several), and check them by opening them again.

    Raises:
        ExportError: when a file does not open, or does not hold what was planned.
    """
    shards = plan_shards(entries, max_shard_size)
    names = shard_names(len(shards), stem)
    files: dict[str, FileRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    for name, shard in zip(names, shards, strict=True):
        files[name], written = write_shard(directory / name, shard, fetch, progress)
        tensors |= written
    try:
        headers = read_headers(directory / name for name in names)
    except LoadError as error:
        raise ExportError(f"a weight file was written but does not open again: {error}; check the disk") from error
    faults = header_faults(headers, tensors, {entry.name for entry in entries if entry.is_code})
    if faults:
        raise ExportError(f"weight files were written but hold something else: {listed(faults, 3)}; check the disk")
    if len(shards) > 1:
        weight_map = {name: tensors[name].file for name in sorted(tensors)}
        fields = {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", fields)
    return files, {entry.name: tensors[entry.name] for entry in entries}
