"""Which transformers architectures survive the whole line, and what of each is quantized.

For each of the tiny random models of `tests.architectures`, and each weight type and serving dtype: prepare, two
optimizer steps, freeze, export, load with the target's own loader (`from_pretrained` with the plug-in; for causal
language models also optimum-quanto's), and compare every tensor and every output bit for bit. One process an
architecture, so that a crash of a kernel is a result like any other. Writes ``architectures.md`` and
``architectures.json``::

    python -m scripts.architecture_matrix [--only Llama Bert] [--output docs/results]
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from qat.errors import SpecError, TargetError
from tests.architectures import ARCHITECTURES, Architecture

COMMAND = "python -m scripts.architecture_matrix"
WEIGHTS = ("int8", "float8", "int4", "int2")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One way to quantize a model."""

    weights: Any
    dtype: Any
    activations: Any = None

    def __str__(self) -> str:
        return f"{self.weights}{f'+{self.activations}' if self.activations else ''} {self.dtype}"


@dataclass
class Outcome:
    """How one case went."""

    case: str
    result: str
    """``equal``, ``float`` (nothing can be quantized), ``difference``, ``error`` or ``crash``."""
    detail: str = ""
    share: float = 0.0
    """Share of all parameters quantized, 0 to 1."""
    left_float: dict[str, str] = field(default_factory=dict)
    """Linear layers that stay float, with the reason."""
    fake_gap: float | None = None
    """Largest difference of fake-quantized and frozen outputs, relative to the largest output; float32 only."""
    kernel_gap: float | None = None
    """The same between frozen outputs and those of plain layers with the dequantized weights; without activations."""


CASES = tuple(Case(weights, dtype) for dtype in DTYPES for weights in WEIGHTS)
ACTIVATION_CASES = tuple(Case(kind, dtype, kind) for dtype in DTYPES for kind in ("int8", "float8"))


def run_case(architecture: Architecture, case: Case, directory: Path) -> Outcome:
    """Take one tiny model through the whole line into ``directory`` and compare what comes back.

    Raises whatever the library or the model raises; differences and models without a layer to quantize are outcomes.
    """
    spec = qat.QuantSpec(weights=case.weights, activations=case.activations, dtype=case.dtype)
    example = architecture.example(spec.torch_dtype)
    try:
        model, report = train(architecture, spec, "transformers")
    except SpecError as error:
        if "no layer of the model would be quantized" not in str(error):
            raise
        return Outcome(str(case), "float", str(error))
    floats = {layer.name: layer.reason for layer in report.layers if layer.weights is None}
    outcome = Outcome(str(case), "equal", "", report.quantized_share, floats)
    fake_quantized = outputs_of(model, architecture.example())
    qat.freeze(model, allow_unreached=True)  # not every layer is in the way of every input
    frozen = outputs_of(model, example)
    if case.dtype == "float32":
        outcome.fake_gap = largest_gap(fake_quantized, frozen)
    for target in ("transformers", "quanto") if architecture.model.endswith("CausalLM") else ("transformers",):
        try:
            qat.export(model, directory / target, target=target, example_inputs=example)
        except TargetError:  # this loader holds some tensor in another dtype, so the model must be frozen for it
            model, _ = train(architecture, spec, target)
            qat.freeze(model, allow_unreached=True)
            frozen = outputs_of(model, example)
            qat.export(model, directory / target, example_inputs=example)
        loaded = load(type(model), directory / target, target, spec.torch_dtype)
        faults = [*output_faults(frozen, outputs_of(loaded, example)), *state_faults(model, loaded)]
        if faults:
            outcome.result, outcome.detail = "difference", f"{target}: {faults[0]} ({len(faults)} in all)"
            break
    if not case.activations:
        dequantize(model)
        outcome.kernel_gap = largest_gap(outputs_of(model, example), frozen)
    return outcome


def train(architecture: Architecture, spec: qat.QuantSpec, target: str) -> tuple[Any, qat.InspectReport]:
    """A prepared model after two optimizer steps, calibrated before and after them, in evaluation mode."""
    model: Any = architecture.build()
    example = architecture.example()
    report = qat.prepare(model, spec, target=target, example_inputs=example).inspection
    qat.calibrate(model, [example])
    take_two_steps(model, architecture)
    qat.calibrate(model, [example])
    return model.eval(), report


