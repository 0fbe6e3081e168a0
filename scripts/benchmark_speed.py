"""Time and memory of a training step: plain float, qat, stock optimum-quanto QAT and torchao QAT, in one process.

Every arm trains the same Llama-shaped model with AdamW on random tokens. Arms alternate in rounds. On CUDA each arm
is built afresh in each round, so that its peak memory is its own; the ratio is that of the medians over all measured
steps. On a CPU, whose cores are often shared, all arms are built at once and take turns *step by step*, in another
order every time, and the ratio is the median over the turns of an arm's step to plain float's step of the same turn,
with its quartiles: what slows the machine for seconds meets an arm and its reference alike::

    python -m scripts.benchmark_speed --shape cpu
    python -m scripts.benchmark_speed --shape 8b --dtype bfloat16 --compile --output docs/results/speed_8b.json

The arm ``learned`` is qat with ranges that are learned. In ``activations`` inputs are quantized too. The arms below it
in `ARMS` change that: float8 gradients, learned scales, quantized outputs, products of values. In ``observed`` and
``observed_absmax`` observers record in every step. Run by path, with ``PYTHONPATH`` naming another checkout, the script
measures that one: so states of the library are compared in turns. Arms of LoRA are those of `benchmark_lora`.

torchao is not installed by default (it makes importing optimum-quanto noisy): ``pip install -e .[benchmark]``.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat.layers import quantized_layers
from qat.observers import ObserverChoice

# Hidden size, MLP size, layers, heads, vocabulary; batch and length of a step.
SHAPES: dict[str, dict[str, int]] = {
    name: dict(zip(("hidden", "intermediate", "layers", "heads", "vocabulary", "batch", "length"), sizes, strict=True))
    for name, sizes in {
        "cpu": (512, 1536, 4, 8, 4096, 8, 256),
        "1b": (2048, 8192, 16, 32, 32000, 4, 2048),
        "8b": (4096, 14336, 6, 32, 32000, 4, 2048),
    }.items()
}


def build(shape: dict[str, int], dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=max(1, shape["heads"] // 4),
        max_position_embeddings=shape["length"],
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    result: nn.Module = model.to(dtype)  # type: ignore[arg-type]
    return result


def arm_float(model: nn.Module, qtype: str, serving: str) -> None:
    """Nothing to prepare."""


def arm_qat(model: nn.Module, qtype: str, serving: str) -> None:
    qat.prepare(
        model, qat.QuantSpec.model_validate({"weights": qtype, "dtype": serving}), algorithm=qat.StraightThrough()
    )


def arm_learned(model: nn.Module, qtype: str, serving: str) -> None:
    spec = qat.QuantSpec.model_validate({"weights": qtype, "dtype": serving})
    qat.prepare(model, spec, algorithm=qat.LearnedAffine(start="minmax"))


def arm_activations(model: nn.Module, qtype: str, serving: str, **options: bool) -> None:
    """Activations of the weights' type; outputs stay float, as target transformers serves them."""
    spec = qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": serving})
    qat.prepare(model, spec, target="transformers", algorithm=qat.StraightThrough.model_validate(options))
    _calibrate(model)


def arm_outputs(model: nn.Module, qtype: str, serving: str) -> None:
    """Outputs quantized too, as stock quanto serves them, by the largest magnitudes of one batch.

    `qat.calibrate` refuses int8 here: outputs of random weights reach the code -128, which quanto cannot negate.
    """
    spec = qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": serving})
    qat.prepare(model, spec, target="quanto")
    layers = [layer for _, layer in quantized_layers(model)]
    for layer in layers:
        layer.mode = layer.mode._replace(activations=False, observe=True)
    with torch.no_grad():
        model(input_ids=_tokens(model))
    for layer in layers:
        layer.mode = layer.mode._replace(activations=True, observe=False)
        for quantizer in layer.activation_quantizers():
            quantizer.refresh()


def arm_emulated(model: nn.Module, qtype: str, serving: str) -> None:
    """The same, with products of values in place of codes."""
    arm_activations(model, qtype, serving)
    for _, layer in quantized_layers(model):
        layer.mode = layer.mode._replace(codes=False)


def arm_observed(model: nn.Module, qtype: str, serving: str, rule: ObserverChoice) -> None:
    """As activations, with observers that record in every step, and scales that follow them by ``rule``."""
    spec = qat.QuantSpec.model_validate({"weights": qtype, "activations": qtype, "dtype": serving})
    qat.prepare(model, spec, target="transformers", observer=rule)
    _calibrate(model)
    for _, layer in quantized_layers(model):
        layer.mode = layer.mode._replace(observe=True)


