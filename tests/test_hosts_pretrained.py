"""Float models with their tokenizer or image processor, and one error for whatever cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qat.errors import LoadError
from qat.hosts.pretrained import load_float
from tests.helpers import tiny_model

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    ("name", "model_class", "processor"),
    [
        ("reference", "LlamaForCausalLM", "TokenizersBackend"),
        ("reference_encoder", "BertForSequenceClassification", "TokenizersBackend"),
        ("reference_vit", "ViTForImageClassification", "ViTImageProcessor"),
    ],
)
def test_a_model_comes_in_its_own_class_in_float32_with_its_processor(
    name: str, model_class: str, processor: str
) -> None:
    model, made = load_float(str(RECIPES / name))
    assert type(model).__name__ == model_class
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert type(made).__name__.startswith(processor)


def test_what_cannot_be_loaded_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"MODEL: 'no/such/model' is no directory here, and as a hub's name cannot"):
        load_float("no/such/model")
    with pytest.raises(LoadError, match=r"MODEL: .* is a pipeline of diffusers: .*forward="):
        load_float(str(RECIPES / "reference_flux"))
    shutil.copytree(RECIPES / "reference_encoder", tmp_path / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "encoder" / name).unlink()
    with pytest.raises(
        LoadError, match=r"MODEL: .* has no tokenizer that can be loaded .*: put the files of the model's"
    ):
        load_float(str(tmp_path / "encoder"))
    shutil.copytree(RECIPES / "reference_vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(LoadError, match="has no image processor that can be loaded"):
        load_float(str(tmp_path / "vit"))


def test_incomplete_weights_and_other_inputs_are_refused(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "t5")  # type: ignore[operator]
    with pytest.raises(LoadError, match="T5ForConditionalGeneration takes neither texts nor images alone"):
        load_float(str(tmp_path / "t5"))
    shutil.copytree(RECIPES / "reference_vit", tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(LoadError, match=r"the weights in .* do not fill \['vit.*: give a complete checkpoint"):
        load_float(str(tmp_path / "vit"))


MODELING = """
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    shutil.copytree(RECIPES / "reference_encoder", tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(MODELING)
    with pytest.raises(LoadError, match=r"MODEL: the model's directory .* brings code of its own"):
        load_float(str(tmp_path / "own"))
    assert not (tmp_path / "cache").exists()
    model, _ = load_float(str(tmp_path / "own"), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
