"""Which transformers architectures survive the whole line, and what of each is quantized.

The tiny random models of `tests.architectures`, made by hand, meet each weight type and serving dtype. Those of
`tests.tiny_transformers`, made by rules, are one class for each model type and task of transformers; they meet int8
and int4. A case is: prepare, two optimizer steps, freeze, export, load with the target's own loader (`from_pretrained`
with the plug-in; for causal language models made by hand also optimum-quanto's), and a comparison of every tensor and
every output bit for bit. Models live in processes of their own, so that a crash of a kernel is a result like any other.
Writes ``architectures.md`` and ``architectures.json``; a run of some classes replaces their rows and keeps the rest::

    python -m scripts.architecture_matrix [--only Llama Bert] [--jobs 2] [--part 1/4] [--output docs/results]
"""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from qat.errors import SpecError, TargetError
from qat.hosts.transformers import TRANSFORMERS
from scripts._architecture_course import Course, Outcome, chosen, outcomes_of, parser
from scripts._architecture_table import Row, table
from scripts.json_workers import Ask, serve
from tests.architectures import ARCHITECTURES, Architecture
from tests.tiny_transformers import LEFT_OUT, TinyTransformer, tiny_transformers

WEIGHTS = ("int8", "float8", "int4", "int2")
DTYPES = ("float32", "bfloat16")
SECONDS = 120
"""What a case may take."""


@dataclass(frozen=True)
class Case:
    """One way to quantize a model."""

    weights: Any
    dtype: Any
    activations: Any = None

    def __str__(self) -> str:
        return f"{self.weights}{f'+{self.activations}' if self.activations else ''} {self.dtype}"


CASES = tuple(Case(weights, dtype) for dtype in DTYPES for weights in WEIGHTS)
RULE_CASES = tuple(Case(weights, dtype) for dtype in DTYPES for weights in ("int8", "int4"))
ACTIVATION_CASES = tuple(Case(kind, dtype, kind) for dtype in DTYPES for kind in ("int8", "float8"))


def run_case(architecture: Architecture | TinyTransformer, case: Case, directory: Path) -> Outcome:
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
    matrices = sum(weight.numel() for weight in architecture.build().parameters() if weight.ndim >= 2)
    share = report.quantized_parameters / max(1, matrices)
    outcome = Outcome(str(case), "equal", "", report.quantized_share, share, report.left_float)
    fake_quantized = outputs_of(model, architecture.example())
    qat.freeze(model, allow_unreached=True)  # not every layer is in the way of every input
    frozen = outputs_of(model, example)
    if case.dtype == "float32":
        outcome.fake_gap = largest_gap(fake_quantized, frozen)
    by_hand = isinstance(architecture, Architecture)
    for target in (
        ("transformers", "quanto") if by_hand and architecture.model.endswith("CausalLM") else ("transformers",)
    ):
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


def train(
    architecture: Architecture | TinyTransformer, spec: qat.QuantSpec, target: str
) -> tuple[Any, qat.InspectReport]:
    """A prepared model after two optimizer steps, calibrated before and after them, in evaluation mode."""
    model: Any = architecture.build()
    example = architecture.example()
    report = qat.prepare(model, spec, target=target, example_inputs=example).inspection
    qat.calibrate(model, [example])
    take_two_steps(model, architecture)
    qat.calibrate(model, [example])
    return model.eval(), report


def take_two_steps(model: nn.Module, architecture: Architecture | TinyTransformer) -> None:
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
    pairs = [[tensors[key].double().masked_fill(tensors[key].isneginf(), 0) for tensors in (one, other)] for key in one]
    return float(torch.stack([(a - b).abs().max() / a.abs().max().clamp(min=1e-30) for a, b in pairs]).max())


def output_faults(frozen: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor]) -> list[str]:
    """What is unequal between two models' outputs."""
    if frozen.keys() != loaded.keys() or not frozen:
        return [f"outputs {sorted(frozen)} and {sorted(loaded)}"]
    # Minus infinity is what a mask leaves in logits.
    faults = [f"output {key} is not finite" for key, y in frozen.items() if (y.isnan() | y.isposinf()).any()]
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


