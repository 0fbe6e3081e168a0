"""Every shipped recipe and configuration file is found by walking the folders; the whole line runs, small."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qat
from qat.config import ConfigError, load_config, read_yaml
from qat.errors import ExportError, LoadError, QatError
from recipes import causal_lm

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem not in ("__init__", "common"))
FILES = sorted((ROOT / "recipes" / "configs").rglob("*.y*ml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 60,000 parameters with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    words = {f"w{number}": number for number in range(63)} | {"<end>": 63}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=63,
        bos_token_id=63,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(f"w{(start * 7 + step) % 63}" for step in range(40)) for start in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def small(tiny: Path, text: Path, tmp_path: Path) -> list[str]:
    """Arguments that make the recipe run in seconds."""
    return [
        *("--model", str(tiny), "--output", str(tmp_path / "out")),
        *("--data.source", str(text), "--data.block-size", "16", "--data.evaluation-blocks", "4"),
        *("--optimization.steps", "3", "--optimization.batch-size", "4", "--optimization.warmup-steps", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.checkpoint-every", "2"),
    ]


def test_there_are_recipes_and_configurations() -> None:
    assert "causal_lm" in RECIPES
    assert {"int8", "float8", "int4", "int2", "int8_int8"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_configuration_and_a_story(name: str) -> None:
    recipe = importlib.import_module(f"recipes.{name}")
    assert recipe.__doc__
    assert f"python -m recipes.{name} [config.yaml]" in recipe.__doc__
    assert callable(recipe.main)
    recipe.Config()
    assert (ROOT / "recipes" / "configs" / name).is_dir()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_file_is_valid(path: Path) -> None:
    recipe = importlib.import_module(f"recipes.{path.parent.name}")
    config = load_config(recipe.Config, [str(path)], "A test.")
    spec = config.spec
    assert path.stem == "_".join(filter(None, (spec.weights, spec.activations)))
    assert {"learning_rate", "float_learning_rate"} <= set(read_yaml(path)["optimization"])


def test_the_default_is_int4() -> None:
    path = ROOT / "recipes" / "configs" / "causal_lm" / "int4.yaml"
    assert load_config(causal_lm.Config, [str(path)], "A test.") == causal_lm.Config()


@pytest.mark.parametrize(
    "spec",
    [["int4"], ["int2", "--target", "quanto"], ["int8", "--spec.activations", "int8"]],
    ids=["int4", "int2 for quanto", "int8 with int8 activations"],
)
def test_the_whole_line(spec: list[str], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    causal_lm.main([*small, "--spec.weights", *spec])
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == [
        "float",
        "float, fine-tuned",
        "fine-tuned, then quantized",
        "quantization-aware training",
    ]
    assert [row[4].strip() for row in rows] == ["0", "3", "3", "3"]
    assert "reloaded in a fresh process, compared and found equal" in shown
    resolved = yaml.safe_load((tmp_path / "out" / "qat_config.yaml").read_text())
    assert resolved["spec"]["weights"] == spec[0]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert list((tmp_path / "out-checkpoints").glob("*.ckpt"))
    assert isinstance(qat.load(tmp_path / "out"), LlamaForCausalLM)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimization.distillation-weight", "0.5"],
        ["--trainer.gradient-checkpointing", "--trainer.accumulate-grad-batches", "2"],
        ["--trainer.precision", "bf16-mixed"],
    ],
    ids=["distillation", "checkpointing and accumulation", "bf16-mixed"],
)
def test_without_the_comparison(arguments: list[str], small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    causal_lm.main([*small, "--no-float-baseline", *arguments])
    shown = capsys.readouterr().out
    assert "fine-tuned" not in shown
    assert "found equal" in shown


def test_all_arms_see_the_same_batches_in_the_same_order(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []
    fit = causal_lm.fit

    def record(name: str, model: Any, *arguments: Any) -> Any:
        seen.append([])
        hook = model.register_forward_pre_hook(
            lambda module, _, inputs: seen[-1].append(inputs["input_ids"].tolist()) if module.training else None,
            with_kwargs=True,
        )
        trainer = fit(name, model, *arguments)
        hook.remove()
        return trainer

    monkeypatch.setattr(causal_lm, "fit", record)
    causal_lm.main([*small, "--spec.weights", "int8", "--spec.activations", "int8"])
    fine_tuned, quantized = seen
    assert len(fine_tuned) == 3
    assert fine_tuned == quantized


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--model", "./nowhere"], LoadError, "model: './nowhere' cannot be loaded"),
        (["--data.source", "./nowhere.txt"], QatError, "does not exist"),
        (["--data.block-size", "5000"], QatError, "shorter than one block"),
        (["--spec.exclude", "*.nothing"], QatError, "matches no linear layer"),
        (["--schedule.finish", "last"], ConfigError, "this recipe calibrates and freezes by itself"),
        (["--optimization.learning-rate", "-1"], ConfigError, "optimization.learning_rate"),
    ],
    ids=["model", "data", "block size", "pattern", "schedule", "learning rate"],
)
def test_bad_input_is_an_error_before_any_training(
    arguments: list[str], kind: type[Exception], message: str, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "fit", lambda *_: pytest.fail("training began"))
    with pytest.raises(kind, match=message.replace(".", r"\.")):
        causal_lm.main([*small, *arguments])


def test_an_output_that_is_not_empty_is_an_error_before_any_training(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    monkeypatch.setattr(causal_lm, "load_language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(ExportError, match="not empty"):
        causal_lm.main(small)
    assert (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize("damage", ["missing tensor", "truncated file"])
def test_a_damaged_model_is_an_error(damage: str, tiny: Path, small: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    if damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LoadError, match="model: "):
        causal_lm.main([*small, "--model", str(broken)])


@pytest.mark.slow
def test_the_command_is_quiet(small: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.causal_lm", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours = ("evaluating", "fine-tuning", "training", "tokenizing", " ")
    strange = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and not line.startswith(ours)]
    assert not strange
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert again.returncode == 2
    assert again.stderr.startswith("error: directory ")
    assert again.stderr.count("\n") == 1
