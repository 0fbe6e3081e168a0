"""R* of a handful of rows by hand, and rows of several models, which are not mixed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts._quality import Run
from scripts.benchmark_quality import Runs, key_of
from scripts.show_quality import Subject, arms_of, main, subject_of, table


def row(arm: str, seed: int, rate: float, loss: float, weights: str = "int4", **more: Any) -> dict[str, Any]:
    given = {"arm": arm, "weights": weights, "activations": None, "steps": 80, "seed": seed, "rate": rate}
    return given | {"loss": loss} | more


ROWS = [
    row("FT", 0, 1e-5, 2.5, "float"),  # not the best rate
    row("FT", 0, 3e-5, 2.0, "float"),
    row("FT", 1, 3e-5, 2.125, "float"),
    row("PTQ minmax", 0, 0.0, 4.0),
    row("PTQ minmax", 1, 0.0, 4.0),
    row("PTQ clip", 0, 0.0, 3.0),  # the best of the bases: what R* is measured from
    row("PTQ clip", 1, 0.0, 3.125),
    row("PTQ best", 0, 0.0, 2.5),  # better, but no base
    row("PTQ best", 1, 0.0, 2.625),
    row("ours", 0, 1e-4, 2.75),
    row("ours", 0, 3e-4, 2.25),  # the best rate on seed 0, whatever seed 1 says
    row("ours", 1, 1e-4, 2.0),
    row("ours", 1, 3e-4, 2.625),
    row("ours", 2, 3e-4, 2.0),  # has no fine-tuned model of its seed
    row("ours", 0, 1e-3, 0.0, error="failed"),
]


def test_r_star_is_the_share_of_the_gap_of_the_same_seed() -> None:
    arms = arms_of(ROWS)["int4", None, 80]
    assert list(arms) == ["PTQ minmax", "PTQ clip", "PTQ best", "ours"]
    assert arms["ours"].rate == 3e-4
    assert arms["ours"].closed == [0.75, 0.5]
    assert arms["ours"].above == [0.25, 0.5]
    assert arms["PTQ clip"].closed == [0.0, 0.0]
    assert arms["PTQ minmax"].closed == [-1.0, -0.875]
    assert arms["PTQ best"].closed == [0.5, 0.5]
    (line,) = (line for line in table(ROWS).splitlines() if "| ours |" in line)
    assert "| 0.625 ± 0.125 | 0.250 ± 0.250 | +0.3750 ± 0.1250 |" in line


def test_rows_of_several_models_are_refused_unless_one_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [*ROWS, *(r | {"model": "flux", "loss": r["loss"] / 2} for r in ROWS)]
    with pytest.raises(ValueError, match="got flux by 512 held-out blocks, language by 512 held-out blocks: choose"):
        table(mixed)
    with pytest.raises(ValueError, match="got language by 64 held-out blocks, language by 512"):
        table([*ROWS, ROWS[0] | {"held_out": 64}])
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, mixed)))
    main(file, model="language")
    assert capsys.readouterr().out.strip() == table(ROWS)
    main(file, model="flux")
    shown = capsys.readouterr().out
    assert "| 0.625 ± 0.125 | 0.250 ± 0.250 | +0.1875 ± 0.0625 |" in shown


def test_a_run_goes_on_from_rows_of_its_own_model_alone(tmp_path: Path) -> None:
    run, file, subject = Run("FT", "float", None, 80, 0, 3e-5), tmp_path / "rows.jsonl", Subject("vit", 512)
    file.write_text("\n".join(map(json.dumps, [*ROWS, ROWS[1] | {"model": "encoder"}])) + "\n")
    made = row("FT", 0, 3e-5, 1.0, "float", model="vit", held_out=512)
    pool = SimpleNamespace(apply_async=lambda *_: SimpleNamespace(get=lambda: made))
    runs = Runs(pool, file, subject)
    assert runs.rows == {}
    runs.make([run], {})
    assert runs.rows == {key_of(made): made}
    assert Runs(pool, file, subject).rows == runs.rows
    assert len(Runs(pool, file, Subject("language", 512)).rows) == len(ROWS) - 1


def test_the_results_say_of_which_model_they_are() -> None:
    for name, model in (("flux", "flux"), ("starts", "language")):
        lines = Path(__file__).parents[1].joinpath(f"docs/results/quality_{name}_h200.jsonl").read_text().splitlines()
        assert {subject_of(json.loads(line)).model for line in lines} == {model}