def cases_of(name: str) -> tuple[Case, ...]:
    return CASES if name in ARCHITECTURES else RULE_CASES


def task_of(name: str) -> str:
    return "by hand" if name in ARCHITECTURES else tiny_transformers()[name].task


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One case of one class, or what keeps a class from being made."""
    name = request["name"]
    architecture = ARCHITECTURES.get(name) or tiny_transformers()[name]
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS)
    try:
        if "case" not in request:
            return {"reason": reason_against(architecture)}
        case = cases_of(name)[request["case"]]
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = run_case(architecture, case, Path(folder) / "quantized")
            except Exception:
                fault = float_fault(architecture, case)
                if fault is None:
                    raise
                return asdict(Outcome(str(case), "unfit", fault))
            if outcome.result == "difference" and (fault := stock_fault(architecture, Path(folder) / "float")):
                outcome.result, outcome.detail = "unfit", fault
            return asdict(outcome)
    except _OutOfTime:
        raise TimeoutError(f"over {SECONDS} s") from None
    finally:
        signal.alarm(0)


def reason_against(architecture: Architecture | TinyTransformer) -> str:
    """Why no tiny model of a class can be made and run, in one line; empty if one can."""
    step = "no tiny configuration of it builds"
    try:
        architecture.build()
        step = "no input that was tried runs"
        architecture.example()
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        return f"needs the package {package[1]}, which is not installed" if package else str(error)
    except Exception as error:
        return f"{step}: {type(error).__name__}: {error}"
    return ""


def float_fault(architecture: Architecture | TinyTransformer, case: Case) -> str | None:
    """Why the float model could not have been trained, or served in the case's dtype; None if it could."""
    dtype = getattr(torch, case.dtype)
    step = "does not train"
    try:
        take_two_steps(architecture.build(), architecture)
        step = f"does not run in {case.dtype}"
        model: Any = architecture.build()
        model = TRANSFORMERS.build(type(model), model.config, dtype, empty=False)  # as its loader does
        outputs_of(model.eval(), architecture.example(dtype))
    except Exception as error:
        return f"the float model {step} either: {type(error).__name__}: {error}"
    return None


def stock_fault(architecture: Architecture | TinyTransformer, directory: Path) -> str | None:
    """What the float model loses between ``save_pretrained`` and ``from_pretrained``; None where it loses nothing."""
    model: Any = architecture.build()
    take_two_steps(model, architecture)  # so that no two tensors stay alike
    model.save_pretrained(directory)
    faults = state_faults(model, type(model).from_pretrained(directory, trust_remote_code=False))
    return (
        f"the float model comes back with other tensors from stock transformers, too: {faults[0]}" if faults else None
    )


class _OutOfTime(BaseException):
    """What no ``except Exception`` on the way stops."""


def _out_of_time(*_: object) -> None:
    raise _OutOfTime


def run_architecture(name: str, ask: Ask) -> Row:
    """All cases of one class; one whose model cannot be made or run as it stands has a reason in their place."""
    task = task_of(name)
    asked = {} if name in LEFT_OUT else ask({"name": name})
    reason = LEFT_OUT.get(name) or asked.get("reason") or asked.get("error")
    if reason:
        return Row(task, reason=" ".join(reason.split()))
    return Row.of(task, outcomes_of(name, cases_of(name), ask))


COURSE = Course("scripts.architecture_matrix", "architectures", table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="*", help="tasks as the table names them; default all")
    options.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the classes")
    arguments = options.parse_args()
    if arguments.work:
        serve(answer)
        return
    part, parts = map(int, arguments.part.split("/"))
    every = [*ARCHITECTURES, *(name for name in tiny_transformers() if name not in ARCHITECTURES)]
    names = chosen(every, arguments)
    names = [name for name in names if not arguments.tasks or task_of(name) in arguments.tasks][part - 1 :: parts]
    found = COURSE.run(names, arguments.jobs, run_architecture)
    COURSE.write(found, every if len(names) < len(every) else names, arguments.output)


if __name__ == "__main__":
    main()
