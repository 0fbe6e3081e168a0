"""docs/loaders.md: its tables are those of the marks, and each type and kind of layer of a target has a proven row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qat.hosts import TARGETS
from qat.layers import LAYERS, QuantizedLayer
from qat.layers.conv1d import QConv1D
from qat.layers.lora import QLoraLinear
from scripts import loaders_table
from scripts.loaders_table import HOLDS, LOADERS, NONE, PAGE, SAME, Row, rows, types_of

KINDS = {"QLinear": "Linear", "QEmbedding": "embedding", "QExpert": "experts", "QConv2d": "Conv2d"}
KINDS |= {"QConv1D": "Conv1D", "QLoraLinear": "LoRA"}


def rows_of(target: str) -> list[Row]:
    return [row for row, _ in rows() if row.target == target]


def given(test: Any) -> Iterator[set[str]]:
    """The types that a test is run with, for each of its parametrizations that has a parameter ``weights``."""
    for mark in test.pytestmark:
        names = mark.args[0] if mark.name == "parametrize" else ()
        if names == "weights":
            yield set(mark.args[1])
        elif not isinstance(names, str) and "weights" in names:
            yield {values[names.index("weights")] for values in mark.args[1]}


def test_the_page_is_current() -> None:
    assert loaders_table.tables() in PAGE.read_text(encoding="utf-8"), "run python -m scripts.loaders_table"


def test_the_script_replaces_the_tables_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    path = tmp_path / "page.md"
    path.write_text(text.replace(loaders_table.tables(), "old\n"), encoding="utf-8")
    monkeypatch.setattr(loaders_table, "PAGE", path)
    loaders_table.main()
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("target", TARGETS)
def test_every_type_of_a_target_has_a_row(target: str) -> None:
    """Add the mark to a test that loads such an export and compares it, or write that test."""
    found, (weights, activations) = rows_of(target), types_of(TARGETS[target])
    assert {name for row in found for name in row.weights} == set(weights)
    active = {name for row in found for name in (row.weights if row.activations == SAME else row.activations)}
    assert active - {NONE} == set(activations)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_layer_of_a_target_has_a_row(target: str) -> None:
    kinds: set[type[QuantizedLayer]] = {*LAYERS.values(), QConv1D, QLoraLinear}
    own = [kind for kind in kinds if kind.__module__.startswith("qat.")]  # and none that another test has added
    held = {KINDS[kind.__name__] for kind in own if target in (kind.targets or TARGETS)}
    assert {name for row in rows_of(target) for name in row.layers} == held


def test_a_row_names_no_type_that_its_test_is_not_given() -> None:
    for row, test in rows():
        for types in given(test):
            assert set(row.weights) <= types, test


def test_every_loader_is_used_and_only_known_ones_are() -> None:
    assert {row.loader for row, _ in rows()} == LOADERS.keys() >= HOLDS.keys()


def test_links_lead_to_the_tests() -> None:
    links = re.findall(r"\[([\w.]+)::([\w:]+)\]\(\.\./tests/([\w.]+)\)", loaders_table.tables())
    assert len(links) == len(list(rows()))
    for file, name, path in links:
        assert file == path
        assert f"def {name.rpartition(':')[2]}(" in (PAGE.parents[1] / "tests" / path).read_text(encoding="utf-8")
