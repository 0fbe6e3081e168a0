"""The benchmark of formats: its table is the one in the docs, and the formats' own packages give values of the type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.benchmark_formats import FORMATS, compressed_values, gguf_values, rates, table

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_the_page_has_the_table_of_the_rows() -> None:
    rows = [json.loads(line) for line in (RESULTS / "formats_h200.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["format"] for row in rows} == {"float", *FORMATS}
    assert table(rows) in (RESULTS / "formats.md").read_text(encoding="utf-8")


def test_a_cell_is_the_mean_over_seeds() -> None:
    rows = [{"format": "gguf:q4_0", "how": "best", "perplexity": p, "kl": p / 100} for p in (2.0, 4.0)]
    assert "| 3.000 ± 1.414 (0.0300) |" in table(rows)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_rates(form: str) -> None:
    assert len(rates(form.partition(":")[2])) >= 3


@pytest.mark.parametrize(("weights", "levels"), [("q4_0", 16), ("q4_1", 16), ("int4_g32", 16), ("int2_g32_zp", 4)])
def test_own_packages_give_few_values_a_group(weights: str, levels: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = (gguf_values if weights.startswith("q") else compressed_values)(weight, weights)
    assert found.shape == weight.shape
    assert all(1 < len(group.unique()) <= levels for group in found.view(-1, 32))
