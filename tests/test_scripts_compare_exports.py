"""scripts/compare_exports.py: what it finds, and that one case gives the same twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.compare_exports import CASES, compare, main, run

NAME = "sequential int4 bfloat16 quanto LearnedAffine/clip trained"


def result() -> dict[str, Any]:
    case = {
        "files": {"model.safetensors": "aa", "README.md": "bb"},
        "manifest": {"environment": {"qat": "1"}, "tensors": {"0.weight._data": {"sha256": "cc", "shape": [4, 8]}}},
        "contents": {"config.json": {"dtype": "float32"}},
        "losses": ["0x1.8p+0", "0x1.4p+0"],
    }
    return {"one": case, "two": copy.deepcopy(case)}


def changed(part: str, *path: Any, value: Any) -> dict[str, Any]:
    found = result()
    place = found["two"][part]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


def test_equal_results_have_no_difference() -> None:
    found = compare(result(), result())
    assert (found.differences, found.allowed) == ((), ())
    assert found.rows == {"one": "equal", "two": "equal"}


@pytest.mark.parametrize(
    ("after", "difference"),
    [
        (changed("files", "model.safetensors", value="ab"), 'two: files: model.safetensors: "aa" -> "ab"'),
        (changed("files", "new.json", value="dd"), 'two: files: new.json: none -> "dd"'),
        (changed("manifest", "environment", "qat", value="2"), 'two: manifest: environment.qat: "1" -> "2"'),
        (
            changed("manifest", "tensors", "0.weight._data", "shape", value=[8, 4]),
            "two: manifest: tensors.0.weight._data.shape.0: 4 -> 8",
        ),
        (changed("manifest", "notes", value=["new"]), 'two: manifest: notes: none -> ["new"]'),
        (
            changed("contents", "config.json", "dtype", value="float16"),
            'two: contents: config.json.dtype: "float32" -> "float16"',
        ),
        (changed("losses", 1, value="0x1.4p+1"), 'two: losses: 1: "0x1.4p+0" -> "0x1.4p+1"'),
        ({"one": result()["one"]}, "two: only before"),
        (result() | {"three": result()["one"]}, "three: only after"),
    ],
    ids=["byte", "file", "field", "nested field", "new field", "configuration", "loss", "missing case", "new case"],
)
def test_a_change_is_a_difference(after: dict[str, Any], difference: str) -> None:
    assert difference in compare(result(), after).differences


@pytest.mark.parametrize("field", ["environment", "environment.qat", "environ*"])
def test_a_field_that_may_differ_is_reported_only(field: str) -> None:
    found = compare(result(), changed("manifest", "environment", "qat", value="2"), allow=[field])
    assert found.differences == ()
    assert found.allowed == ('two: manifest: environment.qat: "1" -> "2"',)


def test_only_fields_of_the_manifest_and_the_card_may_differ() -> None:
    found = compare(result(), changed("files", "README.md", value="ee"), allow=["model.safetensors"])
    assert (found.differences, len(found.allowed)) == ((), 1)
    assert compare(result(), changed("files", "model.safetensors", value="ee"), allow=["*"]).differences


def test_the_exit_code_says_whether_there_are_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"qat": "old", "cases": result()}))
    after.write_text(json.dumps({"qat": "new", "cases": changed("losses", 0, value="0x1p+0")}))
    assert main(["compare", str(before), str(before)]) == 0
    assert main(["compare", str(before), str(after)]) == 1
    assert 'two: losses: 0: "0x1.8p+0" -> "0x1p+0"' in capsys.readouterr().out


def test_a_case_gives_the_same_twice(tmp_path: Path) -> None:
    first, second = (run(CASES[NAME], tmp_path / name) for name in ("first", "second"))
    assert compare({"case": first}, {"case": second}).differences == ()
    assert len(first["losses"]) == 3
    assert {"model.safetensors", "quanto_qmap.json"} <= first["files"].keys()


def test_there_are_forty_cases_and_more() -> None:
    assert len(CASES) >= 40
