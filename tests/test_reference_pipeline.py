"""The shipped pipeline draws what it is asked for, and the script that made it runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from scripts import make_reference_pipeline

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "recipes" / "reference_flux"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SMALL = "--batch 8 --autoencoder-batch 8 --sample-steps 1 --device cpu"
SHAPE = {"height": 32, "width": 32, "max_sequence_length": 16}

shipped = pytest.mark.skipif(not SHIPPED.is_dir(), reason="recipes/reference_flux is not there")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompts: list[str], steps: int, **options: Any) -> np.ndarray:
    """Pictures from 0 to 1 of shape (prompts, 32, 32, 3), each begun with noise of its own."""
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    result = pipeline(prompts, num_inference_steps=steps, generator=noise, output_type="np", **SHAPE, **options)
    return np.asarray(result.images)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load(SHIPPED)


@pytest.fixture(scope="module")
def all_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_reference_pipeline.main(["--write-images", str(folder)])
    return folder


@pytest.fixture(scope="module")
def made(all_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a few steps on the first forty digits make."""
    output = tmp_path_factory.mktemp("pipeline")
    few = "--steps 3 --copies 2 --autoencoder-steps 3 --evaluate-every 2 --samples 4"
    make_reference_pipeline.main([str(output), "--images", str(forty(all_digits)), *few.split(), *SMALL.split()])
    return output


def forty(digits: Path) -> Path:
    """The same folder, told of its first forty images only."""
    folder = digits.parent / f"{digits.name}-forty"
    folder.mkdir(exist_ok=True)
    lines = (digits / "metadata.jsonl").read_text().splitlines()[:40]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for line in lines:
        shutil.copy(digits / json.loads(line)["file_name"], folder)
    return folder


def test_images_are_written_with_captions(all_digits: Path) -> None:
    rows = [json.loads(line) for line in (all_digits / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(list(all_digits.glob("*.png"))) == 1797
    for row in rows:
        assert str(row["label"]) in row["caption"] or WORDS[row["label"]] in row["caption"]
    with Image.open(all_digits / rows[3]["file_name"]) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_script_makes_a_pipeline(made: Path) -> None:
    record = json.loads((made / "training.json").read_text())
    assert [point["step"] for point in record["curve"]] == [2, 3]
    assert record["curve"][-1]["evaluation"] < record["curve"][0]["evaluation"]
    assert (record["training_images"], record["evaluation_images"]) == (32, 8)
    for text in (json.dumps(record), (made / "README.md").read_text()):
        assert str(made.parent) not in text
    with Image.open(made / "samples.png") as grid:
        assert grid.size == (2 * 10 * 32, 2 * 4 * 32)


def test_made_pipeline_takes_any_text(made: Path) -> None:
    pipeline = load(made)
    latents = pipeline.vae.encode(torch.rand(2, 3, 32, 32) * 2 - 1).latent_dist.mode()
    assert latents.shape == (2, 4, 8, 8)
    assert draw(pipeline, ["the digit three", "Ünïcode 日本, quite another"], steps=1).shape == (2, 32, 32, 3)
    for word in WORDS:  # a word of the captions is one token
        assert len(pipeline.tokenizer_2(word).input_ids) == 2
        assert len(pipeline.tokenizer(word).input_ids) == 3


def test_training_calls_the_transformer_as_the_pipeline_does(made: Path) -> None:
    pipeline, prompts, seen = load(made), ["the digit three", "a handwritten 7"], {}

    def record(module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        seen.update(options, output=output[0])

    with pipeline.transformer.register_forward_hook(record, with_kwargs=True):
        draw(pipeline, prompts, steps=1)
    trained = make_reference_pipeline.Velocity(pipeline, ["", *reversed(prompts)])
    with torch.no_grad():
        velocity = trained(seen["hidden_states"], seen["timestep"], torch.tensor([2, 1]))
    torch.testing.assert_close(velocity, seen["output"], rtol=1e-5, atol=1e-5)


def test_time_limit_ends_the_schedule(all_digits: Path, tmp_path: Path) -> None:
    few = "--steps 1000000 --minutes 0.01 --copies 1 --autoencoder-steps 1 --samples 1"
    make_reference_pipeline.main([str(tmp_path), "--images", str(forty(all_digits)), *few.split(), *SMALL.split()])
    record = json.loads((tmp_path / "training.json").read_text())
    assert 1 <= record["steps"] == record["curve"][-1]["step"] < 1000


def test_output_or_images_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_reference_pipeline.main([])
    assert "name either the output folder or --write-images FOLDER" in capsys.readouterr().err


@shipped
def test_shipped_files() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4
    for path in weights:
        with safe_open(path, "pt") as tensors:  # type: ignore[no-untyped-call]
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


@shipped
def test_shipped_shape(pipeline: Any) -> None:
    transformer = pipeline.transformer
    assert transformer.inner_dim == 256
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (1, 3)
    assert not transformer.config.guidance_embeds
    assert 5.5e6 < sum(parameter.numel() for parameter in transformer.parameters()) < 6e6
    assert pipeline.vae_scale_factor == 4
    assert pipeline.scheduler.config.shift == 1.0
    assert not pipeline.scheduler.config.use_dynamic_shifting


@shipped
def test_shipped_training_had_converged() -> None:
    record = json.loads((SHIPPED / "training.json").read_text())
    losses = [point["evaluation"] for point in record["curve"]]
    assert losses[-3:] == pytest.approx([min(losses)] * 3, rel=0.01)
    assert record["bfloat16_evaluation_loss"] == pytest.approx(min(losses), rel=0.01)


@shipped
def test_latents_have_mean_zero_and_unit_deviation(pipeline: Any) -> None:
    pictures = torch.from_numpy(digit_pictures()[0]).permute(0, 3, 1, 2)[::5]
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mode()
        decoded = pipeline.vae.decode(latents).sample / 2 + 0.5
    latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert latents.mean().item() == pytest.approx(0, abs=0.05)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert (decoded - pictures).square().mean().item() < 2e-3


@shipped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_draws_the_digits_it_is_asked_for(dtype: torch.dtype) -> None:
    pictures = draw(load(SHIPPED, dtype), [f"the digit {word}" for word in WORDS], steps=20)
    known, labels = digit_pictures()
    means = np.stack([known[labels == label].mean(0) for label in range(10)])
    distances = ((pictures[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    assert sum(distances.argmin(axis=1) == np.arange(10)) >= 8


@shipped
def test_true_guidance_with_the_empty_prompt(pipeline: Any) -> None:
    plain = draw(pipeline, ["a handwritten 3"], steps=10)
    guided = draw(pipeline, ["a handwritten 3"], steps=10, negative_prompt=[""], true_cfg_scale=3.0)
    assert np.isfinite(guided).all()
    assert 0 < np.abs(guided - plain).mean() < 0.2


@shipped
def test_readme_of_the_shipped_pipeline_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = re.search(r"```python\n(.*?)```", (SHIPPED / "README.md").read_text(), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    assert names["image"].size == (32, 32)


def digit_pictures() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, enlarged here: numbers from 0 to 1 of shape (n, 32, 32, 3), and their labels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = (source.images * (255 / 16)).round().astype("uint8")
    large = [Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for one in grey]
    return np.stack([np.asarray(one, dtype=np.float32) / 255 for one in large]), source.target
