"""Runs side by side: what they made, how good it is, and which settings differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qat.errors import LoadError
from qat.run_report.record import RunRecord, read_run

__all__ = ["RunComparison", "compare_runs"]


@dataclass(frozen=True)
class RunComparison:
    """Facts, metrics and differing settings of runs; prints as a table with a column for each run."""

    runs: tuple[str, ...]
    rows: dict[str, tuple[Any, ...]]
    """What is compared, and its value in each run; None where a run has none."""
    settings: dict[str, tuple[Any, ...]]
    """Settings that are not the same in all runs."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        """The table."""
        table = Table(Column(overflow="fold"), *(Column(_shown(run), overflow="fold") for run in self.runs))
        for part in (self.rows, self.settings):
            for name, values in part.items():
                table.add_row(*map(_shown, (name, *values)))
            table.add_section()
        console = Console()
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip("\n")


def compare_runs(runs: Sequence[str | PathLike[str]]) -> RunComparison:
    """Compare two or more runs by what they left on the disk.

    Args:
        runs: directories of exports; a recipe's results beside them are compared too, by the row of the exported model.

    Raises:
        LoadError: there are fewer than two, or one is no export.
    """
    if len(runs) < 2:
        raise LoadError(f"runs: needs two directories or more to compare, got {len(runs)}: name another one")
    records = [read_run(run, codes=False) for run in runs]
    facts = [_facts(record) for record in records]
    settings = [dict(_flat(record.manifest.config or {})) for record in records]
    return RunComparison(
        tuple(record.directory.name for record in records),
        {name: tuple(one.get(name) for one in facts) for name in dict.fromkeys(n for one in facts for n in one)},
        {
            name: values
            for name in dict.fromkeys(n for one in settings for n in one)
            if len(set(map(repr, values := tuple(one.get(name) for one in settings)))) > 1
        },
    )


def _facts(record: RunRecord) -> dict[str, Any]:
    frozen = record.manifest.frozen
    facts: dict[str, Any] = {
        "target": record.manifest.target,
        "weights": frozen.spec.weights,
        "activations": frozen.spec.activation_type or "float",
        "algorithm": frozen.algorithm,
        "quantized layers": len(record.layers),
        "MiB of weights": round(record.weight_bytes / 2**20, 2),
    }
    for row in record.results[-1:]:  # the exported model's
        facts |= {"steps": row["steps"], "learning rate": row.get("learning_rate"), **row["metrics"]}
    return facts


def _flat(values: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", value


def _shown(value: Any) -> Text:
    """As it stands: names and settings of other people may hold rich's markup, or codes that a terminal obeys."""
    text = "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return Text("".join(letter if letter.isprintable() else "?" for letter in text))
