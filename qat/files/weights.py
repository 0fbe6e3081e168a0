"""The weight files of an export, and the small JSON files beside them.

A *container* is a way to keep named tensors in files. Whatever a file calls a tensor, and however its rows are ordered
there, a container takes and gives the names, shapes and dtypes of the model, which are those of the manifest.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from qat.errors import ExportError, LoadError, listed
from qat.files.manifest import FileRecord, Manifest, TensorRecord
from qat.files.shards import Header, TensorEntry, header_faults, plan_shards, read_headers, shard_names, write_shard

__all__ = ["SAFETENSORS", "Container", "Written", "write_json"]

Written: TypeAlias = tuple[dict[str, FileRecord], dict[str, TensorRecord]]
"""The files and the tensors that were written."""


class Container(ABC):
    """How the tensors of an export lie in its weight files; abstract."""

    @abstractmethod
    def write(
        self,
        model: nn.Module,
        entries: Sequence[TensorEntry],
        fetch: Callable[[str], Tensor],
        directory: Path,
        max_shard_size: int,
        stem: str,
        progress: bool = False,
    ) -> Written:
        """Write the tensors of a frozen ``model``, one at a time, and check the files by opening them again.

        ``fetch`` gives a tensor by its name. The directory has the configuration and the tokenizer already.

        Raises:
            ExportError: when a tensor cannot be held, or a file does not hold what was planned.
        """

    @abstractmethod
    def headers(self, directory: Path, manifest: Manifest) -> dict[str, Header]:
        """What the files say of their tensors; `LoadError` when one is missing or not whole."""

    @abstractmethod
    def reader(self, directory: Path, manifest: Manifest) -> Callable[[str], Tensor]:
        """The call that reads a tensor of the manifest by its name; memory-mapped where the files allow it."""

    def metadata_faults(self, model: nn.Module, directory: Path, manifest: Manifest) -> list[str] | None:
        """Where the metadata by which programs compute is not that of the model; None: the files have no such."""
        return None

    def notes(self, directory: Path) -> list[str]:
        """What readers should know of files that lie beside the JSON files of ``directory``."""
        return []


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


class _Safetensors(Container):
    """Shards in safetensors, and their index, when there are several."""

    def write(
        self,
        model: nn.Module,
        entries: Sequence[TensorEntry],
        fetch: Callable[[str], Tensor],
        directory: Path,
        max_shard_size: int,
        stem: str,
        progress: bool = False,
    ) -> Written:
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

    def headers(self, directory: Path, manifest: Manifest) -> dict[str, Header]:
        present = {path.name for path in directory.glob(f"{manifest.weights_stem}*.safetensors")}
        names = {tensor.file for tensor in manifest.tensors.values()} | present
        return read_headers(directory / name for name in sorted(names))

    def reader(self, directory: Path, manifest: Manifest) -> Callable[[str], Tensor]:
        from safetensors import safe_open

        files = {tensor.file for tensor in manifest.tensors.values()}
        opened: dict[str, Any] = {file: safe_open(directory / file, framework="pt") for file in files}
        return lambda key: opened[manifest.tensors[key].file].get_tensor(key)


SAFETENSORS = _Safetensors()
