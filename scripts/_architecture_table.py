"""The results of `scripts.architecture_matrix` as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COMMAND = ".venv/bin/python -m scripts.architecture_matrix"


@dataclass(frozen=True)
class Row:
    """All results of one class, as plain data."""

    task: str
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    left_float: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By reason: ``count`` and some ``layers`` that stay float, and the ``cases`` it holds for."""
    reason: str = ""
    """Why the class was not run."""

    @classmethod
    def of(cls, task: str, outcomes: Sequence[Mapping[str, Any]]) -> Row:
        """The outcomes, with the layers left float as one summary of all cases."""
        found: dict[str, tuple[dict[str, None], list[str]]] = {}
        for outcome in outcomes:
            for layer, reason in outcome["left_float"].items():
                layers, cases = found.setdefault(reason, ({}, []))
                layers[layer] = None
                cases += [] if outcome["case"] in cases else [outcome["case"]]
        summary = {
            reason: {
                "count": len(layers),
                "layers": list(layers)[:3],
                "cases": [] if len(cases) == len(outcomes) else cases,
            }
            for reason, (layers, cases) in found.items()
        }
        plain = [{key: value for key, value in outcome.items() if key != "left_float"} for outcome in outcomes]
        return cls(task, plain, summary)

    def largest(self, share: str) -> float:
        return max((outcome[share] for outcome in self.outcomes), default=0.0)


def table(rows: Mapping[str, Row]) -> str:
    """The results as Markdown."""
    from importlib.metadata import version

    run = {name: row for name, row in rows.items() if row.outcomes}
    counts = Counter(outcome["result"] for row in run.values() for outcome in row.outcomes)
    lines = [
        "# Architectures",
        "",
        f"`{COMMAND}`",
        "",
        f"Tiny random models of {len(run)} classes of transformers {version('transformers')}, with optimum-quanto "
        f"{version('optimum-quanto')} and torch {version('torch').partition('+')[0]}, on a CPU. Each is prepared, "
        "trained for two steps, frozen, exported for transformers (causal language models made by hand for quanto too) "
        "and loaded by the target's own loader. *equal*: every code, scale, shift, other parameter and buffer, and "
        "every output, bit for bit. *float*: nothing in the model can be quantized. *unfit*: the float model does not "
        "train, or not run in the dtype, either.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + f", of {counts.total()} cases.",
        "",
        *_tasks(rows),
        "`of all` is the quantized share of all parameters, `of matrices` that of all weights with two and more "
        "dimensions: embeddings, convolutions and experts in one parameter included. Both are the largest over the "
        f"cases. {_gaps(run)}",
        "",
    ]
    for task in dict.fromkeys(row.task for row in run.values()):
        lines += _results(task, {name: row for name, row in run.items() if row.task == task})
    lines += [
        "## Left float",
        "",
        "Of the classes made by hand; output heads and tied weights, which stay float by "
        "default, and what no format holds are not listed.",
        "",
    ]
    lines += [*(line for name, row in run.items() if row.task == "by hand" for line in _left_float(name, row)), ""]
    lines += ["Over all classes, by reason:", "", *_reasons(run), ""]
    left_out = [f"- {name}: {row.reason[:200]}" for name, row in rows.items() if row.reason]
    lines += ["## Faults", "", *(faults(run) or ["None."]), "", "## Not run", "", *(left_out or ["None."])]
    return "".join(f"{line if line.startswith('|') else wrapped(line)}\n" for line in lines)


def wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _tasks(rows: Mapping[str, Row]) -> Iterator[str]:
    """How many classes and equal cases each task has."""
    yield "| task | classes | run | equal | float | unfit | other |"
    yield "|---|---|---|---|---|---|---|"
    for task in dict.fromkeys(row.task for row in rows.values()):
        some = [row for row in rows.values() if row.task == task]
        results = Counter(outcome["result"] for row in some for outcome in row.outcomes)
        other = results.total() - results["equal"] - results["float"] - results["unfit"]
        known = " | ".join(str(results[result]) for result in ("equal", "float", "unfit"))
        run = sum(bool(row.outcomes) for row in some)
        yield f"| {task} | {len(some)} | {run} | {known} | {other} |"
    yield ""


def _gaps(rows: Mapping[str, Row]) -> str:
    gaps = {
        dtype: max(
            (o["kernel_gap"] or 0.0 for r in rows.values() for o in r.outcomes if o["case"].endswith(dtype)),
            default=0.0,
        )
        for dtype in ("float32", "bfloat16")
    }
    return (
        "Against plain layers with the dequantized weights, the frozen models' outputs differ by rounding in the stock "
        "kernels: by at most "
        + ", ".join(f"{gap:.1e} ({dtype})" for dtype, gap in gaps.items())
        + " of the largest output."
    )


def _results(task: str, rows: Mapping[str, Row]) -> list[str]:
    cases = [outcome["case"] for outcome in next(iter(rows.values())).outcomes]
    lines = [f"## {task.capitalize()}", "", "| class | of all | of matrices | " + " | ".join(cases) + " |"]
    lines.append("|---|---|---|" + "---|" * len(cases))
    for name, row in rows.items():
        shares = f"{row.largest('share'):.1%} | {row.largest('matrix_share'):.1%}"
        lines.append(f"| {name} | {shares} | " + " | ".join(outcome["result"] for outcome in row.outcomes) + " |")
    return [*lines, ""]


def _left_float(name: str, row: Row) -> Iterator[str]:
    """Why layers stayed float, one line a reason with some of the layers' names and the cases it holds for."""
    for reason, found in sorted(row.left_float.items()):
        if "by default" in reason or reason.startswith("tied") or "no quantized form" in reason:
            continue
        shown = ", ".join(f"`{layer}`" for layer in found["layers"])
        shown += f" and {found['count'] - 3} more" if found["count"] > 3 else ""
        yield f"- {name}: {shown} ({', '.join(found['cases']) or 'all cases'}): {reason}"


def _reasons(rows: Mapping[str, Row]) -> Iterator[str]:
    """Every reason over all classes, numbers and class names left out, with how often and one example."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for reason in {_general(reason) for reason in row.left_float}:
            found.setdefault(reason, []).append(name)
    for reason, names in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        yield f"- {len(names)} classes, {names[0]} the first: {reason}"


def _general(reason: str) -> str:
    reason = re.sub(
        r"\d+(?!-D)", "N", re.sub(r"int[248]|float8|b?float(16|32)", lambda m: m[0].translate(_KEPT), reason)
    )
    reason = reason.translate(_BACK)
    return re.sub(r"^\w+ (?=is not exactly|reads the weight)", "its class ", reason)


_KEPT = {ord(digit): chr(0xE000 + int(digit)) for digit in "0123456789"}
_BACK = {0xE000 + int(digit): digit for digit in "0123456789"}


def faults(rows: Mapping[str, Row], fine: Sequence[str] = ("equal",)) -> list[str]:
    """Every result that is not fine, equal details of one class as one line."""
    lines = []
    for name, row in rows.items():
        details: dict[str, list[str]] = {}
        for outcome in row.outcomes:
            if outcome["result"] not in fine:
                told = outcome["detail"].splitlines()
                told = [line for line in told if " FAILED " in line] or told  # of the report of a verification
                detail = f"{outcome['result']}: {' '.join(' '.join(told).split())[:300]}"
                details.setdefault(detail, []).append(outcome["case"])
        lines += [f"- {name}, {', '.join(cases)}: {detail}" for detail, cases in details.items()]
    return lines
