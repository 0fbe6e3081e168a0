from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import qat
from qat import cli_runs
from recipes import sequence_classification
from recipes.tasks import CausalLanguageModelling
from tests.exports import frozen_llama, small_llama
from tests.test_cli import run
from tests.training_modules import quiet_trainer

ROOT = Path(__file__).parents[1]


def test_train_runs_a_recipe_with_its_own_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str]] = []
    monkeypatch.setattr(sequence_classification, "main", seen.append)
    monkeypatch.setenv("RECIPE_COMMAND", "")
    words = ("a.yaml", "--spec.weights", "int4", "--help")
    assert run(capsys, "train", "sequence_classification", *words) == (0, "", "")
    assert seen == [list(words)]


def test_train_names_itself_in_the_help_of_a_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPE_COMMAND", "")  # so that what the verb sets is undone
    monkeypatch.delenv("RECIPE_COMMAND")
    code, out, _ = run(capsys, "train", "causal_lm", "--help")
    assert code == 0
    assert "usage: qat train causal_lm" in " ".join(out.split())


def test_a_wrong_recipe_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, "train", "casual_lm")
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe: must be one of causal_lm, image_classification, sequence_classification, ")
    assert "did you mean 'causal_lm'?" in err
    assert "a configuration comes after the recipe" in run(capsys, "train", "a/int4.yaml")[2]
    monkeypatch.setattr(cli_runs, "find_spec", lambda _: None)
    assert "recipes are not installed here" in run(capsys, "train", "causal_lm")[2]


def test_export_freezes_the_model_of_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "recipes" / "reference")
    float_model = small_llama(vocab_size=len(tokenizer))
    for part in (float_model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    module: Any = qat.QuantizedTask(float_model, CausalLanguageModelling(), learning_rate=1e-3)
    spec = qat.QuantSpec(weights="int8")
    trainer = quiet_trainer(tmp_path, qat.QuantizationAwareTraining(spec, target="transformers"), max_steps=2)
    rows = [{"input_ids": torch.randint(8, (16,))} for _ in range(4)]
    data = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    trainer.fit(module, data, data)
    trainer.save_checkpoint(tmp_path / "step-2.ckpt")
    code, out, err = run(capsys, "export", tmp_path / "step-2.ckpt", tmp_path / "model", tmp_path / "out")
    assert code == 0, err
    assert "equal" in out
    qat.freeze(module.model)
    assert qat.verify(tmp_path / "out", reference=module.model).ok
    mistakes = {
        ("none.ckpt", "new"): "is no file",
        ("n" * 300, "new"): "is no file",
        ("step-2.ckpt", "out"): "holds an export",
        ("step-2.ckpt", "model/config.json"): "is a file or a link",
    }
    for (checkpoint, output), told in mistakes.items():
        code, _, err = run(capsys, "export", tmp_path / checkpoint, tmp_path / "model", tmp_path / output)
        assert (code, err.count("\n"), told in err) == (2, 1, True)
    code, _, err = run(capsys, "export", tmp_path / "step-2.ckpt", tmp_path / "model", "~nosuchuser/x")
    assert (code, "there is no user of that name" in err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_report_and_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, weights in (("a", "int8"), ("b", "int4")):
        qat.export(frozen_llama("transformers", weights=weights), tmp_path / name)
    code, out, err = run(capsys, "report", tmp_path / "a", "--verify")
    assert code == 0, err
    assert "<h2>Verification</h2>" in (tmp_path / "a-report.html").read_text(encoding="utf-8")
    assert str(tmp_path / "a-report.html") in out
    code, out, _ = run(capsys, "compare", tmp_path / "a", tmp_path / "b", "--json")
    assert (code, json.loads(out)["rows"]["weights"]) == (0, ["int8", "int4"])
    assert "int4" in run(capsys, "compare", tmp_path / "a", tmp_path / "b")[1]
    code, _, err = run(capsys, "compare", tmp_path / "a")
    assert code == 2
    assert "two directories or more" in err


def test_a_report_of_what_differs_is_written_and_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    qat.export(frozen_llama("transformers"), tmp_path / "a")
    card = tmp_path / "a" / "generation_config.json"
    card.write_bytes(card.read_bytes().replace(b"{", b"{ ", 1))
    code, _, err = run(capsys, "report", tmp_path / "a", "--verify")
    assert code == 1
    assert "<td>differs</td>" in (tmp_path / "a-report.html").read_text(encoding="utf-8")
    assert err.startswith("error: ")
