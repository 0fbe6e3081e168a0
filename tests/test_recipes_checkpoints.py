"""The one checkpoint of a recipe's fit: the newest weights, whole or not at all, from which a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from recipes.common.callbacks import LastCheckpoint, checkpoints_in
from recipes.common.settings import TrainerSettings
from tests.training_modules import ResumableLoader, UserModule, assert_equal_state, loader, quantization, quiet_trainer


class Stop(lightning.Callback):
    """Stands for whatever ends a process at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


class NotedCheckpoint(LastCheckpoint):
    """Notes when it saves."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(folder, every)
        self.saved: list[int] = []

    def _save(self, trainer: lightning.Trainer) -> None:
        super()._save(trainer)
        self.saved.append(trainer.global_step)


def saved_step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_it_is_written_at_the_interval_and_at_the_end_and_is_one_file(tmp_path: Path) -> None:
    kept = NotedCheckpoint(tmp_path / "kept", 2)
    quiet_trainer(tmp_path, kept, accumulate_grad_batches=2, max_steps=5, max_epochs=-1).fit(UserModule(), loader())
    assert kept.saved == [2, 4, 5]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["last.ckpt"]
    assert saved_step(tmp_path / "kept" / "last.ckpt") == 5


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, torn, resumed = UserModule(), UserModule(), UserModule()
    quiet_trainer(tmp_path, quantization()).fit(whole, ResumableLoader())
    kept = checkpoints_in(tmp_path / "kept", TrainerSettings(checkpoint_every=3))
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(tmp_path, quantization(), *kept, Stop(5)).fit(torn, ResumableLoader())
    path = tmp_path / "kept" / "last.ckpt"
    assert saved_step(path) == 3
    kept = checkpoints_in(tmp_path / "kept", TrainerSettings(checkpoint_every=3))
    trainer = quiet_trainer(tmp_path, quantization(), *kept)
    trainer.fit(resumed, ResumableLoader(), ckpt_path=str(path), weights_only=True)
    assert_equal_state(resumed, whole)
    assert saved_step(path) == 8


def test_a_failure_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = LastCheckpoint(tmp_path, 1)
    write = lightning.Trainer.save_checkpoint

    def fail_at_the_third(trainer: lightning.Trainer, path: Path) -> None:
        if trainer.global_step == 3:
            path.write_bytes(b"half")
            raise OSError("disk full")
        write(trainer, path)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        quiet_trainer(tmp_path, kept).fit(UserModule(), loader())
    assert saved_step(tmp_path / "last.ckpt") == 2


def test_a_directory_that_a_sharding_strategy_writes_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(trainer: lightning.Trainer, path: Path) -> None:
        path.mkdir()
        (path / "step").write_text(str(trainer.global_step))

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", write)
    quiet_trainer(tmp_path, LastCheckpoint(tmp_path, 3)).fit(UserModule(), loader())
    assert (tmp_path / "last.ckpt" / "step").read_text() == "8"
