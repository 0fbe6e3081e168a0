"""Every shipped recipe and configuration file is found by walking the folders; the whole line runs, small."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qat
from qat.errors import ExportError, LoadError, QatError
from qat.formats import QUANTO
from recipes import causal_lm, tasks
from recipes.common import callbacks, models, training
from recipes.common.config import ConfigError, load_config, read_yaml
from recipes.common.settings import TrainerSettings
from recipes.data import DataError

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")
FILES = sorted((ROOT / "recipes" / "configs").rglob("*.y*ml"))


class StepCounter(callbacks.StepProgress):
    """A progress bar that keeps what it counted."""

    steps: ClassVar[list[int]] = []

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        self.steps.append(trainer.global_step)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 60,000 parameters with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    words = {f"w{number}": number for number in range(63)} | {"<end>": 63}
    backend = Tokenizer(WordLevel(words, unk_token="<end>"))
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
        *("--trainer.accelerator", "cpu", "--trainer.checkpoint-every", "2", "--no-report"),
    ]


@pytest.mark.slow
def test_a_recipe_on_two_devices(small: list[str], tmp_path: Path) -> None:
    """Lightning starts the second process; the first one judges and reports alone, at the end."""
    options = [*small, "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    command = [sys.executable, "-W", "ignore", "-m", "recipes.causal_lm", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "compared and found equal" in done.stdout, done.stderr[-3000:]
    assert list((tmp_path / "out-checkpoints").glob("step-*.ckpt"))


def printed_by_the_quiet_command(arguments: list[str]) -> str:
    """The output of a whole command that says nothing else but its stages."""
    command = [sys.executable, "-m", "recipes.causal_lm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours = ("tokenizing", "evaluating", "fine-tuning", "training", "calibrating", "freezing", "exporting", "verifying")
    said = done.stderr.splitlines()
    assert not [line for line in said if "\r" in line or not line.startswith(ours)]
    assert len(said) == 2 * len([line for line in said if line.endswith(" ...")])
    return done.stdout


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


@pytest.mark.parametrize("name", RECIPES)
def test_the_help_holds_no_python_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(importlib.import_module(f"recipes.{name}").Config, ["--help"], "A test.")
    shown = capsys.readouterr().out
    assert "*.down_proj=int8" in shown
    assert ">>>" not in shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_file_is_valid(path: Path) -> None:
    recipe = importlib.import_module(f"recipes.{path.parent.name}")
    config = load_config(recipe.Config, [str(path)], "A test.")
    spec = config.spec
    assert read_yaml(path)["recipe"] == config.recipe == path.parent.name
    assert path.stem == "_".join(filter(None, (spec.weights, spec.activations)))
    assert {"learning_rate", "float_learning_rate"} <= set(read_yaml(path)["optimization"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_file_has_the_best_for_its_type(path: Path) -> None:
    config = load_config(importlib.import_module(f"recipes.{path.parent.name}").Config, [str(path)], "A test.")
    starts = {"causal_lm": "best", "text_to_image": "best"}
    expected = qat.StraightThrough()
    if config.spec.weights in ("int4", "int2"):
        expected = qat.LearnedAffine(start=starts.get(config.recipe, "output"))
    assert config.algorithm.for_type(QUANTO.qtypes[config.spec.weights]) == expected


def test_the_default_is_int4() -> None:
    path = ROOT / "recipes" / "configs" / "causal_lm" / "int4.yaml"
    assert load_config(causal_lm.Config, [str(path)], "A test.") == causal_lm.Config()


@pytest.mark.parametrize(
    "spec",
    [["int4"], ["int2", "--target", "quanto"], ["int8", "--spec.activations", "int8"]],
    ids=["int4", "int2 for quanto", "int8 with int8 activations"],
)
def test_the_whole_line(spec: list[str], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*small, "--spec.weights", *spec]
    if spec == ["int4"]:  # as users do
        shown = printed_by_the_quiet_command(arguments)
    else:
        causal_lm.main(arguments)
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
    again = load_config(causal_lm.Config, [str(tmp_path / "out" / "qat_config.yaml")], "A test.")
    assert again.model_dump(mode="json") == resolved
    assert "parameters are quantized; linear weights" in shown.splitlines()[0]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    kept = sorted(path.name for path in (tmp_path / "out-checkpoints").iterdir())
    assert kept == [
        *("fine_tuned.json", "fine_tuned.safetensors", "judged.json", "run.json"),
        *("step-2.ckpt", "step-2.json", "step-3.ckpt", "step-3.json"),
    ]
    assert isinstance(qat.load(tmp_path / "out"), LlamaForCausalLM)
    results = json.loads((tmp_path / "out-results.json").read_text())
    compared = [row["comparison"] and row["comparison"]["reference"] for row in results]
    assert compared in ([None] * 4, [None, None, "float, fine-tuned", "fine-tuned, then quantized"])
    for row in results:
        if row["comparison"] is not None:
            remark = row["comparison"]["remark"]
            assert remark is None or remark in shown.splitlines()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimization.distillation.weight", "0.5"],
        ["--optimization.average", "0.5", "--optimization.decay", "linear", "--schedule.cage", "1"],
        ["--spec.weights", "int2", "--schedule.first-weights", "int4", "--schedule.first-weights-until", "1"],
        ["--trainer.gradient-checkpointing", "--trainer.accumulate-grad-batches", "2"],
        ["--trainer.precision", "bf16-mixed"],
    ],
    ids=["distillation", "average and pull", "first weights", "checkpointing and accumulation", "bf16-mixed"],
)
def test_without_the_comparison(arguments: list[str], small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    causal_lm.main([*small, "--no-float-baseline", *arguments])
    shown = capsys.readouterr().out
    assert "fine-tuned" not in shown
    assert "found equal" in shown


@pytest.mark.usefixtures("one_process")
def test_all_arms_see_the_same_batches_in_the_same_order(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []
    fit = training.fit

    def record(name: str, model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append([])

        def note(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
            if module.training and len(inputs["input_ids"]) == 4:  # the example to find layers with has two rows
                seen[-1].append(inputs["input_ids"].tolist())

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        trainer = fit(name, model, *arguments, **options)
        hook.remove()
        return trainer

    monkeypatch.setattr(training, "fit", record)
    causal_lm.main([*small, "--spec.weights", "int8", "--spec.activations", "int8"])
    fine_tuned, quantized = seen
    assert len(fine_tuned) == 3
    assert fine_tuned == quantized


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--model", "./nowhere"], ConfigError, r"model: must be a directory that exists, .* got '\./nowhere'"),
        (
            ["--model", "owner/x"],
            LoadError,
            "model: 'owner/x' is no directory here, and as a name on the hub it cannot",
        ),
        (["--data.source", "./nowhere.txt"], QatError, "does not exist"),
        (["--data.block-size", "5000"], QatError, "the model takes at most 64 tokens"),
        (["--spec.exclude", "*.nothing"], QatError, "matches no layer that can be quantized"),
        (["--schedule.finish", "last"], QatError, "no such option"),  # it freezes by itself
        (["--optimization.learning-rate", "-1"], ConfigError, r"optimization\.learning_rate"),
        (["--optimization.batch-size", "5000"], DataError, "there is no whole batch"),
        (["--resume", "nowhere.ckpt"], ConfigError, "resume: must be a file that exists"),
        (["--resume", __file__], ConfigError, r"resume: '.*test_recipes\.py' is no whole checkpoint of a recipe"),
        (["--trainer.strategy", "nothing"], ConfigError, "trainer: Lightning cannot train with .*strategy='nothing'"),
        (
            ["--spec.activations", "int8", "--schedule.calibration-batches", "0"],
            ConfigError,
            "schedule: calibration_batches: must be above 0",
        ),
    ],
    ids=[
        *("model", "hub name", "data", "block size", "pattern", "schedule", "learning rate"),
        *("batch size", "checkpoint", "no checkpoint", "strategy", "calibration"),
    ],
)
def test_bad_input_is_an_error_before_any_training(
    arguments: list[str], kind: type[Exception], message: str, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "evaluate", lambda *_: pytest.fail("work began"))
    with pytest.raises(kind, match=message):
        causal_lm.main([*small, *arguments])


def test_an_output_that_is_not_empty_is_an_error_before_any_training(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    monkeypatch.setattr(models, "load_language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(ExportError, match=r"is not empty, .*: choose another one"):
        causal_lm.main(small)
    assert (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error_before_any_work(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_language_model", lambda *_: pytest.fail("work began"))
    with pytest.raises(ConfigError, match=r"^trainer: Lightning cannot train with accelerator='gpu'.*change these"):
        causal_lm.main([*small, "--trainer.accelerator", "gpu"])


def test_the_device_is_the_one_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.device_of(TrainerSettings(accelerator="cpu")) == torch.device("cpu")
    second = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 1)))
    monkeypatch.setattr(training, "_trainer", lambda *_, **__: second)
    assert training.device_of(TrainerSettings()) == torch.device("cuda", 1)


def test_calibration_happens_on_the_given_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def calibrate(model: nn.Module, batches: Any, **_: bool) -> None:
        seen.extend(tensor.device.type for tensor in model.parameters())
        seen.extend(tensor.device.type for batch in batches for tensor in batch.values())

    monkeypatch.setattr(training, "calibrate_parts", calibrate)
    monkeypatch.setattr(qat, "freeze", lambda model: None)
    monkeypatch.setattr(nn.Module, "cpu", lambda model: seen.append("back"))
    batches = [{"input_ids": torch.zeros(1, 4)}] * 3
    training.calibrate_and_freeze(nn.Linear(4, 4, bias=False), batches, 2, torch.device("meta"))
    assert seen == ["meta", "meta", "meta", "back"]


@pytest.mark.usefixtures("one_process")
def test_the_last_weights_are_saved_and_a_run_goes_on_from_them(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*small, "--no-float-baseline"]
    causal_lm.main(small)
    last = tmp_path / "out-checkpoints" / "step-3.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    first = torch.load(last, weights_only=True)["state_dict"]
    starts: list[bool] = []

    class Witness(StepCounter):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            starts.append(all(torch.equal(tensor, first[name]) for name, tensor in pl_module.state_dict().items()))

    monkeypatch.setattr(training, "StepProgress", Witness)
    Witness.steps = []
    causal_lm.main([*small, "--overwrite", "--resume", str(last), "--optimization.steps", "5"])
    assert starts == [True]
    assert Witness.steps == [4, 5]
    assert torch.load(last.with_name("step-5.ckpt"), weights_only=True)["global_step"] == 5


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


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_option_is_told_before_anything_slow_is_imported(name: str) -> None:
    slow = ("lightning", "transformers", "diffusers", "datasets", "torchmetrics", "matplotlib")
    code = (
        f"import sys; from recipes.{name} import main; from qat.report import run_command\n"
        "try: run_command(main, ['--no-such-option'])\n"
        f"except SystemExit as error: print(error.code, [name for name in {slow} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "2 []\n", done.stderr
    assert "'--no-such-option': there is no such option" in done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_help_names_what_was_typed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module(f"recipes.{name}")
    for command, typed in (("", f"python -m recipes.{name}"), ("./scripts/quickstart", "./scripts/quickstart")):
        monkeypatch.setenv("RECIPE_COMMAND", command)
        with pytest.raises(SystemExit):
            recipe.main(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {typed} [config.yaml] [-h]")


def test_the_command_tells_an_error_in_one_line(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    command = [sys.executable, "-m", "recipes.causal_lm", *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: output: ")
    assert done.stderr.count("\n") == 1