def take_two_steps(model: nn.Module, architecture: Architecture) -> None:
    """Two optimizer steps on the mean square of the outputs; random models need no better loss."""
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        outputs = dict(named_tensors(model(**architecture.example())))
        losses = [tensor.square().mean() for tensor in outputs.values() if tensor.requires_grad]
        torch.autograd.backward(losses)
        optimizer.step()
        optimizer.zero_grad()


def load(kind: Any, directory: Path, target: str, dtype: torch.dtype) -> nn.Module:
    """Load with the target's own loader, and refuse one that had to invent or drop a tensor."""
    if target == "quanto":
        from optimum.quanto import QuantizedModelForCausalLM

        model: nn.Module = QuantizedModelForCausalLM.from_pretrained(str(directory), trust_remote_code=False)._wrapped
        return model
    import qat.integrations.transformers  # noqa: F401 (registers the plug-in)

    model, info = kind.from_pretrained(directory, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    strays = {key: sorted(names) for key, names in info.items() if names and key != "error_msgs"}
    if strays or info.get("error_msgs"):
        raise RuntimeError(f"from_pretrained reports {strays or info['error_msgs']}")
    return model


def named_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating tensor in a model's outputs, quantized ones as plain tensors."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or (hasattr(value, "dequantize") and type(value) is not torch.Tensor):
            yield name, value if type(value) is torch.Tensor else value.dequantize()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{i}")


def outputs_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's outputs, with the same seed every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(named_tensors(model(**inputs)))


def dequantize(model: nn.Module) -> None:
    """Put plain linear layers in the place of frozen ones: what the stock kernels are judged by."""
    from optimum.quanto.nn import QLinear

    for name, layer in list(model.named_modules()):
        if isinstance(layer, QLinear) and not hasattr(layer, "value"):  # experts are dequantized in any case
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight.dequantize(), requires_grad=False), layer.bias
            model.set_submodule(name, plain)


