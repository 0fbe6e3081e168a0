"""A hundred random mutations of exports of every target; `docs/results/mutations.md` has thousands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.mutate_exports import GOOD, RECIPES, make_cases, mutate

_NAMES = (
    "quanto-int8",
    "plain-int8",
    "transformers-int4-shards",
    "diffusers-int8",
    "compressed-int8-active",
    "gguf-q8_0",
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def test_mutated_exports_are_caught(tmp_path: Path) -> None:
    cases = list(make_cases(_NAMES, tmp_path))
    assert {case.recipe.target for case in cases} | {"gguf-diffusers"} == {recipe.target for recipe in RECIPES.values()}
    results = list(mutate(cases, 120, 11, tmp_path))
    bad = [f"{result.outcome}: {result}" for result in results if result.outcome not in GOOD]
    assert not bad, "\n".join(bad)
    assert Counter(result.outcome for result in results)["caught"] > 100
