"""Which transformer classes of diffusers survive the whole line, and what of each is quantized.

The tiny random models of `tests.diffusion_architectures` meet each weight type and serving dtype. Three cases:

- ``diffusers``: prepare, two optimizer steps, freeze, export, then a stock ``AutoModel.from_pretrained`` in another
  process that does not import `qat` (`scripts.stock_diffusers`), and a comparison of every code, scale, shift,
  dequantized weight, other parameter, buffer and output, bit for bit.
- ``gguf-diffusers``: the same for GGUF files and ``from_single_file``, and `qat.verify`.
- ``plug-in``: what `qat.integrations.diffusers` loads, held against stock diffusers in another process.

Models are made in a process of their own too, so that a crash of a kernel on either side is the result of its case, and
the rest goes on. Writes ``diffusers.md`` and ``diffusers.json``; cases that did not run keep their results there::

    python -m scripts.diffusers_matrix [--cases plug-in] [--classes Flux Wan] [--types int4] [--dtypes bfloat16]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import qat
from qat.errors import SpecError, TargetError
from scripts._diffusers_table import COMMAND, DTYPES, WEIGHTS, FullSize, Outcome, Row, Table, document
from scripts.architecture_matrix import dequantize, largest_gap
from scripts.json_workers import Ask, Worker, serve
from scripts.stock_diffusers import Portrait, outputs_of, portrait_of_outputs, state_portrait
from tests.diffusion_architectures import ARCHITECTURES, DiffusionArchitecture

CASES: dict[str, Sequence[str]] = {"diffusers": WEIGHTS, "gguf-diffusers": ("q8_0", "q4_0", "q4_1"), "plug-in": WEIGHTS}
"""The weight types of each."""
WAYS = {
    "packed directory": "packed directory",
    "packed file": "packed directory",
    "float directory": "float directory",
    "float file": "float directory",
}
"""What the plug-in loads, and the load of stock diffusers that it must equal."""


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
    weights, target = request["weights"], request.get("target", "diffusers")
    spec = qat.QuantSpec.model_validate({"weights": weights, "dtype": request["dtype"]})
    model = architecture.build(zeros=request.get("zeros", False))
    try:
        report = qat.prepare(model, spec, target=target, example_inputs=architecture.example()).inspection
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
    if target == "gguf-diffusers":
        qat.verify(request["directory"], reference=model)
    if request.get("more"):
        write_more(request["directory"], architecture)
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


def write_more(directory: str, architecture: DiffusionArchitecture) -> None:
    """What the plug-in loads besides an export: the export in one file, which may have shards, and the float model."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for path in Path(directory).glob("diffusion_pytorch_model*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, f"{directory}-packed.safetensors")
    model: Any = architecture.build()
    model.save_pretrained(f"{directory}-float")


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


def run_case(
    name: str, weights: str, dtype: str, folder: Path, maker: Ask, stock: Ask, target: str = "diffusers"
) -> Outcome:
    """Make one export, let stock code load it, compare, and remove it."""
    case = f"{weights} {dtype}"
    directory = folder / f"{name}-{weights}-{dtype}"
    request = {"name": name, "weights": weights, "dtype": dtype, "directory": str(directory), "target": target}
    made = maker(request)
    if "error" in made:
        return Outcome(case, "FAILED", f"before the load: {made['error']}", made["traceback"])
    known = ("result", "detail", "linear_share", "left_float", "fake_gap", "kernel_gap")
    outcome = Outcome(case, **{key: made[key] for key in known if key in made})
    if outcome.result != "equal":
        return outcome
    loaded = stock(request | {"way": "gguf file" if target == "gguf-diffusers" else "packed directory"})
    if "error" in loaded:
        outcome.result, outcome.detail = "FAILED", f"stock load: {loaded['error']}"
        outcome.traceback = loaded["traceback"]
    else:
        judge(outcome, made, loaded)
    shutil.rmtree(directory, ignore_errors=True)
    return outcome


