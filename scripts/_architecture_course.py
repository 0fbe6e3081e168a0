"""The course that both matrices of architectures take: cases in processes of their own, rows kept in a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts._architecture_table import Row
from scripts.json_workers import Ask, Worker

FINE = ("equal", "float", "unfit")


@dataclass
class Outcome:
    """How one case went."""

    case: str
    result: str
    """``equal``, ``float`` (nothing can be quantized), ``unfit`` (nor does the float model), ``refused`` (by the
    target's rules), ``difference``, ``error`` or ``crash``."""
    detail: str = ""
    share: float = 0.0
    """Share of all parameters quantized, 0 to 1."""
    matrix_share: float = 0.0
    """The same of all weights with two and more dimensions."""
    left_float: dict[str, str] = field(default_factory=dict)
    """Weights with two and more dimensions that stay float, by layer or name, with the reason."""
    fake_gap: float | None = None
    """Largest difference of fake-quantized and frozen outputs, relative to the largest output; float32 only."""
    kernel_gap: float | None = None
    """The same between frozen outputs and those of plain layers with the dequantized weights; without activations."""
    torch: str = ""
    """The version that it ran with, where a table has rows of several."""


@dataclass(frozen=True)
class Course:
    """One matrix."""

    module: str
    """Which answers requests with the option ``--work``."""
    stem: str
    """Of the names of both files."""
    table: Callable[[Mapping[str, Row]], str]
    """The rows as Markdown."""

    def run(self, names: Sequence[str], jobs: int, row_of: Callable[[str, Ask], Row]) -> dict[str, Row]:
        """The rows of some classes, in as many processes, each on one thread."""
        found: dict[str, Row] = {}

        def some(share: Sequence[str]) -> None:
            with Worker(self.module, "--work") as worker:
                for name in share:
                    found[name] = row_of(name, worker.ask)
                    results = [outcome["result"] for outcome in found[name].outcomes] or ["not:", found[name].reason]
                    faults = [o["detail"] for o in found[name].outcomes if o["result"] not in FINE]
                    print(" ".join([f"{name:40}", *results, *faults[:1]])[:300], flush=True)

        jobs = max(1, min(jobs, len(names)))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(some, [names[job::jobs] for job in range(jobs)]))
        return {name: found[name] for name in names}

    def write(self, found: Mapping[str, Row], order: Sequence[str], output: Path) -> None:
        """Write both files; rows of classes in ``order`` that were not run are those already there."""
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{self.stem}.json"
        kept = {}
        if len(found) < len(order) and path.exists():
            kept = {name: Row(**row) for name, row in json.loads(path.read_text(encoding="utf-8"))["results"].items()}
        rows = {**kept, **found}
        rows = {name: rows[name] for name in order if name in rows}
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items())
        head = f'{{"command": "python -m {self.module}", "results": {{'
        path.write_text(f"{head}\n{lines}\n}}}}\n", encoding="utf-8")
        (output / f"{self.stem}.md").write_text(self.table(rows), encoding="utf-8")


def outcomes_of(name: str, cases: Sequence[object], ask: Ask) -> list[dict[str, object]]:
    """All cases of one class; the end of a process is an outcome like any other."""
    outcomes = []
    for number, case in enumerate(cases):
        made = dict(ask({"name": name, "case": number}))
        if "error" in made:
            kind = "crash" if made["error"].startswith("the process ended") else "error"
            made = asdict(Outcome(str(case), kind, made["error"]))
        outcomes.append(made)
    return outcomes


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="*", default=[""], help="parts of class names; default all")
    made.add_argument("--jobs", type=int, default=1, help="processes, each on one thread")
    made.add_argument("--output", type=Path, default=Path("docs/results"))
    made.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return made


def chosen(names: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Of all classes those that the options name."""
    return [name for name in names if any(word.lower() in name.lower() for word in arguments.only)]
