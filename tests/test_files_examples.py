"""Example inputs and outputs, taken apart and put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qat.errors import ExportError
from qat.exporting import export
from qat.files.examples import flatten_inputs, flatten_outputs, unflatten_inputs
from tests.exports import (
    IDS,
    frozen_llama,
)


class TestExamples:
    def test_inputs_come_back_as_they_were(self) -> None:
        inputs = {"ids": IDS, "nested": [(IDS, None), {"flag": True, "text": "a"}], "share": 0.5}
        structure, tensors = flatten_inputs(inputs)
        again = unflatten_inputs(json.loads(json.dumps(structure)), tensors)
        assert torch.equal(again["ids"], IDS)
        assert isinstance(again["nested"][0], tuple)
        assert again["nested"][1] == {"flag": True, "text": "a"}
        assert again["share"] == 0.5

    def test_an_object_among_the_inputs_is_refused(self) -> None:
        with pytest.raises(ExportError, match="'cache' is a object"):
            flatten_inputs({"cache": object()})

    def test_outputs_are_named_by_where_they_stand(self) -> None:
        outputs = flatten_outputs({"logits": IDS, "states": (IDS, [IDS]), "none": None})
        assert list(outputs) == ["logits", "states.0", "states.1.0"]
        assert list(flatten_outputs(IDS)) == ["output"]

    def test_training_mode_is_left_as_it_was(self, tmp_path: Path) -> None:
        model = frozen_llama(weights="int8")
        model.model.train()
        export(model, tmp_path / "out", example_inputs={"input_ids": IDS})
        assert model.model.training
        assert not model.training
