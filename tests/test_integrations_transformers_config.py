"""The configuration of a packed directory: kept as it was read, and compared with what a user asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM, QuantoConfig

import qat.integrations.transformers  # noqa: F401 (registers the plug-in)
from qat.errors import LoadError
from qat.integrations.transformers_config import PackedQuantoConfig
from tests.packed_directories import HINT, frozen, write

PLAIN = {
    "quant_method": "quanto",
    "weights": f"int4: {HINT}",
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
    with pytest.raises(LoadError, match="must begin with one of int8, float8, int4, int2; got 'int3: packed'"):
        PackedQuantoConfig.from_dict({**PLAIN, "weights": "int3: packed"})


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
