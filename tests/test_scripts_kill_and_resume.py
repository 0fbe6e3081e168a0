"""A recipe that is interrupted in this process ends as `scripts.kill_and_resume` asks of one that is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qat
from recipes import causal_lm
from recipes.common import experiment, training
from scripts.kill_and_resume import OPTIONS, files_of, make_data, make_model

_, _, OWN = OPTIONS["causal_lm"]
ARGUMENTS = [
    "--model",
    "../model",
    "--output",
    "out",
    *OWN,
    "--optimization.steps",
    "5",
    "--optimization.average",
    "0.5",
]
ARGUMENTS += [
    "--optimization.batch-size",
    "4",
    "--trainer.accelerator",
    "cpu",
    "--no-report",
    "--trainer.checkpoint-every",
    "2",
]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    verify = qat.verify
    with monkeypatch.context() as patch:
        patch.setattr(qat, "verify", lambda directory, **_: verify(directory))
        causal_lm.main(ARGUMENTS)
    return files_of(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model, and a run without a break."""
    root = tmp_path_factory.mktemp("kills")
    (source, kind), sizes, _ = OPTIONS["causal_lm"]
    make_data(root / "data")
    make_model(source, kind, sizes, root / "model")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(root / "whole", monkeypatch)
    return root


@pytest.mark.parametrize(
    ("place", "step"), [("fine-tuning 2", None), ("training 1", None), ("training 3", 2), ("results", 5)]
)
def test_an_interrupted_run_ends_with_the_same_export(
    place: str, step: int | None, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = training.StepProgress.on_train_batch_end

    def interrupt(progress: Any, trainer: Any, *others: Any) -> None:
        count(progress, trainer, *others)
        if place == f"{progress.description} {trainer.global_step}":
            raise ZeroDivisionError

    def end(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(training.StepProgress, "on_train_batch_end", interrupt)
        if place == "results":
            patch.setattr(experiment, "show_results", end)
        with pytest.raises(ZeroDivisionError):
            run(root / place, monkeypatch)
    capsys.readouterr()
    assert run(root / place, monkeypatch) == files_of(root / "whole")
    shown = capsys.readouterr()
    assert ("going on from step" in shown.out) == (step is not None)
    assert step is None or f"going on from step {step} of 5" in shown.out
    assert ("calibrating" in shown.err) == (step is None)  # what is quantized without training is judged once
    assert ("fine-tuning: " in shown.err) == place.startswith("fine-tuning")  # its weights are there otherwise
