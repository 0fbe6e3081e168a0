from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qat.inspection import inspect
from qat.spec import QuantSpec
from qat.verification import Check, VerifyReport
from recipes.common.results import ResultRow, inspect_totals, show_end, show_results
from recipes.common.run import Run

ROWS = [ResultRow("float", {"loss": 2.0}, 2**20, 0), ResultRow("trained", {"loss": 1.98769}, 2**19, 80, 2e-4)]


def test_the_totals_of_an_inspection_come_with_its_notes() -> None:
    report = inspect(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64, bias=False)), QuantSpec(exclude=("1",)))
    said = inspect_totals(replace(report, notes=("one", "two")))
    assert said.splitlines() == [
        "79.8% of 20,544 parameters are quantized; linear weights 40.00 KiB in bfloat16 -> 24.12 KiB as exported",
        "one",
        "two",
    ]


def test_the_table_has_a_line_for_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_results(ROWS, tmp_path / "results.json", ["loss"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines] == [
        ["float", "2.0000", "1.00 MiB", "0", "-"],
        ["trained", "1.9877", "512.00 KiB", "80", "0.0002"],
    ]


def test_all_metrics_are_written_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_results(ROWS, tmp_path / "results.json", [])
    assert "loss" not in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert [ResultRow(**row) for row in written] == ROWS


def test_what_is_no_finite_number_is_written_as_null(tmp_path: Path) -> None:
    metrics = {"loss": 2.0, "loss_bin_0": float("nan"), "loss_bin_1": float("inf")}
    show_results([ResultRow("float", metrics, 2**20, 0)], tmp_path / "results.json", ["loss"])
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written[0]["metrics"] == {"loss": 2.0, "loss_bin_0": None, "loss_bin_1": None}


def test_the_end_names_the_export_its_loader_and_the_other_files(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = torch.device("cpu")
    report = VerifyReport("out/int4", "transformers", (Check("files", True, ""), Check("load", True, "")))
    show_end(Run(Path("out/int4"), True, cpu, cpu), report)
    assert capsys.readouterr().out.splitlines() == [
        "exported model: out/int4 (reloaded in a fresh process, compared and found equal: 2 checks)",
        "load it: qat.load('out/int4'); its README.md shows other loaders",
        "results: out/int4-results.json; checkpoints: out/int4-checkpoints",
    ]
