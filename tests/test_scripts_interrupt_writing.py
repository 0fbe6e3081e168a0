"""A few of the interruptions of `scripts.interrupt_writing`: exports and results that are killed over older ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qat.files import whole
from scripts._writings import WRITINGS, Writing
from scripts.interrupt_writing import GOOD, Ended, Trial, kills, run, told


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(writing("export"), tmp_path_factory.mktemp("export"))


def writing(name: str) -> Writing:
    return next(writing for writing in WRITINGS if writing.name == name)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_killed_export_leaves_the_old_or_the_new(
    exchanges: bool, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(whole, "_exchange", lambda *_: False)
    assert set(kills(trial, 3, random.Random(0))) <= set(GOOD)


def test_a_mixture_a_leftover_and_a_bare_error_are_seen(trial: Trial) -> None:
    out = trial.restored() / "out"
    (out / "config.json").write_bytes(trial.states[1]["out/config.json"] + b" ")
    assert trial.found().startswith("mixture")
    trial.restored()
    (trial.folder / ".out.12345678.tmp" / "new").mkdir(parents=True)
    assert told(trial, Ended(2, f"{out} is full, and more is wanted"), True).startswith("left: ")
    assert told(trial, Ended(2, "no space"), True).startswith("an error without its place")
    assert told(trial, Ended(3, f"OSError: {out}"), True).startswith("another error")
    assert trial.after_another() == ""


@pytest.mark.parametrize("name", ["results", "judged", "fine-tuned", "state", "card"])
def test_other_writings_repeat(name: str, tmp_path: Path) -> None:
    trial = Trial(writing(name), tmp_path)
    assert run(trial.writing, trial.restored()) == Ended(0, "")
    assert trial.found() == "new"
    assert trial.after_another() == ""
