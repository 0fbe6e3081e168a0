"""Quality in each format: trained for its grid, and quantized without training, on the reference language model.

``minmax`` and ``mse`` read no data: a range from the weights' ends, and the clipped one with the smallest squared
error. ``best`` also reads calibration batches. ``QAT`` begins with ``best`` and is distilled from the fine-tuned float
model; its rate is the one with the smallest KL on seed 0, judged on held-out blocks that no figure is from. All are
exported, and reloaded by `qat.load`. ``own`` is the format's own package on the same layers, without `qat`::

    python -m scripts.benchmark_formats --device cuda --jobs 15 --rows rows.jsonl
    python -m scripts.benchmark_formats --table rows.jsonl

A run is a row of JSON; perplexity is ``exp(loss)``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import qat
from scripts._quality import Run, evaluate, fine_tune, post_training, train
from scripts._quality_problems import BATCH, problem

UNTRAINED = {"minmax": "PTQ minmax", "mse": "PTQ clip", "best": "PTQ best"}
COLUMNS = {
    "minmax": "min-max",
    "own": "own package",
    "mse": "clipped by squared error",
    "best": "`best` (with data)",
    "QAT": "QAT from `best`",
}
RATES = {8: (3e-6, 1e-5, 3e-5), 4: (2e-5, 5e-5, 1e-4), 2: (1e-4, 2e-4, 5e-4, 1e-3)}
"""Of the trained runs, by bits."""
COMPRESSED = (
    "int8+int8",
    "float8+float8",
    "int8",
    "float8",
    "int4",
    "int4_g32",
    "int4_g32_zp",
    "int2_g32",
    "int2_g32_zp",
)
FORMATS = [
    *(f"transformers:{weights}" for weights in ("int8", "int4", "int2")),
    *(f"compressed-tensors:{types}" for types in COMPRESSED),
    *(f"gguf:{weights}" for weights in ("q8_0", "q4_0", "q4_1")),
]


def by_quanto(model: Any, names: list[str], weights: str) -> None:
    """optimum-quanto's own ``quantize`` and ``freeze``."""
    from optimum.quanto import freeze, qtypes, quantize

    quantize(model, weights=qtypes[f"q{weights}"], include=names)
    freeze(model)


def by_values(quantized: Callable[[Tensor, str], Tensor]) -> Callable[[Any, list[str], str], None]:
    """What writes the numbers that a package reads back into a float model."""

    def write(model: Any, names: list[str], weights: str) -> None:
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_(quantized(weight.float().cpu(), weights))

    return write


def gguf_values(weight: Tensor, weights: str) -> Tensor:
    """By ``gguf.quants``, which is llama.cpp's reference rounding."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[weights.upper()]
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def compressed_values(weight: Tensor, weights: str) -> Tensor:
    """By the arithmetic of compressed-tensors on each group's ends; the package has no observer of its own."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    from qat.formats.compressed_tensors import _arguments
    from qat.formats.compressed_types import QTYPES

    arguments = QuantizationArgs(**_arguments(QTYPES[weights]))
    groups = weight.view(len(weight), -1, arguments.group_size or weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), arguments)
    found: Tensor = fake_quantize(weight, scale.bfloat16().float(), zero, arguments)
    return found


OWN = {
    "transformers": by_quanto,
    "compressed-tensors": by_values(compressed_values),
    "gguf": by_values(gguf_values),
}


@torch.no_grad()
def quantized_by_others(tuned: nn.Module, spec: qat.QuantSpec, target: str) -> nn.Module:
    """The fine-tuned model in bfloat16, its layers quantized by the format's own package."""
    layers = qat.inspect(tuned, spec, target=target).layers
    model = copy.deepcopy(tuned).to(torch.bfloat16)
    OWN[target](model, [layer.name for layer in layers if layer.weights], str(spec.weights))
    return model


