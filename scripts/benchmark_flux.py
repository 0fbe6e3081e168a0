"""A Flux-shaped transformer of two billion parameters: training step, freeze, export and stock load, against bfloat16.

Random weights and random inputs of one 1,024 x 1,024 image (4,096 image and 512 text tokens), real Flux widths, fewer
blocks. First the training arms in alternating rounds: plain bfloat16 and each type, time and peak memory a step. Then
for each type one model is trained for a step, frozen, exported, and loaded again in fresh processes: by diffusers'
own `AutoModel.from_pretrained` (no code of ours in that process), by `qat.load`, and by optimum-quanto's `requantize`
on the same tensors, each until every page has been read. Time is the wall clock's; memory is what the process (the
kernel's high-water mark) or CUDA held at most::

    python -m scripts.benchmark_flux --output docs/results/flux_2b.json

On a machine without a GPU ``--blocks 1 1 --width 256 --tokens 16 16 --device cpu`` shows that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat

HEAD = 128  # elements of an attention head, as in Flux; the three axes of its rotary embedding add up to it


def build(arguments: argparse.Namespace) -> nn.Module:
    """The model with random weights, in bfloat16, on the device."""
    from diffusers import FluxTransformer2DModel

    kind: Any = FluxTransformer2DModel
    double, single = arguments.blocks
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = kind(
            in_channels=64,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=HEAD,
            num_attention_heads=arguments.width // HEAD,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )
    return model.to(torch.bfloat16)  # type: ignore[no-any-return]


def example(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Random inputs of one image, with a velocity to learn."""
    from diffusers import FluxPipeline

    image, text = arguments.tokens
    side = int(image**0.5)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(1, side * side, 64, **options),
        "encoder_hidden_states": torch.randn(1, text, 4096, **options),
        "pooled_projections": torch.randn(1, 768, **options),
        "timestep": torch.rand(1, **options),
        "guidance": torch.full((1,), 3.5, **options),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, **options),
        "txt_ids": torch.zeros(text, 3, **options),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, arguments: argparse.Namespace) -> float:
    """Seconds of one training step."""
    inputs = example(arguments, arguments.device)
    target = torch.randn_like(inputs["hidden_states"])
    synchronize(arguments)
    start = time.perf_counter()
    prediction = model(**inputs, return_dict=False)[0]
    nn.functional.mse_loss(prediction.float(), target.float()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize(arguments)
    return time.perf_counter() - start


def synchronize(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def prepared(qtype: str, arguments: argparse.Namespace) -> nn.Module:
    """The model of one arm, ready to train: plain for ``bfloat16``."""
    model = build(arguments)
    if qtype != "bfloat16":
        spec = qat.QuantSpec.model_validate({"weights": qtype})
        qat.prepare(model, spec, target="diffusers", algorithm=qat.StraightThrough())
    if arguments.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    return model.train()


def train(qtype: str, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of each measured step, and CUDA's peak memory in GiB."""
    cuda = arguments.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = prepared(qtype, arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)
    called: Any = torch.compile(model) if arguments.compile else model
    times = [step(called, optimizer, arguments) for _ in range(arguments.warmup + arguments.steps)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    del model, called, optimizer
    free(arguments)
    return times[arguments.warmup :], peak


def free(arguments: argparse.Namespace) -> None:
    gc.collect()
    torch._dynamo.reset()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()


def training_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms in alternating rounds."""
    arms = ["bfloat16", *arguments.types]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks = {}
    for index in range(arguments.rounds):
        for arm in arms if index % 2 == 0 else arms[::-1]:
            times, peaks[arm] = train(arm, arguments)
            seconds[arm] += times
            print(f"round {index}, {arm}: {[round(t * 1e3) for t in times]} ms", file=sys.stderr, flush=True)
    base, base_peak = statistics.median(seconds["bfloat16"]), peaks["bfloat16"]
    return [
        {
            "arm": arm,
            "ms": round(statistics.median(seconds[arm]) * 1e3, 2),
            "time_ratio": round(statistics.median(seconds[arm]) / base, 4),
            "peak_gib": round(peaks[arm], 3),
            "memory_ratio": round(peaks[arm] / base_peak, 4) if base_peak else None,
        }
        for arm in arms
    ]


# What a process does before the clock starts, and what is timed.
LOADERS = {
    "diffusers": ("", "AutoModel.from_pretrained(directory, dtype=torch.bfloat16)"),
    "qat.load": ("import qat", "qat.load(directory)"),
    "requantize": (
        """
import json
from optimum.quanto import requantize
from safetensors.torch import load_file
config = json.load(open(f"{directory}/config.json"))
kind = {"float8": "qfloat8_e4m3fn"}.get(name := config.pop("quantization_config")["weights_dtype"], f"q{name}")
torch.nn.init.kaiming_uniform_ = torch.nn.init.uniform_ = lambda tensor, *_, **__: tensor
made = diffusers.FluxTransformer2DModel.from_config(config).to(torch.bfloat16)

def requantized():
    state = {}
    for file in glob.glob(f"{directory}/diffusion*.safetensors"):
        state.update(load_file(file))
    names = {key.split(".weight._")[0] for key in state if ".weight._" in key}
    requantize(made, state, {name: {"weights": kind, "activations": "none"} for name in names})
    return made
""",
        "requantized()",
    ),
}
CHILD = """
import glob, pathlib, sys, time
import torch, diffusers, optimum.quanto
from diffusers import AutoModel

def memory(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20

def parts(tensor):
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [p for name in names for p in parts(getattr(tensor, name))] or [tensor]

directory = sys.argv[1]
{before}
held = memory("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
start = time.perf_counter()
model = {timed}
for tensor in [part for t in (*model.parameters(), *model.buffers()) for part in parts(t.data)]:
    tensor.view(torch.uint8).sum() if tensor.ndim else tensor.item()  # reads every page of what may only be mapped
print("RESULT", time.perf_counter() - start, memory("VmHWM") - held)
assert {ours} or "qat" not in sys.modules
"""
LIMIT = 90  # seconds of a load, beyond which it is given up


def load_rows(directory: Path) -> dict[str, Any]:
    """Time and memory of each loader on one directory, each in a process of its own, after one that warms the cache."""
    rows: dict[str, Any] = {}
    for name in ("diffusers", *LOADERS):
        before, timed = LOADERS[name]
        script = CHILD.format(before=before, timed=timed, ours=name == "qat.load")
        command = [sys.executable, "-W", "ignore", "-c", script, str(directory)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            rows[name] = {"error": f"not done after {LIMIT} s"}
            continue
        results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if done.returncode == 0 and results:
            rows[name] = {"seconds": round(float(results[0][0]), 2), "peak_gib": round(float(results[0][1]), 2)}
        else:
            rows[name] = {"error": done.stderr.strip().splitlines()[-1:]}
    return rows


def export_row(qtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one step, freeze, export, load again: what each takes."""
    cuda = arguments.device == "cuda"
    model = prepared(qtype, arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step(model, optimizer, arguments)
    del optimizer
    free(arguments)
    row: dict[str, Any] = {"type": qtype, "parameters": sum(p.numel() for p in model.parameters())}
    if cuda:
        row["model_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    qat.freeze(model)
    synchronize(arguments)
    row["freeze_seconds"] = round(time.perf_counter() - start, 2)
    if cuda:
        row["freeze_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        directory = Path(folder, "export")
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        report = qat.export(model, directory)
        row["export_seconds"] = round(time.perf_counter() - start, 2)
        row["export_extra_gib"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, 2)
        row["written_gib"] = round(report.total_bytes / 2**30, 3)
        row["plain_write_seconds"] = plain_write(Path(folder, "plain"), report.total_bytes)
        del model
        free(arguments)
        row["loads"] = load_rows(directory)
        start = time.perf_counter()
        row["verified_checks"] = len(qat.verify(directory).checks)
        row["verify_seconds"] = round(time.perf_counter() - start, 2)
    return row


def plain_write(path: Path, size: int) -> float:
    """Seconds to write as many bytes to the same disk, in pieces of 64 MiB."""
    piece = bytes(2**26)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-size // len(piece))):
            file.write(piece)
        file.flush()
    return round(time.perf_counter() - start, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--types", nargs="*", default=["int4", "float8"])
    parser.add_argument("--blocks", nargs=2, type=int, default=(3, 8), help="double and single blocks")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--tokens", nargs=2, type=int, default=(4096, 512), help="image and text tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--no-export", action="store_true", help="measure training only")
    parser.add_argument("--no-training", action="store_true", help="measure freezing, exporting and loading only")
    parser.add_argument("--scratch", type=Path, default=None, help="where the exports go for a moment")
    parser.add_argument("--output", type=Path, default=None, help="write everything as JSON here too")
    arguments = parser.parse_args()

    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on Flux's layout of heads with torch 2.11
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    options = {key: value for key, value in vars(arguments).items() if key not in ("output", "scratch")}
    record: dict[str, Any] = {"device": device, "torch": torch.__version__, "options": options}
    record["training"] = [] if arguments.no_training else training_rows(arguments)
    print(f"{device}; torch {torch.__version__}")
    for row in record["training"]:
        print("training  ", row, flush=True)
    record["exports"] = []
    write(record, arguments.output)
    for qtype in () if arguments.no_export else arguments.types:
        record["exports"].append(export_row(qtype, arguments))
        print("export    ", json.dumps(record["exports"][-1]), flush=True)
        write(record, arguments.output)


def write(record: dict[str, Any], path: Path | None) -> None:
    """Write what is measured so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
