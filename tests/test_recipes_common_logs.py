from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recipes.common import training
from recipes.common.callbacks import _size
from recipes.common.config import ConfigError
from recipes.common.logs import logger_of
from recipes.common.settings import TrainerSettings


def test_a_run_that_goes_on_keeps_its_earlier_log(tmp_path: Path) -> None:
    for stage in ("training", "training-from-2", "fine-tuning"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.csv").write_text("step\n")
    logger = logger_of("csv", tmp_path, "training", tmp_path / "step-4.ckpt")
    assert logger is not None
    assert logger.log_dir == str(tmp_path / "training-from-4")
    assert {path.name for path in tmp_path.iterdir()} == {"training", "training-from-2", "fine-tuning"}
    logger_of("csv", tmp_path, "training", tmp_path / "step-2.ckpt")  # killed and started again
    assert {path.name for path in tmp_path.iterdir()} == {"training", "fine-tuning"}
    (tmp_path / "training-from-8").mkdir()
    (tmp_path / "training-from-2").mkdir()
    logger_of("csv", tmp_path, "training", tmp_path / "step-4.ckpt")  # the newer one was damaged: 8 comes again
    assert {path.name for path in tmp_path.iterdir()} == {"training", "training-from-2", "fine-tuning"}
    logger_of("csv", tmp_path, "training", None)  # another run
    assert {path.name for path in tmp_path.iterdir()} == {"fine-tuning"}


def test_nothing_is_logged_where_nothing_is_wanted(tmp_path: Path) -> None:
    assert logger_of("none", tmp_path, "training", None) is None
    assert logger_of("csv", None, "training", None) is None


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboard")]
)
def test_a_missing_package_is_one_error(tmp_path: Path, name: str, package: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    settings = TrainerSettings.model_validate({"logger": name, "accelerator": "cpu"})
    with pytest.raises(ConfigError, match=rf"trainer: Lightning cannot train with .*logger='{name}'"):
        training._trainer(settings, lambda: logger_of(settings.logger, tmp_path, "training", None))


def test_progress_counts_what_a_batch_holds() -> None:
    assert _size({"input_ids": torch.zeros(2, 3)}) == (6, "tokens")
    assert _size({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2)}) == (2, "images")
    assert _size({"x": torch.zeros(5, 2)}) == (5, "examples")
    assert _size(3) == (0, "examples")