def _tokens(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 256), device=model.device)


def _calibrate(model: nn.Module) -> None:
    qat.calibrate(model, [{"input_ids": _tokens(model)}])


def arm_quanto_activations(model: nn.Module, qtype: str, serving: str) -> None:
    from optimum.quanto import qtypes, quantize

    name = qtypes[{"float8": "qfloat8_e4m3fn"}.get(qtype, f"q{qtype}")]
    quantize(model, weights=name, activations=name, exclude=["lm_head"])


def arm_quanto(model: nn.Module, qtype: str, serving: str) -> None:
    from optimum.quanto import qtypes, quantize

    name = {"float8": "qfloat8_e4m3fn"}.get(qtype, f"q{qtype}")
    quantize(model, weights=qtypes[name], exclude=["lm_head"])


def arm_torchao(model: nn.Module, qtype: str, serving: str, chosen: Any = None) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.qat import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig, QATConfig

    configs: dict[str, Callable[[], Any]] = {
        "int8": lambda: IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True),
        "float8": lambda: Float8FakeQuantizeConfig(granularity=PerRow()),
        "int4": lambda: IntxFakeQuantizeConfig(torch.int4, group_size=128, is_symmetric=False),  # type: ignore[attr-defined]
        "int2": lambda: IntxFakeQuantizeConfig(torch.int2, group_size=128, is_symmetric=False),  # type: ignore[attr-defined]
    }
    body = model.get_submodule("model")
    quantize_(body, QATConfig(weight_config=configs[qtype](), step="prepare"), chosen)


