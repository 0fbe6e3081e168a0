"""The results of `scripts.diffusers_matrix` as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from qat.spec import WeightType
from tests.diffusion_architectures import LEFT_OUT

COMMAND = ".venv/bin/python -m scripts.diffusers_matrix"
WEIGHTS: tuple[WeightType, ...] = ("int8", "float8", "int4", "int2")
DTYPES = ("float32", "bfloat16")
NOTES = """\
Models that diffusers exports from elsewhere are not counted as transformers: UNets, ControlNets, autoencoders, text and
condition embedders, adapters, UVit2DModel, UniDiffuserModel.

torch has no gradient of flex attention on a CPU, so the two steps of AnyFlowFARTransformer3DModel and
Kandinsky6SRTransformer3DModel use dense attention without a mask; their outputs are compared with flex attention.
WanAnimate2Transformer3DModel runs its reference pass only, since its other pass needs a compiler. The inputs of
WanAnimate2Transformer3DModel (a cache) and LuminaNextDiT2DModel (complex numbers) cannot be stored with an export."""


@dataclass
class Outcome:
    """How one case went."""

    case: str
    result: str
    """``equal``, ``float`` (nothing can be quantized), ``refused`` (by inspection), ``unfit`` (stock code fails) or
    ``FAILED``."""
    detail: str = ""
    traceback: str = ""
    linear_share: float = 0.0
    """Share of the linear layers' weights that is quantized, 0 to 1."""
    left_float: dict[str, str] = field(default_factory=dict)
    """Linear layers that stay float, with the reason."""
    fake_gap: float | None = None
    """Largest difference of fake-quantized and frozen outputs, relative to the largest output; float32 only."""
    kernel_gap: float | None = None
    """The same between frozen outputs and those of plain layers with the dequantized weights."""


@dataclass
class FullSize:
    """What inspection says of a class at its constructor's own sizes, in bfloat16, over the four weight types."""

    parameters: int
    linear_shares: list[float]
    shares: list[float]
    """Of all parameters."""


@dataclass
class Row:
    """All results of one class."""

    outcomes: list[Outcome]
    full: FullSize | None


PACKAGES = ("diffusers", "optimum-quanto", "gguf", "accelerate", "safetensors", "torch")


@dataclass
class Table:
    """The rows of one case."""

    versions: str
    """Of the packages that they were made with."""
    rows: dict[str, Row]

    @classmethod
    def of(cls, rows: dict[str, Row]) -> Table:
        """Rows that were made just now."""
        return cls(", ".join(f"{name} {version(name).partition('+')[0]}" for name in PACKAGES), rows)

    @classmethod
    def read(cls, part: Mapping[str, Any]) -> Table:
        """What `written` wrote."""
        rows = {
            name: Row(
                [Outcome(**outcome) for outcome in row["outcomes"]], FullSize(**row["full"]) if row["full"] else None
            )
            for name, row in part["results"].items()
        }
        return cls(part["versions"], rows)

    def written(self) -> str:
        """As JSON, a line for each class, without what an outcome has by default."""
        lines = []
        for name, row in self.rows.items():
            outcomes = [
                {key: value for key, value in asdict(outcome).items() if value != getattr(Outcome, key, {})}
                for outcome in row.outcomes
            ]
            full = asdict(row.full) if row.full else None
            lines.append(f"{json.dumps(name)}: {json.dumps({'outcomes': outcomes, 'full': full})}")
        return f'{{"versions": {json.dumps(self.versions)}, "results": {{\n' + ",\n".join(lines) + "\n}}"

    def counts(self) -> str:
        """How many cases have which result."""
        found = Counter(outcome.result for row in self.rows.values() for outcome in row.outcomes)
        return ", ".join(f"{count} {result}" for result, count in found.most_common()) + f", of {found.total()} cases."


def document(tables: Mapping[str, Table]) -> str:
    """The results as Markdown."""
    lines = ["# Diffusion transformers", "", f"`{COMMAND}`", ""]
    makers = {"diffusers": packed, "gguf-diffusers": gguf, "plug-in": plug_in}
    for case, make in makers.items():
        lines += make(tables[case]) if case in tables else []
    left_out = [f"- {name}: {reason}" for name, reason in LEFT_OUT.items()]
    lines += ["## Left out", "", *(left_out or ["No class of `diffusers.models.transformers`."]), "", NOTES, ""]
    return "\n".join(lines)


def packed(table: Table) -> list[str]:
    """Exports for target ``diffusers``."""
    results = table.rows
    outcomes = [outcome for row in results.values() for outcome in row.outcomes]
    cases = [outcome.case for outcome in next(iter(results.values())).outcomes]
    lines = [
        f"Tiny random models of {len(results)} transformer classes that diffusers exports, on a CPU: {table.versions}"
        ". Each is prepared, trained for two steps, frozen, exported for diffusers, and loaded by stock "
        "`AutoModel.from_pretrained(directory, dtype=...)` in a process that does not import `qat`. *equal*: "
        "every code, scale, shift, dequantized weight, other parameter and buffer, and every output, bit for bit; and "
        "loaded once more, by the class's own `from_pretrained` with a `QuantoConfig` and the other `dtype`, "
        "the same codes, with scales and shifts that are the cast ones.",
        "",
        table.counts(),
        "",
        "`linear` is the share of the linear layers' weights that is quantized in the tiny model. `full size` is what "
        "inspection says of the class at its constructor's own sizes in bfloat16, without example inputs: parameters, "
        "the same share, and the share of all parameters; a range is over the weight types.",
        "",
        "| class | linear | full size | " + " | ".join(cases) + " |",
        "|---|---|---|" + "---|" * len(cases),
    ]
    for name, row in results.items():
        cells = [name, span([outcome.linear_share for outcome in row.outcomes]), "no sizes of its own"]
        if row.full is not None:
            shares = f"{span(row.full.linear_shares)}, {span(row.full.shares)} of all"
            cells[2] = f"{row.full.parameters / 1e9:.2f} B: {shares}"
        lines.append("| " + " | ".join([*cells, *(outcome.result for outcome in row.outcomes)]) + " |")
    kept = [f"- {name}: {reason}" for name, row in results.items() for reason in reasons(row.outcomes)]
    lines += ["", gaps(outcomes), "", "## Linear layers left float", "", *kept, ""]
    return [*lines, "## Refused and failed", "", *(faults(results) or ["None."]), ""]


