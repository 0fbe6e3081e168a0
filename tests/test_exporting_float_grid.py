from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from qat.errors import ExportError
from qat.exporting import export
from qat.files.manifest import read_manifest
from qat.freezing import freeze
from qat.preparation import prepare
from qat.spec import QuantSpec
from qat.tensors import digest
from tests.exports import (
    TYPES,
    frozen_llama,
    small_llama,
    unpack_weight,
)


class TestFloatGrid:
    @pytest.mark.loads("transformers", "QuantoConfig", weights=TYPES, equal="codes")
    @pytest.mark.parametrize("weights", TYPES)
    def test_a_stock_load_gives_the_codes_back(self, tmp_path: Path, weights: str) -> None:
        model = frozen_llama("transformers", weights=weights, dtype="float32")
        report = export(model, tmp_path / "out", float_grid=True)
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert any("QuantoConfig(" in note for note in report.notes)
        loaded = stock_load(tmp_path / "out")
        for name in read_manifest(tmp_path / "out").frozen.layers:
            old, new = (unpack_weight(m.get_submodule(name).weight)[0] for m in (model, loaded))
            assert torch.equal(old.float(), new.float()), name

    def test_a_range_that_is_not_used_whole_is_refused_and_the_layer_named(self, tmp_path: Path) -> None:
        model = small_llama()
        prepare(model, QuantSpec(weights="int8", dtype="float32"), target="transformers")
        freeze(model, allow_unreached=True)
        narrow_codes(model.model.layers[0].mlp.up_proj, model, "model.layers.0.mlp.up_proj")
        with pytest.raises(ExportError, match=r"1 of 7 layers: model\.layers\.0\.mlp\.up_proj \(\d+ codes\)"):
            export(model, tmp_path / "out", float_grid=True)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ({"weights": "int8", "dtype": "bfloat16"}, "dtype='float32'"),
            ({"weights": "int8", "dtype": "float32", "activations": "int8"}, "quantize no activations"),
            ({"weights": "int8", "dtype": "float32", "overrides": {"*.q_proj": "int4"}}, "one weight type"),
        ],
        ids=["bfloat16", "activations", "two-types"],
    )
    def test_what_stock_cannot_express_is_refused(self, tmp_path: Path, spec: dict[str, Any], message: str) -> None:
        with pytest.raises(ExportError, match=message):
            export(frozen_llama("transformers", **spec), tmp_path / "out", float_grid=True)

    def test_layers_left_float_become_modules_to_not_convert(self, tmp_path: Path) -> None:
        model = frozen_llama("transformers", weights="int8", dtype="float32", exclude=("*.down_proj",))
        export(model, tmp_path / "out", float_grid=True)
        arguments = read_manifest(tmp_path / "out").stock_arguments
        assert arguments is not None
        assert sorted(arguments["modules_to_not_convert"]) == ["lm_head", "model.layers.0.mlp.down_proj"]

    def test_target_quanto_has_none(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="use 'transformers' or 'diffusers'"):
            export(frozen_llama(weights="int8", dtype="float32"), tmp_path / "out", float_grid=True)


def stock_load(directory: Path) -> nn.Module:
    from transformers import QuantoConfig

    arguments = read_manifest(directory).stock_arguments
    assert arguments is not None
    model: nn.Module = LlamaForCausalLM.from_pretrained(directory, quantization_config=QuantoConfig(**arguments))
    return model


def narrow_codes(layer: Any, model: nn.Module, name: str) -> None:
    """Make a frozen layer use half of its range, as a learned scale may, and mend its evidence."""
    from dataclasses import replace

    from qat.files.evidence import frozen_record, record_frozen
    from qat.formats import QUANTO

    layer.weight._data.copy_(layer.weight._data // 2)
    record = frozen_record(model)
    evidence = QUANTO.read(layer).evidence(digest(QUANTO.values(layer)))
    record_frozen(model, replace(record, layers={**record.layers, name: evidence}))
