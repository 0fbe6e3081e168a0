"""Time and memory of a training step: plain float, qat, stock optimum-quanto QAT and torchao QAT, in one process.

Every arm trains the same Llama-shaped model with AdamW on random tokens. Arms alternate in rounds, each built afresh,
so that a slow minute of the machine meets all of them; the figure is the median over all measured steps, and the ratio
is to plain float in the same run. Peak memory is CUDA's, so it is reported there only::

    python -m scripts.benchmark_speed --shape cpu
    python -m scripts.benchmark_speed --shape 8b --dtype bfloat16 --compile --output docs/results/speed_8b.json

torchao is not installed by default (it makes importing optimum-quanto noisy): ``pip install -e .[benchmark]``.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat

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
    qat.prepare(model, qat.QuantSpec.model_validate({"weights": qtype, "dtype": serving}))


def arm_quanto(model: nn.Module, qtype: str, serving: str) -> None:
    from optimum.quanto import qtypes, quantize

    name = {"float8": "qfloat8_e4m3fn"}.get(qtype, f"q{qtype}")
    quantize(model, weights=qtypes[name], exclude=["lm_head"])


def arm_torchao(model: nn.Module, qtype: str, serving: str) -> None:
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
    quantize_(body, QATConfig(weight_config=configs[qtype](), step="prepare"))


ARMS: dict[str, Callable[[nn.Module, str, str], None]] = {
    "float": arm_float,
    "qat": arm_qat,
    "quanto": arm_quanto,
    "torchao": arm_torchao,
}


def measure(arm: str, qtype: str, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each measured step, and the peak memory in GiB (0 on a CPU)."""
    shape, device = SHAPES[arguments.shape], arguments.device
    torch.manual_seed(0)
    model = build(shape, getattr(torch, arguments.dtype), device)
    ARMS[arm](model, qtype, arguments.serving)
    step_model = torch.compile(model) if arguments.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(arguments.warmup + arguments.steps):
        tokens = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]), device=device)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=arguments.autocast):
            loss = step_model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        if step >= arguments.warmup:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    del model, step_model, optimizer, loss
    gc.collect()
    if cuda:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return seconds, peak


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms of all types in alternating rounds."""
    jobs = [("float", "-")] + [(arm, qtype) for qtype in arguments.types for arm in arguments.arms]
    seconds: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    peaks: dict[tuple[str, str], float] = {}
    errors: dict[tuple[str, str], str] = {}
    for round_index in range(arguments.rounds):
        for job in jobs if round_index % 2 == 0 else reversed(jobs):
            if job in errors:
                continue
            try:
                measured, peaks[job] = measure(job[0], job[1], arguments)
                seconds[job] += measured
            except Exception as error:
                errors[job] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    base = statistics.median(seconds["float", "-"])
    rows: list[dict[str, Any]] = []
    for arm, qtype in jobs:
        row: dict[str, Any] = {"arm": arm, "type": qtype}
        if (arm, qtype) in errors:
            rows.append(row | {"error": errors[arm, qtype]})
            continue
        median = statistics.median(seconds[arm, qtype])
        row |= {"ms": round(median * 1e3, 2), "time_ratio": round(median / base, 4)}
        if peaks["float", "-"]:
            row |= {"peak_gib": round(peaks[arm, qtype], 3)}
            row |= {"memory_ratio": round(peaks[arm, qtype] / peaks["float", "-"], 4)}
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
    parser.add_argument("--steps", type=int, default=6, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--output", type=Path, default=None, help="write the rows as JSON here too")
    arguments = parser.parse_args()
    arguments.serving = arguments.serving or arguments.dtype

    rows = run(arguments)
    device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if arguments.device == "cuda":
        device = torch.cuda.get_device_name()
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    print(f"{device}; torch {torch.__version__}; shape {arguments.shape}: {SHAPES[arguments.shape]}")
    print(f"{'arm':8} {'type':7} {'ms':>9} {'time':>7} {'GiB':>8} {'memory':>7}")
    for row in rows:
        if "error" in row:
            print(f"{row['arm']:8} {row['type']:7} {row['error']}")
            continue
        memory = f"{row['peak_gib']:8.2f} {row['memory_ratio']:7.3f}" if "peak_gib" in row else ""
        print(f"{row['arm']:8} {row['type']:7} {row['ms']:9.1f} {row['time_ratio']:7.3f} {memory}")
    if arguments.output is not None:
        record = {"device": device, "torch": torch.__version__, "options": options, "rows": rows}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
