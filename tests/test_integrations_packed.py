"""A directory whose files do not hold what its config.json declares is refused before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qat.qtypes import group_size

import qat.integrations.transformers  # noqa: F401 (registers the plug-in)
from qat.errors import LoadError
from tests.packed_directories import (
    DTYPES,
    LLAMA,
    TYPES,
    UP,
    edit_config,
    edit_modules,
    edit_tensors,
    frozen,
    load,
    write,
)


@pytest.mark.parametrize(
    ("stored", "read"), [(stored, read) for stored in TYPES for read in TYPES if stored != read], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_another_type_are_refused(stored: str, read: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = write(frozen(weights=stored, dtype=dtype, num_hidden_layers=1), tmp_path)
    group = group_size(read, 256)
    edit_modules(directory, lambda modules: modules[UP].update(weights=read, group_size=group))
    with pytest.raises(LoadError, match=UP):
        load(LLAMA, directory)


def test_another_group_size_is_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int4"), tmp_path)
    edit_modules(directory, lambda modules: modules[UP].update(group_size=64))
    with pytest.raises(LoadError, match=f"{UP} is declared with group_size=64, but .* use 128"):
        load(LLAMA, directory)


def test_a_float_weight_in_a_declared_module_is_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)

    def unpack(state: dict[str, torch.Tensor]) -> None:
        state[f"{UP}.weight"] = state.pop(f"{UP}.weight._data") * state.pop(f"{UP}.weight._scale")

    edit_tensors(directory, unpack)
    with pytest.raises(LoadError, match=f"{UP} is declared int8, but the files hold a float weight"):
        load(LLAMA, directory)


def test_packed_keys_of_an_undeclared_module_are_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)
    edit_modules(directory, lambda modules: modules.pop(UP))
    with pytest.raises(LoadError, match=f"{UP}.weight._data is packed, but its module is not declared"):
        load(LLAMA, directory)


@pytest.mark.parametrize(
    "key", ["bias", "weight._data._data", "weight._scale", "weight._shift", "input_scale", "output_scale"]
)
def test_a_missing_key_is_refused(key: str, tmp_path: Path) -> None:
    directory = write(frozen(weights="int4", mlp_bias=True), tmp_path)
    edit_tensors(directory, lambda state: state.pop(f"{UP}.{key}"))
    with pytest.raises(LoadError, match=f"{UP}.{key} is missing"):
        load(LLAMA, directory)


@pytest.mark.parametrize("key", ["bias", "weight._shift", "weight._zeros", "extra"])
def test_a_key_too_many_is_refused(key: str, tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)
    edit_tensors(directory, lambda state: state.update({f"{UP}.{key}": torch.zeros(384)}))
    with pytest.raises(LoadError, match=f"{UP}.{key} does not belong"):
        load(LLAMA, directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.update(format=2), "format"),
        (lambda group: group.update(surprise=1), "surprise"),
        (lambda group: group.pop("dtype"), "dtype"),
        (lambda group: group["modules"][UP].update(weights="int3"), "weights"),
        (lambda group: group["modules"].update({"model.nowhere": group["modules"][UP]}), "has no such module"),
        (lambda group: group["modules"].update({"model.norm": group["modules"][UP]}), "not an nn.Linear"),
    ],
    ids=["format", "unknown_field", "no_dtype", "unknown_type", "no_such_module", "not_linear"],
)
def test_a_wrong_group_is_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)
    edit_config(directory, lambda config: change(config["quantization_config"]["qat"]))
    with pytest.raises(LoadError, match=message):
        load(LLAMA, directory)


def test_a_corrupt_file_is_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int8"), tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoadError, match="not a readable safetensors file"):
        load(LLAMA, directory)
