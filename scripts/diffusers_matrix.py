"""Which transformer classes of diffusers survive the whole line, and what of each is quantized.

For each of the tiny random models of `tests.diffusion_architectures`, and each weight type and serving dtype: prepare,
two optimizer steps, freeze, export, then a stock ``AutoModel.from_pretrained`` in another process that does not import
`qat` (`scripts.stock_diffusers`), and a comparison of every code, scale, shift, dequantized weight, other parameter,
buffer and output, bit for bit. Models are made in a process of their own too, so that a crash of a kernel on either
side is the result of its case, and the rest goes on. Writes ``diffusers.md`` and ``diffusers.json``::

    python -m scripts.diffusers_matrix [--classes Flux Wan] [--types int4] [--dtypes bfloat16] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import qat
from qat.errors import SpecError, TargetError
from qat.spec import WeightType
from scripts.architecture_matrix import dequantize, largest_gap
from scripts.json_workers import Ask, Worker, serve
from scripts.stock_diffusers import Portrait, outputs_of, portrait_of_outputs, state_portrait
from tests.diffusion_architectures import ARCHITECTURES, LEFT_OUT, DiffusionArchitecture

COMMAND = "python -m scripts.diffusers_matrix"
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
    """``equal``, ``float`` (nothing can be quantized), ``refused`` (by inspection) or ``FAILED``."""
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


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request to the process that makes models: a case, or a class at full size."""
    return make(request) if "weights" in request else full_size(request["name"])


def full_size(name: str) -> dict[str, Any]:
    """A `FullSize`, without data; empty for a class whose constructor has no sizes of its own."""
    import diffusers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = getattr(diffusers, name)()
    except (TypeError, ValueError):
        return {}
    specs = [qat.QuantSpec(weights=weights, dtype="bfloat16") for weights in WEIGHTS]
    reports = [qat.inspect(model, spec, target="diffusers") for spec in specs]
    return asdict(
        FullSize(
            parameters=reports[0].parameters,
            linear_shares=[report.linear_share for report in reports],
            shares=[report.quantized_share for report in reports],
        )
    )


def make(request: Mapping[str, Any]) -> dict[str, Any]:
    """Take one tiny model from prepare to export, and describe the frozen model.

    Raises whatever the library or the model raises; what inspection refuses is an answer.
    """
    architecture: DiffusionArchitecture = ARCHITECTURES[request["name"]]
    weights: Any = request["weights"]
    spec = qat.QuantSpec(weights=weights, dtype=request["dtype"])
    model = architecture.build(zeros=request.get("zeros", False))
    try:
        report = qat.prepare(model, spec, target="diffusers", example_inputs=architecture.example()).inspection
    except (SpecError, TargetError) as error:
        if "no layer of the model would be quantized" in str(error):
            return {"result": "float", "detail": str(error)}
        if isinstance(error, SpecError):
            raise
        return {"result": "refused", "detail": str(error)}
    take_two_steps(model, architecture)
    fake_quantized = outputs_of(model.eval(), architecture.example())
    qat.freeze(model, allow_unreached=True)  # not every layer is in the way of every input
    state = state_portrait(model)
    example = architecture.example(spec.torch_dtype)
    frozen = outputs_of(model, example)
    broken = [name for name, tensor in frozen.items() if not tensor.isfinite().all()]
    if broken or not frozen:
        raise RuntimeError(f"the frozen model's outputs are not finite: {broken}")
    qat.export(model, request["directory"], example_inputs=example if architecture.storable else None)
    dequantize(model)
    return {
        "result": "equal",
        "kind": type(model).__name__,
        "state": state,
        "outputs": portrait_of_outputs(frozen),
        "linear_share": report.linear_share,
        "left_float": {layer.name: layer.reason for layer in report.layers if layer.weights is None},
        "fake_gap": largest_gap(fake_quantized, frozen) if request["dtype"] == "float32" else None,
        "kernel_gap": largest_gap(outputs_of(model, architecture.example(spec.torch_dtype)), frozen),
    }


def take_two_steps(model: nn.Module, architecture: DiffusionArchitecture) -> None:
    """Two optimizer steps on the mean square of the outputs; random models need no better loss."""
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    with _dense_attention():
        for _ in range(2):
            torch.manual_seed(0)
            outputs = outputs_with_gradients(model, architecture)
            torch.autograd.backward([tensor.square().mean() for tensor in outputs if tensor.requires_grad])
            optimizer.step()
            optimizer.zero_grad()


def outputs_with_gradients(model: nn.Module, architecture: DiffusionArchitecture) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    value = model(**architecture.example())
    leaves = tree_leaves(dict(value) if isinstance(value, Mapping) else value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextmanager
def _dense_attention() -> Iterator[None]:
    """Flex attention, which has no gradient on a CPU, without its mask; what is served is compared with the mask."""
    from torch.nn.attention import flex_attention

    def dense(query: Any, key: Any, value: Any, scale: Any = None, enable_gqa: bool = False, **_: Any) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)

    with mock.patch.object(flex_attention, "flex_attention", dense):
        yield


