"""What recipes share: noise and order of a fit, weights that a resumed run takes over, refusals before any work."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from diffusers import FluxTransformer2DModel
from lightning import Callback
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qat
from qat.errors import LoadError, StateError, TrainingError
from qat.starting import awaiting
from recipes import text_to_image
from recipes.common import callbacks, checkpoints, comparison, diffusion, diffusion_config, fine_tuned, models, training
from recipes.common.batches import TrainingBatches
from recipes.common.progress import quiet_libraries
from recipes.common.settings import OptimizationSettings, TrainerSettings
from recipes.data import DataError
from recipes.data.images import Images
from tests.pipelines import make


class Echo:
    """Notes the batches that it is trained on."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def inputs(self, batch: Any) -> dict[str, Any]:
        return {"input": batch}

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        self.seen.append(batch.flatten().tolist())
        loss: torch.Tensor = outputs.square().mean()
        return loss

    def metrics(self) -> Any:
        return nn.ModuleDict()

    def update(self, metrics: Any, outputs: Any, batch: Any) -> None:
        raise StateError("never evaluated")


def fitted(steps: int, folder: Path, *others: Any, resume: Path | None = None) -> tuple[Echo, dict[str, Any]]:
    """What a task saw of examples and noise at every step, and the weights, moved by dropout too, of the fit's end."""

    def collate(examples: list[int]) -> torch.Tensor:
        return torch.tensor(examples).float().unsqueeze(1) + torch.rand(len(examples), 1) * 0.999

    task, model = Echo(), nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[2].weight)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[2].bias)
    optimization = OptimizationSettings(steps=steps, warmup_steps=0, decay="constant", average=0.5)
    settings = training.FitSettings(optimization, TrainerSettings(accelerator="cpu", accumulate_grad_batches=2), 3)
    quiet_libraries()
    options: dict[str, Any] = {
        "callbacks": [callbacks.LastCheckpoints(folder, 2, 2, {}), *others],
        "resume": resume,
        "settings": settings,
    }
    # A pass of 5 batches, so that steps of 2 go over its end.
    training.fit("training", model, task, TrainingBatches(list(range(20)), 4, collate, 3), learning_rate=0.1, **options)  # type: ignore[arg-type]
    return task, model.state_dict()


class Stop(Callback):
    """Ends a fit as a kill would, at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


class StopEarly(Callback):
    """Stands for data that ends too early."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = True


def test_a_fit_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"optimization\.steps: training ended after \d of 3 steps"):
        fitted(3, tmp_path, StopEarly())


@pytest.mark.parametrize(("stop", "step"), [(3, 2), (4, 4), (5, 4)])
def test_an_interrupted_fit_goes_on_with_the_same_data_and_noise(stop: int, step: int, tmp_path: Path) -> None:
    whole, weights = fitted(7, tmp_path / "a")
    torch.rand(stop)  # what is drawn elsewhere, such as by a preparation, changes nothing
    with pytest.raises(ZeroDivisionError):
        fitted(7, tmp_path / "b", Stop(stop))
    found = checkpoints.newest(tmp_path / "b")
    assert found is not None
    assert found.step == step
    later, resumed = fitted(7, tmp_path / "b", resume=found.path)
    assert later.seen == whole.seen[2 * step :]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert len({tuple(batch) for batch in whole.seen}) == 14  # other ones in the second pass


def test_a_fit_that_goes_on_from_its_last_step_ends_with_the_average(tmp_path: Path) -> None:
    _, weights = fitted(4, tmp_path)
    task, again = fitted(4, tmp_path, resume=tmp_path / "step-4.ckpt")
    assert task.seen == []
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_each_process_has_batches_and_noise_of_its_own() -> None:
    batches = TrainingBatches(list(range(8)), 2, lambda rows: (rows, float(torch.rand(()))), 5)  # type: ignore[arg-type]
    own = [list(dataclasses.replace(batches, rank=rank, processes=2)) for rank in (0, 1)]
    assert sorted(row for rows, _ in own[0] + own[1] for row in rows) == list(range(8))
    assert len({noise for _, noise in own[0] + own[1]}) == 4
    assert list(dataclasses.replace(batches, seed=6)) != list(batches)


