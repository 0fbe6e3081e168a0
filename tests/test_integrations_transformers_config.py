"""The configuration of a packed directory: kept as it was read, and compared with what a user asks for.

A directory whose files do not hold what its config.json declares is refused before a tensor is read; what is refused
of a single layer stands in test_formats_base.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, QuantoConfig

import qat.integrations.transformers  # noqa: F401 (registers the plug-in)
from qat.errors import LoadError
from qat.formats.quanto_types import QTYPES
from qat.integrations.transformers_config import PackedQuantoConfig
from tests.packed_directories import (
    DTYPES,
    HINT,
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

PLAIN = {
    "quant_method": "quanto",
    "weights": f"{HINT} int4",
    "activations": None,
    "modules_to_not_convert": ["lm_head"],
    "qat": {
        "format": 1,
        "dtype": "bfloat16",
        "modules": {"up_proj": {"weights": "int4", "activations": None, "group_size": 128}},
    },
}


def test_it_writes_back_what_it_read() -> None:
    config = PackedQuantoConfig.from_dict(PLAIN)
    assert config.to_dict() == PLAIN
    assert config.default_weights == "int4"
    assert config.group().modules["up_proj"].group_size == 128


def test_a_dictionary_without_the_group_gives_the_stock_class() -> None:
    assert type(PackedQuantoConfig.from_dict({"quant_method": "quanto", "weights": "int4"})) is QuantoConfig


def test_an_unknown_default_type_is_refused() -> None:
    with pytest.raises(LoadError, match="must name one of int8, float8, int4, int2; got 'packed as int3'"):
        PackedQuantoConfig.from_dict({**PLAIN, "weights": "packed as int3"})


def test_an_export_with_an_earlier_hint_is_read() -> None:
    earlier = "int2: packed by qat, load with `import qat.integrations.transformers`"
    assert PackedQuantoConfig.from_dict({**PLAIN, "weights": earlier}).default_weights == "int2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int8"}, "asks for weights='int8', but the directory holds packed int4"),
        ({}, "asks for weights='int8'"),
        ({"weights": "int4", "activations": "int8"}, "asks for activations='int8'"),
        ({"weights": "int4", "modules_to_not_convert": ["up_proj"]}, "modules_to_not_convert"),
    ],
    ids=["weights", "default", "activations", "skipped"],
)
def test_a_quanto_config_that_disagrees_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = write(frozen(weights="int4"), tmp_path)
    with pytest.raises(LoadError, match=message):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=QuantoConfig(**options))


def test_another_configuration_class_is_refused(tmp_path: Path) -> None:
    directory = write(frozen(weights="int4"), tmp_path)
    with pytest.raises(LoadError, match="must be a QuantoConfig"):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=transformers.EetqConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"dtype": "float64"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"modules": {"up_proj": {"weights": "int3"}}}, "modules.up_proj.weights: Input should be"),
        ({"modules": {str(i): {"weights": "int3"} for i in range(9)}}, "and 1 more"),
    ],
    ids=["format", "unknown field", "dtype", "type", "many"],
)
def test_a_group_that_is_not_valid_is_refused_with_all_its_faults(change: dict[str, Any], message: str) -> None:
    group: Any = PLAIN["qat"]
    assert PackedQuantoConfig("int4", qat=group).group().quantize_outputs
    with pytest.raises(LoadError, match=message) as caught:
        PackedQuantoConfig("int4", qat={**group, **change})
    assert str(caught.value).endswith("Export the model again with qat.export, or restore its files.")


@pytest.mark.parametrize(
    ("stored", "read"), [(stored, read) for stored in TYPES for read in TYPES if stored != read], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_another_type_are_refused(stored: str, read: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = write(frozen(weights=stored, dtype=dtype, num_hidden_layers=1), tmp_path)
    group = QTYPES[read].group_size(256)
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
    with pytest.raises(LoadError, match=f"{UP}.weight._data is packed, but not declared"):
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
        (
            lambda group: group["modules"].update({"model.norm": group["modules"][UP]}),
            "a LlamaRMSNorm is no layer to quantize",
        ),
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
    with pytest.raises(LoadError, match=r"is not a whole safetensors file .*; copy or export it again"):
        load(LLAMA, directory)


def test_a_version_of_transformers_that_cannot_load_packed_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import qat.integrations.transformers as plugin

    def of_5_17(self: Any, weight_conversions: list[Any]) -> None: ...

    monkeypatch.setattr(plugin.QuantoHfQuantizer, "update_weight_conversions", of_5_17)
    with pytest.raises(ImportError, match=r"packed weights are read by version 5\.23 and newer, got .*: upgrade it"):
        importlib.reload(plugin)