def largest_gap(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest number of each output."""
    gaps = [
        (one[key].double() - other[key].double()).abs().max() / one[key].double().abs().max().clamp(min=1e-30)
        for key in one
    ]
    return float(torch.stack(gaps).max())


def output_faults(frozen: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> list[str]:
    """What is unequal between two models' outputs."""
    if frozen.keys() != loaded.keys() or not frozen:
        return [f"outputs {sorted(frozen)} and {sorted(loaded)}"]
    faults = [f"output {key} is not finite" for key, tensor in frozen.items() if not tensor.isfinite().all()]
    return faults + [
        f"output {key} differs by up to {largest_gap({key: frozen[key]}, {key: loaded[key]}):.2g}"
        for key in frozen
        if frozen[key].dtype != loaded[key].dtype or not torch.equal(frozen[key], loaded[key])
    ]


def state_faults(frozen: nn.Module, loaded: nn.Module) -> list[str]:
    """What is unequal between two models' tensors: codes, scales, shifts, all other parameters, all buffers."""
    one, other = dict(plain_tensors(frozen)), dict(plain_tensors(loaded))
    faults = [f"{name} is in one model only" for name in sorted(one.keys() ^ other.keys())]
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            faults.append(f"{name} is {a.dtype} {tuple(a.shape)} when frozen, {b.dtype} {tuple(b.shape)} when loaded")
        elif not torch.equal(as_bytes(a), as_bytes(b)):
            faults.append(f"{name} differs")
    return faults


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer, those that no file holds included; a quantized weight as its values and its parts."""
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if type(tensor.data) is torch.Tensor:
            yield name, tensor.data
            continue
        yield f"{name}: {type(tensor.data).__name__}", tensor.data.dequantize()
        path, _, key = name.rpartition(".")
        for part, stored in model.get_submodule(path).state_dict().items():
            if part.startswith(f"{key}."):
                yield f"{path}.{part}", stored


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def work(name: str, skip: int) -> None:
    """Run the cases of one architecture, from number ``skip`` on; a line of JSON each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            if number < skip:
                continue
            try:
                outcome = run_case(ARCHITECTURES[name], case, Path(folder) / str(number))
            except Exception as error:
                outcome = Outcome(str(case), "error", f"{type(error).__name__}: {error}")
            print(json.dumps(asdict(outcome)), flush=True)


def run_architecture(name: str) -> list[Outcome]:
    """All cases of one architecture in a process of their own, started again behind a case that ends it."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(CASES):
        command = [sys.executable, "-m", "scripts.architecture_matrix", "--work", name, str(len(outcomes))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        outcomes += [Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(outcomes) < len(CASES):
            said = (done.stderr.strip().splitlines() or [""])[-1]
            outcomes.append(
                Outcome(str(CASES[len(outcomes)]), "crash", f"process ended with {done.returncode}: {said}")
            )
    return outcomes


def table(results: Mapping[str, list[Outcome]]) -> str:
    """The results as Markdown."""
    import optimum.quanto
    import transformers

    counts = Counter(outcome.result for outcomes in results.values() for outcome in outcomes)
    lines = [
        "# Architectures",
        "",
        f"`{COMMAND}`",
        "",
        f"Tiny random models of {len(results)} architectures of transformers {transformers.__version__}, with "
        f"optimum-quanto {optimum.quanto.__version__} and torch {torch.__version__.split('+')[0]}, on a CPU. Each is "
        "prepared, trained for two steps, frozen, exported for transformers (causal language models for quanto too) "
        "and loaded by the target's own loader. *equal*: every code, scale, shift, other parameter and buffer, and "
        "every output, bit for bit. *float*: nothing in the model can be quantized.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + f", of {counts.total()} cases.",
        "",
        "| class | quantized | " + " | ".join(str(case) for case in CASES) + " |",
        "|---|---|" + "---|" * len(CASES),
    ]
    for name, outcomes in results.items():
        share = max(outcome.share for outcome in outcomes)
        lines.append(f"| {name} | {share:.1%} | " + " | ".join(outcome.result for outcome in outcomes) + " |")
    gaps = {
        dtype: max((o.kernel_gap or 0.0 for os in results.values() for o in os if o.case.endswith(dtype)), default=0.0)
        for dtype in DTYPES
    }
    lines += [
        "",
        "`quantized` is the share of all parameters, the largest over the cases. Against plain layers with the "
        "dequantized weights, the frozen models' outputs differ by rounding in the stock kernels: by at most "
        + ", ".join(f"{gap:.1e} ({dtype})" for dtype, gap in gaps.items())
        + " of the largest output.",
        "",
    ]
    lines += ["## Linear layers left float", ""]
    lines += ["Output heads and tied weights, which stay float by default, are not listed.", ""]
    for name, outcomes in results.items():
        lines += [f"- {name}: {reason}" for reason in sorted(set(reasons(outcomes)))]
        nothing = {outcome.detail.splitlines()[0] for outcome in outcomes if outcome.result == "float"}
        lines += [f"- {name}: all: {detail}" for detail in sorted(nothing)]
    faults = [
        f"- {name}, {outcome.case}: {outcome.result}: {' '.join(outcome.detail.split())[:400]}"
        for name, outcomes in results.items()
        for outcome in outcomes
        if outcome.result not in ("equal", "float")
    ]
    return "\n".join([*lines, "", "## Faults", "", *(faults or ["None."]), ""])


def reasons(outcomes: list[Outcome]) -> Iterator[str]:
    """Why layers stayed float, one sentence a reason with the layers' last names and the cases it holds for."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for outcome in outcomes:
        for layer, reason in outcome.left_float.items():
            if "by default" in reason or reason.startswith("tied"):
                continue
            layers, cases = found.setdefault(reason, (set(), set()))
            layers.add(layer)
            cases.add(outcome.case)
    for reason, (layers, cases) in found.items():
        where = "all cases" if len(cases) == len(outcomes) else ", ".join(sorted(cases))
        shown = ", ".join(f"`{layer}`" for layer in sorted(layers)[:3])
        shown += f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        yield f"{shown} ({where}): {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of class names; default all")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", nargs=2, metavar=("NAME", "SKIP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], int(arguments.work[1]))
        return
    results: dict[str, list[Outcome]] = {}
    for name in ARCHITECTURES:
        if any(part.lower() in name.lower() for part in arguments.only):
            results[name] = run_architecture(name)
            print(f"{name:40} " + " ".join(outcome.result for outcome in results[name]), flush=True)
    write(results, arguments.output)


def write(results: Mapping[str, list[Outcome]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    plain = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in results.items()}
    text = json.dumps({"command": COMMAND, "results": plain}, indent=1)
    (output / "architectures.json").write_text(text + "\n", encoding="utf-8")
    (output / "architectures.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
