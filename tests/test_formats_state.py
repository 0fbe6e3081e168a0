"""The tensors of a frozen model under the keys of its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qat.exporting
from qat.errors import ExportError
from qat.exporting import export
from qat.files.manifest import read_manifest
from qat.formats.state import ModelState
from tests.exports import (
    frozen_layers,
    frozen_llama,
    stored_tensors,
)


class TestModelState:
    def test_a_tied_tensor_is_written_once(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8"), tmp_path / "out")
        manifest = read_manifest(tmp_path / "out")
        assert manifest.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in stored_tensors(tmp_path / "out")

    def test_a_quantized_head_is_no_longer_tied(self, tmp_path: Path) -> None:
        export(frozen_llama(weights="int8", overrides={"lm_head": "int8"}), tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        assert "lm_head.weight._data" in stored_tensors(tmp_path / "out")

    def test_writing_holds_one_converted_layer_at_a_time(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        states = []

        def remember(*args: Any, **kwargs: Any) -> ModelState:
            states.append(ModelState(*args, **kwargs))
            return states[-1]

        monkeypatch.setattr(qat.exporting, "ModelState", remember)
        export(frozen_llama(weights="int4", dtype="bfloat16"), tmp_path / "out")
        assert len([key for key in states[0]._held[1] if key.startswith("weight")]) == 3

    def test_a_tensor_class_without_keys_is_refused(self, tmp_path: Path) -> None:
        model = frozen_layers((16, 32), (8, 16), weights="int8", overrides={"1": "float"})
        packed = model.get_submodule("0").weight
        model.get_submodule("1").weight = nn.Parameter(packed, requires_grad=False)
        with pytest.raises(ExportError, match=r"'1\.weight' is a WeightQBytesTensor"):
            export(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())
