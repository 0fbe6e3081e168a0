"""The recipe `sequence_classification`, small; and the reference model that it starts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import qat
from qat.errors import LoadError
from recipes import sequence_classification
from recipes.common.config import load_config
from recipes.common.models import load_classifier
from recipes.data import DataError
from recipes.data.labelled_text import LabelledTextData, TextBatch, load_labelled_texts
from recipes.tasks import Classification, evaluate
from scripts import make_reference_classifiers

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "recipes" / "reference_encoder"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer for two classes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number + 2 for number in range(30)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": {0: "odd", 1: "even"}, "label2id": {"odd": 0, "even": 1}}
    config = BertConfig(vocab_size=32, max_position_embeddings=16, pad_token_id=0, **sizes, **names)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> list[str]:
    """Arguments that make the recipe run in seconds."""
    rows = [f"w{number % 30} w{number % 7},{'odd' if number % 2 else 'even'}" for number in range(40)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]))
    return [
        *("--model", str(tiny), "--output", str(tmp_path / "out"), "--data.source", str(tmp_path / "texts.csv")),
        *("--data.max-length", "8", "--optimization.steps", "3", "--optimization.batch-size", "4"),
        *("--optimization.warmup-steps", "1", "--trainer.accelerator", "cpu"),
        "--no-report",
    ]


def test_the_default_is_w8a8() -> None:
    path = ROOT / "recipes" / "configs" / "sequence_classification" / "int8_int8.yaml"
    assert load_config(sequence_classification.Config, [str(path)], "A test.") == sequence_classification.Config()


def test_the_whole_line(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence_classification.main(small)
    shown = capsys.readouterr().out
    assert shown.startswith("32 examples to train on, 8 to evaluate on, 2 classes\n")
    assert "reloaded in a fresh process, compared and found equal" in shown
    rows = json.loads((tmp_path / "out-results.json").read_text())
    assert len(rows) == 4
    assert all(list(row["metrics"]) == ["accuracy", "calibration_error", "loss", "macro_f1"] for row in rows)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    served = qat.load(tmp_path / "out")
    assert isinstance(served, BertForSequenceClassification)
    assert served.config.id2label == {0: "odd", 1: "even"}


def test_bad_input_is_one_clear_error(small: list[str], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.max_length: the model takes at most 16 tokens, got 17"):
        sequence_classification.main([*small, "--data.max-length", "17"])
    with pytest.raises(DataError, match=r"data\.text_field: '.*' has no column 'said'; its columns: text, label"):
        sequence_classification.main([*small, "--data.text-field", "said"])
    (tmp_path / "three.csv").write_text("text,label\n" + "w1,odd\nw2,even\nw3,zero\n" * 5)
    with pytest.raises(DataError, match=r"data\.source: .* has 3 classes, but the model has 2"):
        sequence_classification.main([*small, "--data.source", str(tmp_path / "three.csv")])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ("config.json", "model.safetensors"):
        (broken / file).write_bytes((tiny / file).read_bytes())
    with pytest.raises(LoadError, match=r"model: '.*broken' has no tokenizer .* \(none of its files, .*: put"):
        sequence_classification.main([*small, "--model", str(broken)])


def test_the_reference_model_knows_families_of_files_it_has_not_seen() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8 * 2**20
    model, tokenizer = load_classifier(str(SHIPPED), "sequence")
    data = LabelledTextData(evaluation_texts=256)
    pieces = load_labelled_texts(data).evaluation
    batches = DataLoader(pieces, 64, collate_fn=TextBatch(tokenizer, data.max_length))
    found = evaluate(Classification(classes=8), model, batches)
    most = max(pieces["label"].count(label) for label in range(8)) / len(pieces)
    assert most + 0.2 < found["accuracy"] < 1.0  # the text depends on the Python version


def test_the_script_makes_a_model_that_the_recipe_loads(tmp_path: Path) -> None:
    few = ["--steps", "1", "--batch", "4", "--evaluate-every", "2"]
    make_reference_classifiers.main(["encoder", str(tmp_path), *few])
    model, tokenizer = load_classifier(str(tmp_path), "sequence")
    assert model.config.id2label[3] == "email"
    assert tokenizer("import email")["input_ids"][0] == tokenizer.cls_token_id
    for again in ("a", "b"):  # with the same tokenizer, a run repeats
        make_reference_classifiers.main(["encoder", str(tmp_path / again), *few, "--tokenizer", str(tmp_path)])
    weights = [(tmp_path / again / "model.safetensors").read_bytes() for again in ("a", "b")]
    assert weights[0] == weights[1]