def measure(form: str, folder: Path, arguments: argparse.Namespace) -> None:
    """All rows of one format."""
    torch.set_num_threads(1)
    data: Any = problem("language", arguments.device, arguments.held_out)
    blocks = torch.cat(data.held_out)
    fifth = len(blocks) // 5
    choosing, judged = (torch.split(part, BATCH) for part in (blocks[:fifth], blocks[fifth:]))
    data.target, _, types = form.partition(":")
    weights, _, activations = types.partition("+")
    rate = 0.0

    def note(how: str, seed: int, found: dict[str, Any], **more: Any) -> float:
        row = {"format": form, "how": how, "seed": seed, "perplexity": math.exp(found["loss"])}
        row |= {key: found[key] for key in ("loss", "kl", "changed")} | more
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return float(found["kl"])

    for seed in range(arguments.seeds):
        tuned = copy.deepcopy(data.model)
        tuned.load_state_dict(torch.load(folder / f"{seed}.pt", map_location=arguments.device))
        run = Run("best", weights, activations or None, arguments.steps, seed, rate)
        if seed == 0:
            data.held_out = choosing
            tried = {
                rate: note("rate", seed, train(replace(run, rate=rate), data, tuned), rate=rate)
                for rate in rates(weights)
            }
            rate = min(tried, key=lambda rate: tried[rate])
        data.held_out = judged
        if form == arguments.formats[0]:
            served = copy.deepcopy(tuned).to(torch.bfloat16)
            note("float", seed, evaluate(served, data, tuned), format="float")
        for how, arm in UNTRAINED.items():
            note(how, seed, post_training(replace(run, arm=arm), data, tuned))
        if not activations:
            note("own", seed, evaluate(quantized_by_others(tuned, run.spec, data.target), data, tuned))
        note("QAT", seed, train(replace(run, rate=rate), data, tuned), rate=rate)


def rates(weights: str) -> tuple[float, ...]:
    """Of a type, by the first number of its name."""
    (bits,) = re.findall(r"\d", weights)[:1]
    return RATES[int(bits)]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Mean perplexity over seeds with its standard deviation, and in brackets the mean KL."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["format"], {}).setdefault(row["how"], []).append(row)

    def cell(some: list[dict[str, Any]]) -> str:
        values = [row["perplexity"] for row in some]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean(values):.3f}{spread} ({mean(row['kl'] for row in some):.4f})" if some else "–"

    lines = [f"| format | {' | '.join(COLUMNS.values())} | rate |", f"|---|{'---|' * len(COLUMNS)}---|"]
    for form in sorted(found, key=["float", *FORMATS].index):
        cells = found[form]
        cells.setdefault("minmax", cells.get("float", []))  # as it is
        name, both, _ = form.replace(":", " ").partition("+")
        rates = {f"{row['rate']:.0e}".replace("e-0", "e-") for row in cells.get("QAT", [])}
        shown = [cell(cells.get(column, [])) for column in COLUMNS]
        lines.append(f"| {name}{', W8A8' if both else ''} | {' | '.join(shown)} | {', '.join(rates) or '–'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="target:weights or target:weights+activations")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3, help="orders of the batches, of fine-tuning too")
    parser.add_argument("--held-out", type=int, default=320, help="blocks of 256 tokens; a fifth chooses the rate")
    parser.add_argument("--jobs", type=int, default=1, help="formats side by side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=Path, default=Path("formats.jsonl"), help="a file that rows are added to")
    parser.add_argument("--table", type=Path, help="print the table of such a file instead")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(map(json.loads, arguments.table.read_text(encoding="utf-8").splitlines())))
        return
    data = problem("language", arguments.device, BATCH)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(arguments.jobs) as pool:
        for seed in range(arguments.seeds):
            tuned = fine_tune(copy.deepcopy(data.model), data, arguments.steps, seed, 1e-4, "cosine")
            torch.save(tuned.state_dict(), f"{folder}/{seed}.pt")
        jobs = [pool.apply_async(measure, (form, Path(folder), arguments)) for form in arguments.formats]
        for job in jobs:
            job.wait()
        for job in jobs:
            job.get()  # raises what one of them raised, now that the others have their rows


if __name__ == "__main__":
    main()
