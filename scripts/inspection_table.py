"""What a plain spec would quantize in the public models whose configurations come with qat, without their weights.

Every model is built on the meta device and inspected with int8 and with int4 weights, for target ``quanto`` and for the
target of its library::

    python -m scripts.inspection_table [--only Qwen llama] [--output docs/results/inspection.md]
"""

from __future__ import annotations

import argparse
import re
import textwrap
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from math import prod
from pathlib import Path

from torch import nn

import qat
from qat.hosts import host_of
from qat.hosts.configurations import build_on_meta, published
from qat.report import quiet_libraries

TYPES = ("int8", "int4")
SMALLEST = 0.0005
"""The smallest share that is told: 0.1 % when rounded."""

HEADER = """# What is quantized in public models

`{command}`

{count} configurations come with qat, as `qat.hosts.configurations.published` lists them. They were written by hand from
published numbers. Each model is built without weights. It is inspected with `QuantSpec(weights="int8")` and `"int4"`,
for two targets. All {count} together take {seconds:.0f} seconds of one CPU core, imports not counted.
Versions: transformers {transformers}, diffusers {diffusers}, torch {torch}.
`qat inspect NAME` prints the same for one model, with a line for each family of layers.

A share is that of all parameters, in per cent. *own* is the target of the model's library, `transformers` or
`diffusers`. GB (10^9 bytes) are of all parameters in bfloat16, and of the same model with target *own* exported: codes,
scales and shifts, and what stays float in bfloat16. For a pipeline of diffusers it is the transformer, or the UNet.

| model | parameters | int8, quanto | int8, own | int4, quanto | int4, own | GB | GB int8 | GB int4 |
|---|---|---|---|---|---|---|---|---|
"""

REASONS = """
## What stays float, and why

Shares of all parameters, with int4 weights and target *own*. Norms, biases and whatever is below 0.1 % are left out.

"""


@dataclass(frozen=True)
class Outcome:
    """What one inspection found."""

    share: float
    nbytes: float
    floats: dict[str, float]
    """Shares of what stays float, by reason."""
    nothing: str = ""
    """Why nothing at all is quantized, where nothing is."""

    def told(self) -> str:
        shares = sorted(self.floats.items(), key=lambda item: -item[1])
        parts = [f"{share:.1%} {why}" for why, share in shares if share >= SMALLEST]
        return self.nothing or "; ".join(parts) or "nothing of note"


def inspected(model: nn.Module, weights: str, target: str) -> Outcome:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spec = qat.QuantSpec.model_validate({"weights": weights})
    itemsize = spec.torch_dtype.itemsize
    try:
        report = qat.inspect(model, spec, target=target)
    except qat.SpecError as error:  # which says why nothing would be quantized
        reasons = str(error).partition("reasons: ")[2].rpartition(": change the spec")[0]
        return Outcome(0.0, parameters * itemsize, {}, f"everything, for these reasons: {reasons}")
    floats: dict[str, float] = defaultdict(float)
    for layer in report.layers:
        if layer.weights is None:
            reason = re.sub(r" \(include it by name.*\)", "", layer.reason)
            floats[reason] += prod(layer.shape) / report.parameters
    for other in report.others:
        floats[f"{other.class_name} ({len(other.shape)}-D)"] += prod(other.shape) / report.parameters
    nbytes = report.parameters * itemsize - report.bytes_before + report.bytes_after
    return Outcome(report.quantized_share, nbytes, floats)


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="models whose names contain one of these")
    parser.add_argument("--output", type=Path, help="a Markdown file, instead of the standard output")
    arguments = parser.parse_args()
    quiet_libraries()
    names = [name for name in published() if any(part.lower() in name.lower() for part in arguments.only)]
    for library in ("transformers", "diffusers"):
        import_module(library)  # which is not timed
    rows, reasons, start = [], [], time.process_time()
    for name in names:
        model = build_on_meta(published()[name]["config"])
        own = host_of(model).name
        found = {(kind, target): inspected(model, kind, target) for kind in TYPES for target in ("quanto", own)}
        parameters = sum(parameter.numel() for parameter in model.parameters())
        shares = [f"{outcome.share * 100:.1f}" for outcome in found.values()]
        sizes = [f"{size / 1e9:.2f}" for size in (parameters * 2, *(found[kind, own].nbytes for kind in TYPES))]
        rows.append(f"| {name} | {count(parameters)} | {' | '.join([*shares, *sizes])} |")
        floats, quanto = found["int4", own].told(), found["int4", "quanto"].told()
        text = f"- **{name}** ({type(model).__name__}): {floats}"
        text += f". With target `quanto`: {quanto}" if quanto != floats else ""
        reasons += textwrap.wrap(f"{text}.", 116, subsequent_indent="  ", break_long_words=False)
    header = HEADER.format(
        command=".venv/bin/python -m scripts.inspection_table",
        count=len(names),
        seconds=time.process_time() - start,
        **{library: version(library).partition("+")[0] for library in ("transformers", "diffusers", "torch")},
    )
    text = header + "\n".join(rows) + "\n" + REASONS + "\n".join(reasons) + "\n"
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
