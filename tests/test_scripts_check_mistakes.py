"""The quick mistakes of `scripts.mistakes`: each gets one good error, early, and leaves nothing behind."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from scripts._mistaken_files import prepare
from scripts.check_mistakes import SLOW, faults, make
from scripts.mistakes import CASES, QUICK, Mistake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in SLOW:
        importlib.import_module(module)
    made = tmp_path_factory.mktemp("mistakes")
    prepare(made)
    return made


@pytest.mark.parametrize("mistake", QUICK, ids=lambda mistake: mistake.name)
def test_a_mistake_gets_one_good_error(mistake: Mistake, folder: Path) -> None:
    answer = make(mistake, folder)
    assert faults(mistake, answer) == [], answer.told


def test_each_mistake_has_a_name_of_its_own() -> None:
    assert len({mistake.name for mistake in CASES}) == len(CASES) > 200
