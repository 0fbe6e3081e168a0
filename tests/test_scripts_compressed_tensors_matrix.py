"""The matrix of compressed-tensors: columns are the cases that ran, and the page has the rows beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from scripts._architecture_course import Outcome
from scripts._architecture_table import Row
from scripts.compressed_tensors_matrix import CASES, COURSE, table
from tests.architectures import ARCHITECTURES

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def row(**results: str) -> Row:
    return Row.of("by hand", [asdict(Outcome(case, result, "why")) for case, result in results.items()])


def test_columns_are_the_cases_that_ran() -> None:
    text = table({"A": row(int8="equal", int4="float"), "B": row(int4="error")})
    assert "| class | share | int8 | int4 |" in text
    assert "| A | 0% | equal | float |" in text
    assert "| B | 0% | – | error |" in text
    assert "- B, int4: error: why" in text
    assert "- A" not in text


def test_a_run_of_some_classes_keeps_the_rows_of_others(tmp_path: Path) -> None:
    COURSE.write({"A": row(int8="equal")}, ["A"], tmp_path)
    COURSE.write({"B": row(int8="float")}, ["A", "B"], tmp_path)
    text = (tmp_path / "compressed_tensors.md").read_text(encoding="utf-8")
    assert "| A | 0% | equal |" in text
    assert "| B | 0% | float |" in text


def test_the_page_has_the_rows_of_every_class_and_case() -> None:
    rows = json.loads((RESULTS / "compressed_tensors.json").read_text(encoding="utf-8"))["results"]
    assert list(rows)[: len(ARCHITECTURES)] == list(ARCHITECTURES)
    assert all([outcome["case"] for outcome in found["outcomes"]] == list(CASES) for found in rows.values())
    lines = table({name: Row(**found) for name, found in rows.items()}).splitlines()
    page = (RESULTS / "compressed_tensors.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")] == [line for line in page if line.startswith("|")]
