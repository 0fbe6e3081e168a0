"""The table of public models: its figures, and that the one in docs/ has every shipped configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

import qat
from qat.hosts.configurations import build_on_meta, published
from scripts import inspection_table

ROOT = Path(__file__).parent.parent


def made(path: Path, monkeypatch: pytest.MonkeyPatch, *only: str) -> dict[str, list[str]]:
    """The rows of a table of some models, by model."""
    monkeypatch.setattr(sys, "argv", ["inspection_table", "--only", *only, "--output", str(path)])
    inspection_table.main()
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


def test_a_row_has_shares_and_bytes_of_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "BAAI/bge-base-en-v1.5"
    rows = made(tmp_path / "table.md", monkeypatch, "BGE-base")
    assert list(rows) == [name]
    count = sum(p.numel() for p in build_on_meta(name).parameters())
    reports = [qat.inspect(name, qat.QuantSpec(weights=kind), target="transformers") for kind in ("int8", "int4")]
    shares = [f"{report.quantized_share * 100:.1f}" for report in reports for _ in ("quanto", "own")]
    after = [(count * 2 + report.bytes_after - report.bytes_before) / 1e9 for report in reports]
    assert rows[name] == [f"{count / 1e6:.1f} M", *shares, f"{count * 2 / 1e9:.2f}", *(f"{size:.2f}" for size in after)]


class Own(nn.Linear):
    """A subclass, which stays float everywhere."""


def test_a_model_of_which_nothing_is_quantized_is_told_with_the_reason() -> None:
    outcome = inspection_table.inspected(nn.ModuleList([Own(8, 8)]), "int8", "quanto")
    assert (outcome.share, outcome.nbytes) == (0.0, (8 * 8 + 8) * 2)
    assert outcome.told().startswith("everything, for these reasons: ['Own is not exactly nn.Linear")


def test_small_shares_are_left_out_and_large_ones_come_first() -> None:
    outcome = inspection_table.Outcome(0.5, 1.0, {"a": 0.1, "b": 0.3996, "c": 0.0004})
    assert outcome.told() == "40.0% b; 10.0% a"
    assert inspection_table.Outcome(1.0, 1.0, {}).told() == "nothing of note"


def test_the_page_has_every_shipped_configuration() -> None:
    page = (ROOT / "docs" / "results" / "inspection.md").read_text()
    rows = {line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")}
    assert rows == {"| model", *(f"| {name}" for name in published())}