class Watched(nn.Linear):
    """Notes where it is moved to."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.moved: list[str] = []

    def to(self, *arguments: Any, **options: Any) -> Any:
        self.moved.append(str(arguments[0]))
        return super().to(*arguments, **options)

    def cpu(self) -> Any:
        self.moved.append("back")
        return super().cpu()


def test_a_teacher_leaves_the_device_after_the_fit() -> None:
    quiet_libraries()
    teacher, batches = Watched(), TrainingBatches(torch.ones(8, 1), 4)  # type: ignore[arg-type]
    optimization = OptimizationSettings(steps=2, warmup_steps=0)
    settings = training.FitSettings(optimization, TrainerSettings(accelerator="cpu"), 0)
    training.fit("training", nn.Linear(1, 1), Echo(), batches, learning_rate=1e-3, settings=settings, teacher=teacher)
    assert teacher.moved == ["cpu", "cpu", "back"]


def test_a_judged_model_leaves_the_device_before_a_copy_of_it_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluation: Any = SimpleNamespace(compare_with=lambda model: model.moved.append("compared"))
    monkeypatch.setattr(comparison.DiffusionComparison, "_scores", lambda *_: ({"loss": 0.5}, [0.25, 0.75]))
    drawn: list[Any] = []
    image = Image.effect_noise((4, 4), 50.0)
    monkeypatch.setattr(
        comparison.DiffusionComparison, "_draw", lambda _, model, device: drawn.append(model) or [image]
    )
    model, device = Watched(), torch.device("cpu", 0)
    data: Any = SimpleNamespace(evaluation=evaluation)
    judging = comparison.DiffusionComparison(text_to_image.Config(), data, torch.bfloat16, model, device, tmp_path)
    assert model.moved == ["cpu:0", "compared", "back"]
    judging.judge("float", model, device, 0, None)
    assert model.moved == ["cpu:0", "compared", "back", "cpu:0", "back"]
    (copied,) = drawn
    assert copied.moved[5:] == ["torch.bfloat16", "cpu:0"]
    assert model.weight.dtype == torch.float32
    again = comparison.DiffusionComparison(text_to_image.Config(), data, torch.bfloat16, model, device, tmp_path)
    again.judge("float", model, device, 0, None)  # takes what is kept
    assert "float" in again
    assert again.losses == judging.losses == {"float": [0.25, 0.75]}
    assert again._kept["float"][0] == {"loss": 0.5}
    assert [kept.tobytes() for kept in again._images["float"]] == [image.tobytes()]
    assert len(drawn) == 1


def test_a_run_takes_over_the_fine_tuned_weights_of_equal_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = text_to_image.Config()
    weights = fine_tuned.FineTunedWeights(tmp_path / "a", first)
    trained, trainer = nn.Linear(3, 2), SimpleNamespace(is_global_zero=True)
    assert not weights.restore(nn.Linear(3, 2))  # no run has ended there
    weights.save(trained, trainer)  # type: ignore[arg-type]
    path = tmp_path / "a" / "fine_tuned.safetensors"
    assert sorted(file.name for file in path.parent.iterdir()) == ["fine_tuned.json", path.name]

    def resumed(folder: str = "b", **changed: Any) -> fine_tuned.FineTunedWeights:
        named = {} if folder == "a" else {"resume": path.parent / "step-3.ckpt"}
        return fine_tuned.FineTunedWeights(tmp_path / folder, first.model_copy(update={**named, **changed}))

    for folder in ("a", "b"):
        model = nn.Linear(3, 2)
        assert resumed(folder, output=tmp_path, overwrite=True).restore(model)
        assert torch.equal(model.weight, trained.weight)
    before = nn.Linear(3, 2)
    kept = before.weight.clone()
    assert not resumed(seed=1).restore(before)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert not resumed().restore(before)
    assert "fine_tuned.safetensors is skipped, for it is damaged" in caplog.text
    assert torch.equal(before.weight, kept)


def test_an_average_begins_where_quantization_leaves_weights_of_one_kind() -> None:
    assert callbacks.averages(OptimizationSettings(), []) == []
    schedule = qat.QuantizationSchedule(first_weights="int4", first_weights_until=7, start_step=2)
    quantizing = qat.QuantizationAwareTraining(qat.QuantSpec(weights="int2"), schedule=schedule)
    found: list[Any] = []
    for others in ([], [quantizing]):
        (averaging,) = callbacks.averages(OptimizationSettings(average=0.9), others)
        found.append(averaging)
    assert [averaging.update_starting_at_step for averaging in found] == [0, 7]


@pytest.mark.parametrize(
    ("schedule", "spec", "rule"),
    [
        ({"first_weights_until": 100}, {"weights": "int2"}, "first_weights_until: must be below .* \\(100\\), got 100"),
        ({"first_weights_until": 5}, {"weights": "int4"}, "first_weights: is for int2 weights, which spec does not"),
    ],
    ids=["after the last step", "no layer"],
)
def test_first_weights_that_do_not_fit_are_told_before_any_work(schedule: Any, spec: Any, rule: str) -> None:
    fields = {"first_weights": "int4", **schedule}
    with pytest.raises(ValueError, match=rule):
        text_to_image.Config(spec=qat.QuantSpec(**spec), schedule=qat.QuantizationSchedule(**fields))
    mixed = qat.QuantSpec(weights="int4", overrides={"*.a": "int2"})
    text_to_image.Config(spec=mixed, schedule=qat.QuantizationSchedule(first_weights="int4", first_weights_until=5))


def test_of_several_processes_one_keeps_the_weights(tmp_path: Path) -> None:
    weights = fine_tuned.FineTunedWeights(tmp_path / "a", text_to_image.Config())
    weights.save(nn.Linear(3, 2), SimpleNamespace(is_global_zero=False))  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("written", [None, str(diffusion_config.REFERENCE), "recipes/reference_flux", "owner/model"])
def test_the_reference_pipeline_has_its_own_length_however_it_is_named(
    written: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(diffusion_config.REFERENCE.parent.parent)
    config = text_to_image.Config(model=written)
    assert diffusion_config.sequence(config) == {"max_sequence_length": None if written == "owner/model" else 16}
    longer = text_to_image.Config(model=written, max_sequence_length=9)
    assert diffusion_config.sequence(longer) == {"max_sequence_length": 9}


def test_prompts_that_are_no_labels_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "load_images", lambda *_: pytest.fail("work began"))
    config, cpu = text_to_image.Config(prompts=("1", "a cat")), torch.device("cpu")
    with pytest.raises(DataError, match=r"^prompts: DiTPipeline cannot draw \('1', 'a cat'\): give .* labels integers"):
        diffusion.diffusion_data(make("dit"), Path(), config, cpu, 4, 0)


def test_too_few_images_are_refused_before_they_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    few = datasets.Dataset.from_dict({"caption": ["a", "b", "c"]})
    monkeypatch.setattr(diffusion, "load_images", lambda *_: Images(few, few, ()))
    monkeypatch.setattr(diffusion, "encode", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(DataError, match=r"optimization\.batch_size: 4 is more than the 3 examples to train on"):
        diffusion.diffusion_data(make("flux"), Path(), text_to_image.Config(), torch.device("cpu"), 4, 0)


class ReadsAWeight(nn.Module):
    """Uses the weight of a layer without calling it, which only a run of the model tells."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(256, 64), nn.Linear(256, 64)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.called(hidden_states) + hidden_states @ self.read.weight.T
        return outputs


