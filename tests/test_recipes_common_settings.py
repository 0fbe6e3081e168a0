"""What every recipe lets a user choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import qat
from recipes import causal_lm, image_classification, text_to_image
from recipes.common.config import ConfigError, load_config
from recipes.common.models import load_teacher
from recipes.common.settings import RecipeConfig
from tests.test_training_teacher import Tokens, batch


@pytest.mark.parametrize("source", ["owner/model", "owner/model-1.0_b"])
def test_what_can_be_a_hub_name_is_left_to_the_hub(source: str) -> None:
    assert load_config(RecipeConfig, ["--model", source], "A test.").model == source


def test_a_directory_is_found_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "a" / "b").mkdir(parents=True)
    assert load_config(RecipeConfig, ["--model", "~/models/a/b"], "A test.").model == str(
        tmp_path / "models" / "a" / "b"
    )


@pytest.mark.parametrize(
    "source", ["./model", "/no/model", "~/no_model", "~nobody/model", "a/b/c", "model/", "", "gpt2"]
)
def test_a_path_that_does_not_exist_is_no_hub_name(source: str) -> None:
    with pytest.raises(ConfigError, match="model: must be a directory that exists, or a name on the hub"):
        load_config(RecipeConfig, ["--model", source], "A test.")


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").touch()
    with pytest.raises(ConfigError, match=r"must be a directory that exists.*got 'model'"):
        load_config(RecipeConfig, ["--model", "model"], "A test.")


def test_a_schedule_is_ordered() -> None:
    with pytest.raises(ConfigError, match=r"observe_until \(3\) must come after observe_from \(5\)"):
        load_config(RecipeConfig, ["--schedule.observe-from", "5", "--schedule.observe-until", "3"], "A test.")
    with pytest.raises(qat.QatError, match=r"schedule\.finish"):
        load_config(RecipeConfig, ["--schedule.finish", "last"], "A test.")


def test_a_schedule_of_quantized_activations_has_batches_to_calibrate_with() -> None:
    none = ["--schedule.calibration-batches", "0"]
    assert load_config(RecipeConfig, none, "A test.").schedule.calibration_batches == 0
    with pytest.raises(ConfigError, match="schedule: calibration_batches: must be above 0, for spec quantizes"):
        load_config(RecipeConfig, [*none, "--spec.activations", "int8"], "A test.")


def test_a_start_that_needs_data_has_batches_and_whole_weights() -> None:
    def refuse(*arguments: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_config(causal_lm.Config, arguments, "A test.")

    none = ("--schedule.calibration-batches", "0")
    refuse(*none, message=r"schedule.calibration_batches: must be above 0, for algorithm.start='best' needs data: set")
    load_config(causal_lm.Config, [*none, "algorithm:learned-affine", "--algorithm.start", "clip"], "A test.")
    load_config(text_to_image.Config, [*none, "algorithm:automatic", "--algorithm.start", "clip"], "A test.")
    load_config(text_to_image.Config, [*none, "--spec.weights", "int8"], "A test.")  # 8 bits need no start
    refuse(*none, "--spec.weights", "int8", "--spec.overrides", "*.down_proj=int4", message="calibration_batches: must")
    sharded = ("--trainer.strategy", "fsdp")
    refuse(*sharded, message=r"trainer.strategy: 'fsdp' shards weights, and algorithm.start='best' needs whole ones")
    load_config(causal_lm.Config, [*sharded, "algorithm:learned-affine", "--algorithm.start", "clip"], "A test.")
    shards = ("--trainer.strategy", "fsdp2", "--trainer.num-nodes", "2")
    assert load_config(causal_lm.Config, shards, "A test.").trainer.num_nodes == 2  # starts come from shards
    average = ("--optimization.average", "0.9")
    refuse(*shards, *average, message=r"'fsdp2' shards weights, and optimization.average needs whole ones: use 'ddp'")
    late = ("--optimization.average", "0.9", "--optimization.steps", "9", "--schedule.start-step", "9")
    refuse(
        *late, message=r"schedule.start_step: must be below optimization.steps \(9\), got 9: nothing trains quantized"
    )


def test_a_file_is_for_the_recipe_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("recipe: text_to_image\nseed: 3\n")
    assert load_config(text_to_image.Config, [str(path)], "A test.").seed == 3
    with pytest.raises(ConfigError) as caught:
        load_config(causal_lm.Config, [str(path), "--seed", "4"], "A test.")
    assert str(caught.value) == (
        f"{path}: recipe: must be 'causal_lm', the recipe that runs, got 'text_to_image': run the recipe that the file "
        "names (./scripts/quickstart text_to_image FILE), or give a file for this one"
    )


def test_a_resolved_configuration_names_its_recipe(tmp_path: Path) -> None:
    config = text_to_image.Config(seed=5)
    resolved = config.model_dump(mode="json")
    assert resolved["recipe"] == config.recipe == "text_to_image"
    path = tmp_path / "qat_config.yaml"
    path.write_text(yaml.safe_dump(resolved))
    assert load_config(text_to_image.Config, [str(path)], "A test.") == config
    with pytest.raises(ConfigError, match="must be 'causal_lm'"):
        load_config(causal_lm.Config, [str(path)], "A test.")


def test_recipes_distil_by_default_and_a_part_of_it_keeps_the_rest() -> None:
    found = load_config(causal_lm.Config, [], "A test.").optimization.distillation
    assert found == qat.Distillation(hidden_states=1.0)
    part = ["--optimization.distillation.weight", "0.5"]
    found = load_config(text_to_image.Config, part, "A test.").optimization.distillation
    assert found == qat.Distillation(loss="squared", weight=0.5, hidden_states=1.0)


def test_predictions_without_classes_have_no_divergence() -> None:
    with pytest.raises(ConfigError, match=r"distillation\.loss: must be 'squared', for noise and velocity .* got 'kl'"):
        load_config(text_to_image.Config, ["--optimization.distillation.loss", "kl"], "A test.")


def test_an_untrained_head_is_no_teacher(tmp_path: Path) -> None:
    untrained = ["--new-head", "--no-float-baseline"]
    with pytest.raises(ConfigError, match="new_head: the output layer of a new head is untrained"):
        load_config(image_classification.Config, untrained, "A test.")
    for remedy in (["--optimization.distillation.weight", "0"], ["--teacher", str(tmp_path)]):
        load_config(image_classification.Config, [*untrained, *remedy], "A test.")


def test_a_teacher_is_a_model_or_cached_logits(tmp_path: Path) -> None:
    def load(path: str) -> Tokens:
        assert path == str(tmp_path)
        return Tokens()

    assert load_teacher(RecipeConfig(), load) is None
    assert isinstance(load_teacher(RecipeConfig(teacher=str(tmp_path)), load), Tokens)
    qat.cache_logits(Tokens(), [batch()], tmp_path / "cache")
    cached = RecipeConfig(teacher=str(tmp_path / "cache"))
    assert isinstance(load_teacher(cached, load), qat.CachedLogits)
