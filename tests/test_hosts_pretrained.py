"""Float models with their tokenizer or image processor, and one error for whatever cannot be loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

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
    with pytest.raises(LoadError, match=r"MODEL: 'no/such/model' is no directory here, and no name on the hub"):
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


class Stranger:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle ran",)


def test_a_damaged_folder_is_named_by_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, **files: bytes | None) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(RECIPES / "reference_encoder", folder)
        for name, content in files.items():
            (folder / name.replace("__", ".")).unlink(missing_ok=True)
            if content is not None:
                (folder / name.replace("__", ".")).write_bytes(content)
        with pytest.raises(LoadError, match=rf"^MODEL: {message}") as caught:
            load_float(str(folder))
        assert "weights_only" not in str(caught.value)

    config = json.loads((RECIPES / "reference_encoder" / "config.json").read_text())
    whole = (RECIPES / "reference_encoder" / "model.safetensors").read_bytes()
    refused(r"'.*' holds no weights: put the model's, such as model\.safetensors, there", model__safetensors=None)
    refused(r"'.*model\.safetensors' is cut off or no safetensors .*: copy it again", model__safetensors=whole[:5000])
    strange = pickle.dumps(Stranger())
    refused(
        r"'.*' cannot be loaded: pytorch_model\.bin is a pickle that builds more than tensors, .*: save it as safe",
        model__safetensors=None,
        pytorch_model__bin=strange,
    )
    assert "a pickle ran" not in capsys.readouterr().out
    refused(r"'.*config\.json' is not a model's configuration: maximum recursion", config__json=b"[" * 100_000)
    refused(r"'.*config\.json' is not a model's configuration: no mapping, got \[1\]", config__json=b"[1]")
    deep = json.dumps({**config, "num_hidden_layers": 10**6}).encode()
    refused(r"'.*config\.json' describes no model .*: num_hidden_layers is 1000000: correct it", config__json=deep)


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_float(str(RECIPES / "reference_encoder"))
    model.resize_token_embeddings(100)  # type: ignore[operator]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"the vocabulary of the tokenizer in .* has \d+ tokens, and .* 100 rows: give"):
        load_float(str(tmp_path))


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