def run_case(name: str, weights: str, dtype: str, folder: Path, maker: Ask, stock: Ask) -> Outcome:
    """Make one export, let stock code load it, compare, and remove it."""
    case = f"{weights} {dtype}"
    directory = folder / f"{name}-{weights}-{dtype}"
    request = {"name": name, "weights": weights, "dtype": dtype, "directory": str(directory)}
    made = maker(request)
    if "error" in made:
        return Outcome(case, "FAILED", f"before the load: {made['error']}", made["traceback"])
    known = ("result", "detail", "linear_share", "left_float", "fake_gap", "kernel_gap")
    outcome = Outcome(case, **{key: made[key] for key in known if key in made})
    if outcome.result != "equal":
        return outcome
    loaded = stock(request)
    if "error" in loaded:
        outcome.result, outcome.detail = "FAILED", f"stock load: {loaded['error']}"
        outcome.traceback = loaded["traceback"]
    else:
        faults = [] if made["kind"] == loaded["kind"] else [f"a {loaded['kind']} was loaded"]
        faults += [*differences(made["state"], loaded["state"]), *differences(made["outputs"], loaded["outputs"])]
        faults += [f"loaded in the other dtype: {fault}" for fault in loaded["cast"]]
        if faults:
            outcome.result, outcome.detail = "FAILED", f"{len(faults)} differ, first: {faults[0]}"
            outcome.traceback = "\n".join(faults[:20])
    shutil.rmtree(directory, ignore_errors=True)
    return outcome


def differences(frozen: Portrait, loaded: Portrait) -> list[str]:
    """What is unequal between two portraits."""
    return [
        f"{name}: {frozen.get(name, 'absent')} when frozen, {loaded.get(name, 'absent')} when loaded"
        for name in sorted(frozen.keys() | loaded.keys())
        if frozen.get(name) != loaded.get(name)
    ]


@dataclass
class Row:
    """All results of one class."""

    outcomes: list[Outcome]
    full: FullSize | None


def run_class(name: str, cases: Sequence[tuple[str, str]], maker: Ask, stock: Ask) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [run_case(name, weights, dtype, Path(folder), maker, stock) for weights, dtype in cases]
    print(f"{name:40} " + " ".join(outcome.result for outcome in outcomes), flush=True)
    full = maker({"name": name})
    if "error" in full:
        raise RuntimeError(f"{name} at full size: {full['traceback']}")
    return Row(outcomes, FullSize(**full) if full else None)


def run(names: Sequence[str], cases: Sequence[tuple[str, str]], jobs: int) -> dict[str, Row]:
    """All cases of all classes; each job has two processes, one that makes and one that loads."""

    def some(share: Sequence[str]) -> dict[str, Row]:
        with Worker("scripts.diffusers_matrix", "--work") as maker, Worker("scripts.stock_diffusers") as stock:
            return {name: run_class(name, cases, maker.ask, stock.ask) for name in share}

    with ThreadPoolExecutor(jobs) as pool:
        found: dict[str, Row] = {}
        for part in pool.map(some, [names[job::jobs] for job in range(jobs)]):
            found |= part
    return {name: found[name] for name in names}


def table(results: Mapping[str, Row]) -> str:
    """The results as Markdown."""
    from importlib.metadata import version

    outcomes = [outcome for row in results.values() for outcome in row.outcomes]
    cases = [outcome.case for outcome in next(iter(results.values())).outcomes]
    counts = Counter(outcome.result for outcome in outcomes)
    packages = ("diffusers", "optimum-quanto", "accelerate", "safetensors", "torch")
    lines = [
        "# Diffusion transformers",
        "",
        f"`{COMMAND}`",
        "",
        f"Tiny random models of {len(results)} transformer classes that diffusers exports, on a CPU: "
        + ", ".join(f"{name} {version(name).partition('+')[0]}" for name in packages)
        + ". Each is prepared, trained for two steps, frozen, exported for diffusers, and loaded by stock "
        "`AutoModel.from_pretrained(directory, dtype=...)` in a process that does not import `qat`. *equal*: "
        "every code, scale, shift, dequantized weight, other parameter and buffer, and every output, bit for bit; and "
        "loaded once more, by the class's own `from_pretrained` with a `QuantoConfig` and the other `dtype`, "
        "the same codes, with scales and shifts that are the cast ones.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + f", of {counts.total()} cases.",
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
    lines += [
        "",
        gaps(outcomes),
        "",
        "## Linear layers left float",
        "",
        *(f"- {name}: {reason}" for name, row in results.items() for reason in reasons(row.outcomes)),
        "",
        "## Refused and failed",
        "",
        *(faults(results) or ["None."]),
        "",
        "## Left out",
        "",
        *(
            [f"- {name}: {reason}" for name, reason in LEFT_OUT.items()]
            or ["No class of `diffusers.models.transformers`."]
        ),
        "",
        NOTES,
        "",
    ]
    return "\n".join(lines)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="*", default=[""], help="parts of class names; default all")
    parser.add_argument("--types", nargs="*", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=1, help="pairs of processes, each on one thread")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        serve(answer)
        return
    names = [name for name in ARCHITECTURES if any(part.lower() in name.lower() for part in arguments.classes)]
    cases = [(weights, dtype) for dtype in arguments.dtypes for weights in arguments.types]
    results = run(names, cases, max(1, min(arguments.jobs, len(names))))
    arguments.output.mkdir(parents=True, exist_ok=True)
    plain = {name: asdict(row) for name, row in results.items()}
    text = json.dumps({"command": COMMAND, "results": plain}, indent=1)
    (arguments.output / "diffusers.json").write_text(text + "\n", encoding="utf-8")
    (arguments.output / "diffusers.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
