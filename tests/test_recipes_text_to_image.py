"""The recipe text_to_image, run whole on pipelines that are made in a second."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn

import qat
from qat.errors import LoadError, SpecError, TargetError
from recipes import tasks, text_to_image
from recipes.common import callbacks, comparison, diffusion, models, training
from recipes.common.config import ConfigError, load_config
from recipes.data import DataError
from tests.pipelines import SIZE, autoencoder, caption_of, clip, make, tokenizer

ROOT = Path(__file__).parent.parent
# diffusers' own conversion of tensors, with the newest numpy; and its notice on its quanto backend
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Quanto.*deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process, for tests of what comes before."""
    monkeypatch.setattr(qat, "verify", lambda *_, **__: SimpleNamespace(checks=()))


W8A8 = ["--spec.weights", "int8", "--spec.activations", "int8"]
STARTED = [
    *("--spec.weights", "int2", "--schedule.first-weights", "int4", "--schedule.first-weights-until", "1"),
    *("algorithm:learned-affine", "--algorithm.start", "gptq"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux pipeline with random weights."""
    folder = tmp_path_factory.mktemp("flux")
    make("flux").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of noise with captions."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption_of("flux", number % 4))
    return folder


@pytest.fixture
def small(tiny: Path, images: Path, tmp_path: Path) -> list[str]:
    """Arguments that make the recipe run in seconds."""
    return [
        *("--model", str(tiny), "--output", str(tmp_path / "out"), "--max-sequence-length", "12"),
        *("--data.source", str(images), "--data.size", str(SIZE), "--sampler-steps", "2"),
        *("--optimization.steps", "3", "--optimization.batch-size", "4", "--optimization.warmup-steps", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.checkpoint-every", "2", "--schedule.calibration-batches", "2"),
        "--no-report",
    ]


def printed_by_the_quiet_command(arguments: list[str]) -> str:
    """The output of a whole command that says nothing else but its stages."""
    command = [sys.executable, "-m", "recipes.text_to_image", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ours = (
        "reading",
        "calibrating",
        "freezing",
        "exporting",
        "verifying",
        "encoding",
        "evaluating",
        "fine-tuning",
        "training",
        " ",
    )
    strange = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and not line.startswith(ours)]
    assert not strange
    return done.stdout


def test_the_default_is_int4() -> None:
    path = ROOT / "recipes" / "configs" / "text_to_image" / "int4.yaml"
    assert load_config(text_to_image.Config, [str(path)], "A test.") == text_to_image.Config()


@pytest.mark.parametrize(
    ("spec", "target"),
    [(["int4"], "diffusers"), (["int8", "--spec.activations", "int8"], "quanto")],
    ids=["int4", "int8 with int8 activations"],
)
def test_the_whole_line(
    spec: list[str], target: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*small, "--spec.weights", *spec]
    if target == "diffusers":  # as users do
        shown = printed_by_the_quiet_command(arguments)
    else:
        text_to_image.main(arguments)
        shown = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    names = ["float", "float, fine-tuned", "fine-tuned, then quantized", "quantization-aware training"]
    assert [row[0].strip() for row in rows] == names
    assert [row[4].strip() for row in rows] == ["0", "3", "3", "3"]
    assert "16 images to train on, 4 to evaluate on" in shown
    assert "reloaded in a fresh process, compared and found equal" in shown
    sensitive = "linear layers stay float: sensitive with quantized activations (modulation)"
    assert (sensitive in shown) == (target == "quanto")

    output = tmp_path / "out"
    resolved = yaml.safe_load((output / "qat_config.yaml").read_text())
    assert (resolved["spec"]["weights"], resolved["target"]) == (spec[0], target)
    again = load_config(text_to_image.Config, [str(output / "qat_config.yaml")], "A test.")
    assert again.model_dump(mode="json") == resolved
    assert isinstance(qat.load(output), FluxTransformer2DModel)
    assert qat.verify(output).target == target
    kept = sorted(path.name for path in (tmp_path / "out-checkpoints").iterdir())
    assert kept == [
        *("fine_tuned.json", "fine_tuned.safetensors", "judged.json", "run.json"),
        *("step-2.ckpt", "step-2.json", "step-3.ckpt", "step-3.json"),
    ]

    results = json.loads((tmp_path / "out-results.json").read_text())
    assert [row["name"] for row in results] == names
    assert {"loss", "output_mse", *(f"loss_bin_{number}" for number in range(10))} == set(results[0]["metrics"])
    assert results[1]["metrics"]["output_mse"] == 0.0
    for row, reference in zip(results[2:], names[1:3], strict=True):
        assert row["comparison"] is None or row["comparison"]["reference"] == reference
    card = (output / "README.md").read_text()
    for kind in ("images", "losses"):
        picture = Image.open(tmp_path / f"out-{kind}.png").convert("L")
        assert np.array(picture).std() > 10  # there is something to see
        assert f"](out-{kind}.png)" in card
        assert (output / f"out-{kind}.png").is_file()


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("kinds", [W8A8, STARTED], ids=["activations", "starts within the fit"])
def test_student_teacher_and_both_arms_see_the_same_noise(
    kinds: list[str], small: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, list[list[Any]]] = {}
    fit = training.fit

    def record(name: str, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        hooks = []
        for role, module in ((name, model), (f"{name}: teacher", options.get("teacher"))):
            if module is None:
                continue
            calls = seen.setdefault(role, [])

            def note(module: nn.Module, _: Any, kwargs: dict[str, Any], calls: list[Any] = calls) -> None:
                trains = module.training or calls is not seen[name]  # and does not calibrate
                if trains and len(kwargs["hidden_states"]) == 4:  # the example to find layers with has two rows
                    calls.append((kwargs["hidden_states"].tolist(), kwargs["timestep"].tolist()))

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        trainer = fit(name, model, *arguments, **options)
        for hook in hooks:
            hook.remove()
        return trainer

    monkeypatch.setattr(training, "fit", record)
    text_to_image.main([*small, *kinds])
    assert "'clip'" not in caplog.text  # all have their start
    assert len(seen["fine-tuning"]) == 3
    assert seen["fine-tuning"] == seen["training"] == seen["training: teacher"]


@pytest.mark.usefixtures("unverified")
def test_encoders_are_out_of_memory_while_training(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[str, weakref.ref[nn.Module]]] = []
    alive: list[list[str]] = []
    load, fit = models.load_pipeline, training.fit

    def load_and_watch(*arguments: Any, **options: Any) -> Any:
        pipeline, folder = load(*arguments, **options)
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        parts.extend((name, weakref.ref(part)) for name, part in modules.items())
        return pipeline, folder

    def fit_and_look(*arguments: Any, **options: Any) -> Any:
        alive.append([name for name, part in parts if part() is not None])
        return fit(*arguments, **options)

    monkeypatch.setattr(models, "load_pipeline", load_and_watch)
    monkeypatch.setattr(comparison, "load_pipeline", load_and_watch)
    monkeypatch.setattr(training, "fit", fit_and_look)
    text_to_image.main(small)
    names = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert sorted(name for name, _ in parts) == sorted(names * 4)  # to encode with, and for three models that draw
    assert alive == [["transformer"], ["transformer"]]  # copies that drew are gone too


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(
    ("kinds", "sampled"),
    [
        (["int4", "algorithm:automatic", "--algorithm.start", "clip"], False),
        (["int4"], True),
        (["int8", "--spec.activations", "int8"], True),
    ],
    ids=["weights", "starts from data", "activations"],
)
def test_the_transformer_is_moved_for_encoding_only_where_the_sampler_runs(
    kinds: list[str], sampled: bool, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    move = nn.Module.to

    def note(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        moved.append(type(module).__name__)
        return move(module, *arguments, **options)

    class EndError(Exception):
        pass

    def look(*_: Any, **__: Any) -> Any:
        raise EndError

    monkeypatch.setattr(diffusion, "inspected", look)
    monkeypatch.setattr(nn.Module, "to", note)
    with pytest.raises(EndError):
        text_to_image.main([*small, "--spec.weights", *kinds])
    assert {"AutoencoderKL", "CLIPTextModel", "T5EncoderModel"} <= set(moved)
    assert ("FluxTransformer2DModel" in moved) == sampled


@pytest.mark.usefixtures("unverified")
def test_a_run_goes_on_from_saved_weights_to_the_same_end(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*small, "--spec.weights", "int8", "--spec.activations", "int8"]
    text_to_image.main(small)
    folder = tmp_path / "out-checkpoints"
    saved, last = (torch.load(folder / f"step-{step}.ckpt", weights_only=True) for step in (2, 3))
    assert last["global_step"] == 3
    names: list[str] = []
    starts: list[bool] = []

    class Witness(callbacks.StepProgress):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            names.append(self.description)
            starts.append(same(pl_module.state_dict(), saved["state_dict"]))

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    monkeypatch.setattr(training, "StepProgress", Witness)
    (folder / "step-3.ckpt").unlink()
    text_to_image.main([*small, "--overwrite", "--resume", str(folder / "step-2.ckpt")])
    assert names == ["training"]  # the float model of equal settings is there
    assert starts == [True]
    again = torch.load(folder / "step-3.ckpt", weights_only=True)
    assert again["global_step"] == 3
    assert same(again["state_dict"], last["state_dict"])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--model", "./nowhere"], ConfigError, "model: must be a directory that exists"),
        (["--data.source", "./nowhere"], DataError, r"data\.source: './nowhere' does not exist"),
        (["--data.source", ""], ConfigError, r"data\.source: String should have at least 1 character"),
        (["--spec.activations", "int8", "--target", "diffusers"], TargetError, "activations"),
        (["--spec.exclude", "*.nothing"], SpecError, "matches no layer that can be quantized"),
        (["--optimization.batch-size", "5000"], DataError, "there is no whole batch"),
        (["--optimization.temperature", "2"], qat.QatError, "no such option"),  # there is none
        (["--max-sequence-length", "4000"], DataError, "FluxPipeline cannot make an image"),
        (["--data.size", "15"], DataError, r"AutoencoderKL and FluxTransformer2DModel do not fit at data\.size 15"),
        (
            ["--spec.activations", "int8", "--schedule.calibration-batches", "0"],
            ConfigError,
            "schedule: calibration_batches: must be above 0",
        ),
    ],
    ids=[
        *("model", "data", "empty source", "activations", "pattern", "batch size", "temperature", "length", "size"),
        "calibration",
    ],
)
def test_bad_input_is_an_error_before_any_training(
    arguments: list[str], kind: type[Exception], message: str, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(tasks, "evaluate", lambda *_: pytest.fail("work began"))
    with pytest.raises(kind, match=message):
        text_to_image.main([*small, *arguments])


def refused(small: list[str], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(kind, match=message):
        text_to_image.main(small)


def test_a_pipeline_without_a_transformer_is_an_error(
    small: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "headless"
    make("flux").save_pretrained(folder)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    (folder / "transformer").rmdir()
    refused([*small, "--model", str(folder)], LoadError, "^model: .* cannot be loaded: ", monkeypatch)


def test_a_pipeline_around_a_unet_is_an_error(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        layers_per_block=1,
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "unet")
    message = (
        r"StableDiffusionPipeline in '.*' has no transformer, only .*unet.*: give a pipeline whose denoiser is one"
    )
    refused([*small, "--model", str(tmp_path / "unet")], LoadError, message, monkeypatch)


def test_missing_captions_and_unreadable_images_are_errors(
    small: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in images.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    small = [*small, "--data.source", str(folder)]
    (folder / "03.png").write_bytes(b"")
    refused(
        [*small, "--data.unreadable-limit", "0"], DataError, r"1 of 20 images cannot be read, .*03\.png", monkeypatch
    )
    (folder / "05.txt").unlink()
    refused(small, DataError, r"1 of 20 images .* have no caption \(first: 05\.png\)", monkeypatch)


def test_an_autoencoder_that_does_not_fit_is_an_error(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make("flux")
    pipeline.register_modules(vae=autoencoder(8, shift_factor=0.0))
    pipeline.save_pretrained(tmp_path / "odd")
    message = "AutoencoderKL and FluxTransformer2DModel do not fit"
    refused([*small, "--model", str(tmp_path / "odd")], DataError, message, monkeypatch)


@pytest.mark.parametrize(("package", "extra"), [("diffusers", "diffusers"), ("matplotlib", "report")])
def test_a_missing_package_is_an_error_that_names_the_extra(
    package: str, extra: str, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("recipes.common.models.find_spec", lambda name: None if name == package else find(name))
    message = rf"needs {package}, not installed here: run pip install 'qat\[{extra}\]'"
    with pytest.raises(ConfigError, match=message):
        text_to_image.main(small)