def arm_lora(model: nn.Module, qtype: str, serving: str) -> None:
    """LoRA of peft on every linear layer but the head; nothing else trains."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", exclude_modules=["lm_head"])
    inject_adapter_in_model(config, model)


def arm_lora_quantized(model: nn.Module, qtype: str, serving: str, arm: Any, base: str | None = None) -> None:
    """LoRA, quantized as ``arm`` says; with a base of packed codes."""
    arm_lora(model, qtype, serving)
    arm(model, qtype, serving)
    if base is not None:
        qat.pack_base(model, base)


def arm_lora_torchao(model: nn.Module, qtype: str, serving: str) -> None:
    """LoRA, whose base layers torchao fake-quantizes; the adapters beside them stay float."""
    arm_lora(model, qtype, serving)
    arm_torchao(model, qtype, serving, lambda module, name: name.endswith(".base_layer"))


ARMS: dict[str, Callable[[nn.Module, str, str], None]] = {
    "lora": arm_lora,
    "lora_qat": partial(arm_lora_quantized, arm=arm_qat),
    "lora_learned": partial(arm_lora_quantized, arm=arm_learned),
    "lora_packed": partial(arm_lora_quantized, arm=arm_learned, base="int4"),
    "lora_torchao": arm_lora_torchao,
    "float": arm_float,
    "qat": arm_qat,
    "learned": arm_learned,
    "activations": arm_activations,
    "float8_backward": partial(arm_activations, float8_backward=True),
    "learned_scales": partial(arm_activations, learn_activations=True),
    "outputs": arm_outputs,
    "observed": partial(arm_observed, rule=qat.Best()),
    "observed_absmax": partial(arm_observed, rule=qat.Absmax()),
    "emulated": arm_emulated,
    "quanto": arm_quanto,
    "quanto_activations": arm_quanto_activations,
    "torchao": arm_torchao,
}


class Arm:
    """One arm's model and optimizer."""

    def __init__(self, arm: str, qtype: str, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.shape = SHAPES[arguments.shape]
        torch.manual_seed(0)
        self.model = build(self.shape, getattr(torch, arguments.dtype), arguments.device)
        ARMS[arm](self.model, qtype, arguments.serving)
        self.called = torch.compile(self.model) if arguments.compile else self.model
        # Learned ranges must not be decayed; every other parameter is treated as AdamW treats it by default.
        learns = "learned" in arm or "lora" in arm
        groups = qat.parameter_groups(self.model, lr=1e-5, weight_decay=0.01) if learns else None
        self.optimizer = torch.optim.AdamW(groups or self.model.parameters(), lr=1e-5, fused=arguments.device == "cuda")

    def step(self) -> float:
        """Seconds of one training step on fresh random tokens."""
        device, shape = self.arguments.device, self.shape
        tokens = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]), device=device)
        _synchronize(device)
        clock = CLOCKS[self.arguments.clock]
        start = clock()
        with torch.autocast(device, torch.bfloat16, enabled=self.arguments.autocast):
            loss = self.called(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _synchronize(device)
        return clock() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
Job = tuple[str, str]
Seconds = dict[Job, list[float]]


def in_blocks(jobs: list[Job], arguments: argparse.Namespace) -> tuple[Seconds, dict[Job, float], dict[Job, str]]:
    """Arms one after the other, in rounds of alternating order: step times, peak memory in GiB, and errors."""
    seconds: Seconds = {job: [] for job in jobs}
    peaks, errors = dict.fromkeys(jobs, 0.0), {}
    for index in range(arguments.rounds):
        for job in jobs if index % 2 == 0 else jobs[::-1]:
            if job in errors:
                continue
            torch.cuda.reset_peak_memory_stats()
            try:
                arm = Arm(*job, arguments)
                times = [arm.step() for _ in range(arguments.warmup + arguments.steps)]
                seconds[job] += times[arguments.warmup :]
                peaks[job] = torch.cuda.max_memory_allocated() / 2**30
            except Exception as error:
                errors[job] = _first_line(error)
            arm = None  # type: ignore[assignment]
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    return seconds, peaks, errors


def in_turns(jobs: list[Job], arguments: argparse.Namespace) -> tuple[Seconds, dict[Job, float], dict[Job, str]]:
    """All arms at once, a step each a turn, in a new order every turn: step times, no memory, and errors."""
    seconds: Seconds = {job: [] for job in jobs}
    arms, errors, order = {}, {}, random.Random(0)
    for job in jobs:
        try:
            arms[job] = Arm(*job, arguments)
            for _ in range(arguments.warmup):
                arms[job].step()
        except Exception as error:
            arms.pop(job, None)
            errors[job] = _first_line(error)
    for _ in range(arguments.rounds * arguments.steps):
        for job in order.sample(list(arms), len(arms)):
            seconds[job].append(arms[job].step())
    return seconds, {}, errors


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all arms of all types, and make one row of each."""
    jobs = [("float", "-")] + [(arm, qtype) for qtype in arguments.types for arm in arguments.arms]
    seconds, peaks, errors = (in_blocks if arguments.device == "cuda" else in_turns)(jobs, arguments)
    base, base_peak = seconds["float", "-"], peaks.get(("float", "-"), 0.0)
    rows: list[dict[str, Any]] = []
    for job in jobs:
        row: dict[str, Any] = {"arm": job[0], "type": job[1]}
        if job in errors:
            rows.append(row | {"error": errors[job]})
            continue
        row["ms"] = round(statistics.median(seconds[job]) * 1e3, 2)
        if base_peak:
            row["time_ratio"] = round(statistics.median(seconds[job]) / statistics.median(base), 4)
            row |= {"peak_gib": round(peaks[job], 3), "memory_ratio": round(peaks[job] / base_peak, 4)}
        else:
            ratios = sorted(mine / plain for mine, plain in zip(seconds[job], base, strict=True))
            quarter = len(ratios) // 4
            row["time_ratio"] = round(statistics.median(ratios), 4)
            row["time_quartiles"] = [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b" if cuda else "cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="dtype of the master weights")
    parser.add_argument("--serving", default=None, help="serving dtype (default: that of the master weights)")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast around the forward")
    parser.add_argument("--compile", action="store_true", help="torch.compile every arm")
    parser.add_argument("--types", nargs="+", default=["int8", "float8", "int4", "int2"])
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=["qat", "quanto", "torchao"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of an arm a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="process: the processor time of all threads, which other programs do not lengthen (use one thread)",
    )
    parser.add_argument("--output", type=Path, default=None, help="write the rows as JSON here too")
    arguments = parser.parse_args()
    arguments.serving = arguments.serving or arguments.dtype

    rows = run(arguments)
    device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if arguments.device == "cuda":
        device = torch.cuda.get_device_name()
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    print(f"{device}; torch {torch.__version__}; shape {arguments.shape}: {SHAPES[arguments.shape]}")
    last = f"{'GiB':>8} {'memory':>7}" if arguments.device == "cuda" else "  quartiles of the time"
    print(f"{'arm':8} {'type':7} {'ms':>9} {'time':>7} {last}")
    for row in rows:
        if "error" in row:
            print(f"{row['arm']:8} {row['type']:7} {row['error']}")
            continue
        if "peak_gib" in row:
            rest = f"{row['peak_gib']:8.2f} {row['memory_ratio']:7.3f}"
        else:
            rest = "  [{:.3f}, {:.3f}]".format(*row["time_quartiles"])
        print(f"{row['arm']:8} {row['type']:7} {row['ms']:9.1f} {row['time_ratio']:7.3f} {rest}")
    if arguments.output is not None:
        record = {"device": device, "torch": torch.__version__, "options": options, "rows": rows}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