def gguf(table: Table) -> list[str]:
    """GGUF files for target ``gguf-diffusers``."""
    cases = [outcome.case for outcome in next(iter(table.rows.values())).outcomes]
    lines = [
        "## GGUF files",
        "",
        f"The same for target `gguf-diffusers`, on another CPU, for the {len(table.rows)} of these classes that "
        f"diffusers loads from a single file ({table.versions}). The file is loaded by stock `from_single_file` with a "
        "`GGUFQuantizationConfig`. *equal*: every block, other parameter and buffer, and every output, bit for bit; "
        "and `qat.verify` holds.",
        "",
        table.counts(),
        "",
        "| class | linear | " + " | ".join(cases) + " |",
        "|---|---|" + "---|" * len(cases),
    ]
    for name, row in table.rows.items():
        share = span([outcome.linear_share for outcome in row.outcomes])
        lines.append(f"| {name} | {share} | " + " | ".join(outcome.result for outcome in row.outcomes) + " |")
    return [*lines, "", *faults(table.rows), ""]


def plug_in(table: Table) -> list[str]:
    """What `qat.integrations.diffusers` loads."""
    rows = table.rows.values()
    ways = list(dict.fromkeys(outcome.case.partition(",")[0] for row in rows for outcome in row.outcomes))
    lines = [
        "## The plug-in",
        "",
        f"What `qat.integrations.diffusers` loads ({table.versions}), held against stock `from_pretrained` of the same "
        "directory in another process: packed exports, and float weights that a `QuantoConfig` quantizes, with the "
        "types and dtypes of the first table. Files go through `from_single_file`, where the class has it. *equal*: "
        "codes, scales, shifts, dequantized weights, other parameters, buffers and outputs, bit for bit. *unfit*: the "
        "stock loader, or the float model, fails itself.",
        "",
        table.counts(),
        "",
        "| class | " + " | ".join(ways) + " |",
        "|---|" + "---|" * len(ways),
    ]
    for name, row in table.rows.items():
        cells = []
        for way in ways:
            found = Counter(outcome.result for outcome in row.outcomes if outcome.case.startswith(f"{way},"))
            cells.append(", ".join(f"{count} {result}" for result, count in found.items()) or "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", *unlike(table.rows), ""]


def span(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return high if low == high else f"{low} to {high}"


def gaps(outcomes: Sequence[Outcome]) -> str:
    """What the stock kernels add, in one sentence."""
    fake = max((outcome.fake_gap or 0.0 for outcome in outcomes), default=0.0)
    kernel = {
        dtype: max((outcome.kernel_gap or 0.0 for outcome in outcomes if outcome.case.endswith(dtype)), default=0.0)
        for dtype in DTYPES
    }
    return (
        "Rounding in the stock kernels moves outputs, relative to the largest: frozen against plain layers with the "
        "dequantized weights by at most "
        + ", ".join(f"{gap:.1e} ({dtype})" for dtype, gap in kernel.items())
        + f"; fake-quantized against frozen by at most {fake:.1e} (float32)."
    )


def reasons(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Why layers stayed float, one sentence a reason with some of the layers' names and the cases it holds for."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for outcome in outcomes:
        for layer, reason in outcome.left_float.items():
            layers, cases = found.setdefault(reason, (set(), set()))
            layers.add(layer)
            cases.add(outcome.case)
    for reason, (layers, cases) in sorted(found.items()):
        where = "all cases" if len(cases) == len(outcomes) else ", ".join(sorted(cases))
        shown = ", ".join(f"`{layer}`" for layer in sorted(layers)[:3])
        shown += f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        yield f"{shown} ({where}): {reason}"


def unlike(results: Mapping[str, Row]) -> list[str]:
    """Every case that is not equal, by what was said of it."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, row in results.items():
        for outcome in row.outcomes:
            if outcome.result != "equal":
                said = f"{outcome.result}: {' '.join(outcome.detail.split())[:160]}"
                found.setdefault(said, {}).setdefault(name, []).append(outcome.case)
    lines = []
    for said, names in found.items():
        classes = ", ".join(f"{name} ({len(cases)})" for name, cases in names.items())
        lines.append(f"- {sum(map(len, names.values()))} cases of {classes}: {said}")
    return lines


def faults(results: Mapping[str, Row]) -> list[str]:
    """Every case that is not equal, with the end of its traceback."""
    lines = []
    for name, row in results.items():
        for outcome in row.outcomes:
            if outcome.result != "equal":
                lines.append(f"- {name}, {outcome.case}: {outcome.result}: {' '.join(outcome.detail.split())[:400]}")
                lines += [f"  {line}" for line in ("```", *outcome.traceback.strip().splitlines()[-12:], "```")][
                    : 14 if outcome.traceback else 0
                ]
    return lines