def judge(outcome: Outcome, goal: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Compare two portraits of a model."""
    faults = [] if goal["kind"] == loaded["kind"] else [f"a {loaded['kind']} was loaded"]
    faults += [*differences(goal["state"], loaded["state"]), *differences(goal["outputs"], loaded["outputs"])]
    faults += [f"loaded in the other dtype: {fault}" for fault in loaded["cast"]]
    if faults:
        outcome.result, outcome.detail = "FAILED", f"{len(faults)} differ, first: {faults[0]}"
        outcome.traceback = "\n".join(faults[:20])


def run_plug_in(
    name: str, weights: str, dtype: str, folder: Path, maker: Ask, stock: Ask, plug_in: Ask
) -> Iterator[Outcome]:
    """Make one export and one float directory; an outcome for each way to load them."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    directory = folder / f"{name}-{weights}-{dtype}"
    request = {"name": name, "weights": weights, "dtype": dtype, "directory": str(directory), "more": True}
    made = maker(request)
    goals: dict[str, Mapping[str, Any]] = {}
    for way, goal in WAYS.items():
        outcome = Outcome(f"{way}, {weights} {dtype}", "equal")
        if "error" in made:
            unfit = "the model cannot run them" in made["error"]
            outcome.result, outcome.detail = "unfit" if unfit else "FAILED", made["error"][:300]
        elif made["result"] != "equal":
            outcome.result, outcome.detail = made["result"], made["detail"]
        elif way.endswith("file") and name not in SINGLE_FILE_LOADABLE_CLASSES:
            continue
        else:
            goals[goal] = goals.get(goal) or stock(request | {"way": goal})
            loaded = plug_in(request | {"way": way})
            if "error" in goals[goal]:
                outcome.result, outcome.detail = "unfit", f"stock diffusers: {goals[goal]['error']}"
            elif "error" in loaded:
                outcome.result, outcome.detail, outcome.traceback = "FAILED", loaded["error"], loaded["traceback"]
            else:
                judge(outcome, goals[goal], loaded)
        yield outcome
    for path in folder.glob(f"{directory.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def differences(frozen: Portrait, loaded: Portrait) -> list[str]:
    """What is unequal between two portraits."""
    return [
        f"{name}: {frozen.get(name, 'absent')} when frozen, {loaded.get(name, 'absent')} when loaded"
        for name in sorted(frozen.keys() | loaded.keys())
        if frozen.get(name) != loaded.get(name)
    ]


def run_class(case: str, name: str, pairs: Sequence[tuple[str, str]], maker: Ask, stock: Ask, plug_in: Ask) -> Row:
    """One case of one class, with each pair of a weight type and a dtype."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for weights, dtype in pairs:
            at = name, weights, dtype, Path(folder), maker, stock
            outcomes += run_plug_in(*at, plug_in) if case == "plug-in" else [run_case(*at, target=case)]
    print(f"{name:40} " + " ".join(outcome.result for outcome in outcomes), flush=True)
    full = maker({"name": name}) if case == "diffusers" else {}
    if "error" in full:
        raise RuntimeError(f"{name} at full size: {full['traceback']}")
    return Row(outcomes, FullSize(**full) if full else None)


def run(case: str, names: Sequence[str], pairs: Sequence[tuple[str, str]], jobs: int) -> dict[str, Row]:
    """One case of all classes; each job has a process that makes, one that loads, and one that loads by the plug-in."""

    def some(share: Sequence[str]) -> dict[str, Row]:
        with (
            Worker("scripts.diffusers_matrix", "--work") as maker,
            Worker("scripts.stock_diffusers") as stock,
            Worker("scripts.stock_diffusers", "--plug-in") as plug_in,
        ):
            return {name: run_class(case, name, pairs, maker.ask, stock.ask, plug_in.ask) for name in share}

    with ThreadPoolExecutor(jobs) as pool:
        found: dict[str, Row] = {}
        for part in pool.map(some, [names[job::jobs] for job in range(jobs)]):
            found |= part
    return {name: found[name] for name in names}


def names_of(case: str) -> list[str]:
    """The classes that a case is for."""
    if case != "gguf-diffusers":
        return list(ARCHITECTURES)
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return [name for name in ARCHITECTURES if name in SINGLE_FILE_LOADABLE_CLASSES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--classes", nargs="*", default=[""], help="parts of class names; default all")
    parser.add_argument("--types", nargs="*", help="of weights; default all of each case")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=1, help="sets of processes, each on one thread")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        serve(answer)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "diffusers.json"
    tables = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["cases"]
        tables = {case: Table.read(part) for case, part in found.items()}
    for case in arguments.cases:
        names = [name for name in names_of(case) if any(part.lower() in name.lower() for part in arguments.classes)]
        types = [weights for weights in CASES[case] if not arguments.types or weights in arguments.types]
        pairs = [(weights, dtype) for dtype in arguments.dtypes for weights in types]
        tables[case] = Table.of(run(case, names, pairs, max(1, min(arguments.jobs, len(names)))))
    parts = ",\n".join(f"{json.dumps(case)}: {tables[case].written()}" for case in CASES if case in tables)
    path.write_text(f'{{"command": {json.dumps(COMMAND)}, "cases": {{\n{parts}\n}}}}\n', encoding="utf-8")
    (arguments.output / "diffusers.md").write_text(document(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
