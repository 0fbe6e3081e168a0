"""The benchmark of LoRA: every arm runs, and gains are counted from the right rows."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from scripts import benchmark_lora, benchmark_speed

SHAPE = {"hidden": 64, "intermediate": 128, "layers": 1, "heads": 4, "vocabulary": 64, "batch": 2, "length": 16}


def test_all_arms_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(benchmark_speed.SHAPES, "cpu", SHAPE)
    given = ["memory", "--shape", "cpu", "--device", "cpu", "--dtype", "float32", "--types", "int4"]
    monkeypatch.setattr(sys, "argv", ["benchmark_lora", *given, "--steps", "1", "--rounds", "1", "--warmup", "1"])
    benchmark_lora.main()
    rows = {row["arm"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows.keys() == {"float", *benchmark_lora.MEMORY_ARMS}
    failed = {arm for arm, row in rows.items() if "error" in row}
    assert failed == (set() if find_spec("torchao") else {"lora_torchao"})
    assert all(row["ms"] > 0 for arm, row in rows.items() if arm not in failed)


def test_gains_are_shares_of_what_full_training_gains() -> None:
    losses = {("PTQ clip", 0.0): 4.0, ("PTQ best", 0.0): 3.0, ("best", 1e-4): 2.0, ("lora 8", 1e-3): 2.5}
    losses |= {("lora 8", 2e-3): 2.25, ("best", 2e-4): 2.1}
    rows = [
        {"arm": arm, "weights": "int4", "rate": rate, "loss": loss + shift}
        for (arm, rate), loss in losses.items()
        for shift in (-0.125, 0.125)
    ]
    found = benchmark_lora.gains([*rows, {"arm": "FT", "loss": 1.0}], "int4")
    assert found["lora 8"] == {"loss": 2.25, "rate": 2e-3, "gain_from_clip": 0.875, "gain_from_best": 0.75}
    assert found["PTQ best"]["gain_from_best"] == 0.0
    assert found["best"]["gain_from_best"] == 1.0