def test_what_is_printed_is_what_preparation_decides() -> None:
    model, example = ReadsAWeight(), {"hidden_states": torch.zeros(2, 256)}
    shown = diffusion.inspected(model, qat.QuantSpec(weights="int8"), "quanto", example)
    assert "1 of 2 linear layers stay float" in shown
    qat.prepare(model, qat.QuantSpec(weights="int8"), example_inputs=example, target="quanto")
    assert type(model.read) is nn.Linear
    assert type(model.called) is not nn.Linear


def test_a_pipeline_around_a_given_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make("flux")
    pipeline.save_pretrained(tmp_path)
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    loaded, _ = models.load_pipeline(str(tmp_path), torch.bfloat16, transformer=pipeline.transformer)
    assert loaded.transformer is pipeline.transformer
    assert pipeline.transformer.dtype == torch.float32
    assert loaded.vae.dtype == torch.bfloat16


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = tmp_path / "own_model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=8)).save_pretrained(folder)
    backend = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a").save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(LoadError, match="trust_remote_code"):
        models.load_language_model(str(folder))
    model, _ = models.load_language_model(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"


@pytest.mark.parametrize("later", [False, True], ids=["from the first step", "later"])
def test_what_is_quantized_without_training_has_the_start_of_training(later: bool) -> None:
    torch.manual_seed(0)
    batches: list[Any] = [{"input": torch.randn(64, 256)} for _ in range(2)]
    model = nn.Sequential(nn.Linear(256, 64))
    spec: dict[str, Any] = {"spec": qat.QuantSpec(weights="int4"), "algorithm": qat.Automatic(start="best")}
    alone = copy.deepcopy(model)
    qat.prepare(alone, **spec)
    training.calibrate_and_freeze(alone, batches, 2, torch.device("cpu"))
    quantized = training.quantized_copy(model, iter(batches), 2, torch.device("cpu"), later=later, **spec)
    codes = [frozen[0].weight.dequantize() for frozen in (alone, quantized)]
    assert torch.equal(*codes)
    assert bool(awaiting(model)) == later
    qat.freeze(model)
    assert torch.equal(model[0].weight.dequantize(), codes[0]) != later
