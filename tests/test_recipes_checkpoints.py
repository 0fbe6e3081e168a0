"""The checkpoints of a recipe's fit: the newest are kept, each is whole or skipped, and a run goes on from them."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import qat
from qat.errors import ExportError
from qat.runs import run_state
from recipes import causal_lm
from recipes.common import checkpoints
from recipes.common.callbacks import LastCheckpoints
from recipes.common.checkpoints import begin_run, differences, end_run, newest, settings_of, start_run, was_interrupted
from recipes.common.config import ConfigError
from tests.training_modules import (
    INT4,
    INT8_INT8,
    ResumableLoader,
    Tiny,
    UserModule,
    assert_equal_state,
    loader,
    quantization,
    quiet_trainer,
)


class Stop(lightning.Callback):
    """Stands for whatever ends a process at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def kept(folder: Path, every: int, keep: int = 2) -> LastCheckpoints:
    return LastCheckpoints(folder, every, keep, settings_of(causal_lm.Config()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_they_are_written_at_the_interval_and_at_the_end_and_two_are_left(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 5, "max_epochs": -1}
    quiet_trainer(tmp_path, kept(folder, 2), **options).fit(UserModule(), loader())
    assert names(folder) == ["step-4.ckpt", "step-4.json", "step-5.ckpt", "step-5.json"]
    assert [int(torch.load(path, weights_only=True)["global_step"]) for path in checkpoints.of(folder)] == [4, 5]
    assert newest(folder) == checkpoints.Kept(folder / "step-5.ckpt", 5, settings_of(causal_lm.Config()))


class Limit(lightning.Callback):
    """Lets no file grow beyond some bytes from a step on."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_one_error_and_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    limits, folder = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "kept"
    told = (
        rf"'{folder}/step-3.ckpt' could not be written, .*: File too large: '{folder}' took .*, and at least .* wanted"
    )
    try:
        with pytest.raises(ExportError, match=told):
            quiet_trainer(tmp_path, kept(folder, 1), Limit(), max_steps=5, max_epochs=-1).fit(UserModule(), loader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(folder) == ["step-1.ckpt", "step-1.json", "step-2.ckpt", "step-2.json"]
    assert newest(folder) == checkpoints.Kept(folder / "step-2.ckpt", 2, settings_of(causal_lm.Config()))


@pytest.mark.parametrize("spec", [INT4, INT8_INT8], ids=["int4", "int8 with int8 activations"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(spec: qat.QuantSpec, tmp_path: Path) -> None:
    whole, torn, resumed = UserModule(), UserModule(), UserModule()
    callback: dict[str, Any] = {} if spec is INT4 else {"start_step": 2, "observe_from": 2, "observe_until": 7}
    quiet_trainer(tmp_path, quantization(spec, **callback)).fit(whole, ResumableLoader())
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(tmp_path, quantization(spec, **callback), kept(tmp_path / "kept", 3), Stop(5)).fit(
            torn, ResumableLoader()
        )
    found = newest(tmp_path / "kept")
    assert found is not None
    assert found.step == 3
    trainer = quiet_trainer(tmp_path, quantization(spec, **callback), kept(tmp_path / "kept", 3))
    trainer.fit(resumed, ResumableLoader(), ckpt_path=str(found.path), weights_only=True)
    assert_equal_state(resumed, whole)
    assert run_state(resumed.model) == run_state(whole.model)


def test_one_loads_as_a_float_model(tmp_path: Path) -> None:
    trained = UserModule()
    quiet_trainer(tmp_path, quantization(INT4), kept(tmp_path, 3)).fit(trained, loader())
    state = torch.load(tmp_path / "step-8.ckpt", weights_only=True)["state_dict"]
    model = Tiny()
    model.load_state_dict({key.removeprefix("model."): state[key] for key in state if "_quantizer." not in key})
    assert torch.equal(model.first.weight, trained.model.first.weight)


@pytest.mark.parametrize("damage", ["cut", "changed", "note missing", "note cut", "file missing"])
def test_a_damaged_one_is_skipped_with_a_warning_that_names_it(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_trainer(tmp_path, kept(tmp_path, 3)).fit(UserModule(), loader())
    path, note = tmp_path / "step-8.ckpt", tmp_path / "step-8.json"
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 1
    if damage in ("cut", "changed"):
        path.write_bytes(data if damage == "changed" else data[:-9])
    elif damage == "note cut":
        note.write_text(note.read_text()[:-9])
    else:
        (note if damage == "note missing" else path).unlink()
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 6
    assert ("step-8.ckpt is skipped" in caplog.text) == (damage != "file missing")


def test_a_failure_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = lightning.Trainer.save_checkpoint

    def fail_at_the_third(trainer: lightning.Trainer, path: Path) -> None:
        if trainer.global_step == 3:
            path.write_bytes(b"half")
            raise OSError("disk full")
        write(trainer, path)

    with monkeypatch.context() as patch:
        patch.setattr(lightning.Trainer, "save_checkpoint", fail_at_the_third)
        with pytest.raises(OSError, match="disk full"):
            quiet_trainer(tmp_path, kept(tmp_path, 1)).fit(UserModule(), loader())
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert not list(tmp_path.glob("*.partial"))  # which would fill the disk
    (tmp_path / "step-3.partial").write_bytes(b"half")  # as of a process that was ended there
    quiet_trainer(tmp_path, kept(tmp_path, 9)).fit(UserModule(), loader())
    assert "step-3.partial" not in names(tmp_path)


def test_directories_that_a_sharding_strategy_writes_are_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(trainer: lightning.Trainer, path: Path) -> None:
        path.mkdir()
        (path / "step").write_text(str(trainer.global_step))

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", write)
    for _ in range(2):
        quiet_trainer(tmp_path, kept(tmp_path, 3)).fit(UserModule(), loader())
    assert names(tmp_path) == ["step-6.ckpt", "step-6.json", "step-8.ckpt", "step-8.json"]
    found = newest(tmp_path)
    assert found is not None
    assert (found.path / "step").read_text() == "8"
    (found.path / "step").write_text("9")
    assert newest(tmp_path) != found


def saved(folder: Path, config: causal_lm.Config, step: int = 8) -> Path:
    partial, path = folder / "a.partial", folder / f"step-{step}.ckpt"
    partial.write_bytes(b"state")
    checkpoints.publish(partial, path, step=step, settings=settings_of(config))
    return path


def test_the_same_command_finds_its_own_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = causal_lm.Config()
    assert begin_run(tmp_path, config) is None
    assert names(tmp_path) == []  # what a run lacks may still be found
    start_run(tmp_path, config, None)
    assert was_interrupted(tmp_path, config)
    path = saved(tmp_path, config)
    longer = config.model_copy(update={"optimization": config.optimization.model_copy(update={"steps": 9})})
    for same in (config, config.model_copy(update={"output": tmp_path, "overwrite": True}), longer):
        assert begin_run(tmp_path, same) == path
    assert capsys.readouterr().out.splitlines()[0] == f"going on from step 8 of 80 ({path})"
    end_run(tmp_path)
    assert not was_interrupted(tmp_path, config)
    assert begin_run(tmp_path, config) is None  # after its end, the command begins anew
    start_run(tmp_path, config, None)
    assert names(tmp_path) == ["run.json"]


def test_a_checkpoint_of_other_settings_is_an_error_with_a_list(tmp_path: Path) -> None:
    config, other = causal_lm.Config(), causal_lm.Config(seed=1, spec=qat.QuantSpec(weights="int2"))
    start_run(tmp_path, config, None)
    path = saved(tmp_path, config)
    listed = r"spec\.weights: 'int4' there, 'int2' here; seed: 0 there, 1 here: give"
    with pytest.raises(ConfigError, match=rf"^output: '.*step-8\.ckpt' was made with other settings: {listed}"):
        begin_run(tmp_path, other)
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match=rf"^resume: .*{listed}"):
        begin_run(tmp_path / "b", other.model_copy(update={"resume": path}))
    assert begin_run(tmp_path / "b", config.model_copy(update={"resume": path})) == path
    start_run(tmp_path / "b", config, path)
    own = saved(tmp_path / "b", config, 9)
    assert begin_run(tmp_path / "b", config.model_copy(update={"resume": path})) == own  # it is further
    assert differences(settings_of(config), settings_of(config)) == []


def test_what_an_earlier_run_left_never_becomes_the_result_of_another(tmp_path: Path) -> None:
    first, second = causal_lm.Config(), causal_lm.Config(seed=1)
    start_run(tmp_path, first, None)
    saved(tmp_path, first)
    end_run(tmp_path)
    for _ in range(2):  # killed before its first checkpoint, and started again
        assert begin_run(tmp_path, second) is None
        start_run(tmp_path, second, None)
        assert names(tmp_path) == ["run.json"]


def test_two_processes_do_not_train_with_one_folder(tmp_path: Path) -> None:
    config, folder = causal_lm.Config(), tmp_path / "out-checkpoints"
    start_run(folder, config, None)
    if (child := os.fork()) == 0:
        checkpoints._held.clear()  # as in a process that was started by itself
        told = 0
        for begin in (begin_run, lambda *given: start_run(*given, None)):
            with suppress(Exception):
                try:
                    begin(folder, config)
                except ConfigError as error:
                    told += "another process trains" in str(error)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    start_run(folder, config, None)  # the process itself goes on
    end_run(folder)
    assert checkpoints._identity(folder) not in checkpoints._held


def test_logs_of_another_run_go(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for name in ("fine-tuning/metrics.csv", "training-from-8/metrics.csv", "of_tensorboard/events"):
        (logs / name).parent.mkdir(parents=True)
        (logs / name).write_text("")
    start_run(tmp_path / "a", causal_lm.Config(), None, logs)
    assert names(logs) == ["of_tensorboard"]
    (logs / "training").mkdir()
    (logs / "training" / "metrics.csv").write_text("")
    start_run(tmp_path / "a", causal_lm.Config(), None, logs)  # which was interrupted
    assert names(logs) == ["of_tensorboard", "training"]
    end_run(tmp_path / "a")
