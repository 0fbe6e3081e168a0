"""Freeze, export, load and verify: seconds, and memory above the model, beside what the disk and one sha256 can do.

The model is a row of `nn.Linear` in bfloat16 with random weights. Everything before the clock is warm: a small model
has gone through all verbs. A load counts until every page was read. Stock `requantize` fills a float model that was
built before its clock started. The plain write is that of the same bytes, with its fsync, in pieces of one layer::

    python -m scripts.benchmark_freezing [--gib 4] [--types int8 int4] [--device cuda] [--output freezing.json]

The script uses the public interface alone, so that ``PYTHONPATH=path/to/old/checkout`` measures an older one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import tyro
from torch import nn

import qat

GIB = 1 << 30


@dataclass(frozen=True)
class Options:
    """What is measured."""

    gib: float = 0.5
    """Size of the model in bfloat16."""
    width: int = 2048
    """Features of every layer, in and out."""
    types: tuple[str, ...] = ("int8", "float8", "int4")
    """Types of weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is frozen and exported; it is loaded and verified on the CPU."""
    rounds: int = 1
    """How often; medians are shown."""
    steps: tuple[str, ...] = ("freeze", "export", "load", "requantize", "verify")
    """What is timed after freezing and exporting, which every run needs."""
    output: Path | None = None
    """A JSON file for the results."""
    folder: Path | None = None
    """On which disk to write; default the one for temporary files."""


def build(width: int, layers: int, device: str) -> nn.Sequential:
    """Linear layers with small random weights."""
    model = nn.Sequential(*(nn.Linear(width, width, dtype=torch.bfloat16, device="meta") for _ in range(layers)))
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval()


def memory(name: str) -> int:
    """A line of the process's memory, in bytes: ``VmRSS``, or its peak ``VmHWM``."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def measure(name: str, step: Callable[[], object], device: str = "cpu") -> dict[str, float]:
    """Seconds, processor seconds of all threads, and the peak of memory above what was used before, in GiB.

    Memory is the process's, and that of the CUDA device where the step runs there.
    """
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is used now
    before, on_device = memory("VmRSS"), torch.cuda.memory_allocated() if cuda else 0
    start, processor = time.perf_counter(), time.process_time()
    step()
    if cuda:
        torch.cuda.synchronize()
    found = {f"{name} s": time.perf_counter() - start, f"{name} cpu s": time.process_time() - processor}
    found[f"{name} GiB"] = (memory("VmHWM") - before) / GIB
    if cuda:
        found[f"{name} CUDA GiB"] = (torch.cuda.max_memory_allocated() - on_device) / GIB
    return found


def touch(model: nn.Module) -> None:
    """Read every page of a model's tensors."""

    def parts(tensor: Any) -> list[torch.Tensor]:
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        return [part for name in names for part in parts(getattr(tensor, name))] if names else [tensor]

    for parameter in model.parameters():
        for part in parts(parameter.data):
            part.detach().reshape(-1).view(torch.uint8)[::4096].sum()


def stock_load(model: nn.Module, directory: Path) -> nn.Module:
    """Optimum-quanto's own loader."""
    from optimum.quanto import requantize
    from safetensors.torch import load_file

    requantize(
        model, load_file(directory / "model.safetensors"), json.loads((directory / "quanto_qmap.json").read_text())
    )
    return model


def plain_write(source: Path, folder: Path, piece: int) -> float:
    """Seconds to write the bytes of a file that are in memory, and to bring them to the disk."""
    data = memoryview(source.read_bytes())
    start = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for begin in range(0, len(data), piece):
            file.write(data[begin : begin + piece])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (folder / "plain").unlink()
    return seconds


def hash_speed() -> float:
    """GiB a second of one sha256."""
    data = os.urandom(1 << 28)
    start = time.perf_counter()
    hashlib.sha256(data).digest()
    return len(data) / GIB / (time.perf_counter() - start)


def written(weights: str, width: int, layers: int, device: str, out: Path) -> dict[str, float]:
    """Freeze and export a model, which ends with this call."""
    model = build(width, layers, device)
    qat.prepare(model, qat.QuantSpec(weights=weights), algorithm=qat.StraightThrough())  # type: ignore[arg-type]
    frozen = measure("freeze", lambda: qat.freeze(model), device)
    return frozen | measure("export", lambda: qat.export(model, out, max_shard_size="1TB"), device)


def run(weights: str, width: int, layers: int, options: Options, folder: Path) -> dict[str, float]:
    """One round of one type."""
    out = folder / "export"
    found, file = written(weights, width, layers, options.device, out), out / "model.safetensors"
    found["file GiB"] = file.stat().st_size / GIB
    found["plain write s"] = plain_write(file, folder, width * width)
    if "load" in options.steps:
        empty = build(width, layers, "meta")
        found |= measure("load", lambda: touch(qat.load(out, model=empty)))
    if "requantize" in options.steps:
        floats = build(width, layers, "cpu")
        found |= measure("requantize", lambda: touch(stock_load(floats, out)))
        del floats
    if "verify" in options.steps:
        floats = build(width, layers, "cpu")
        found |= measure("verify", lambda: qat.verify(out, model=floats))
    return found


def main(options: Options) -> None:
    """Measure, print a table and write JSON."""
    logging.disable(logging.WARNING)
    layers = max(1, round(options.gib * GIB / (2 * options.width**2)))
    results: dict[str, dict[str, float]] = {}
    for weights in options.types:
        rounds = []
        for number in range(options.rounds + 1):
            with TemporaryDirectory(dir=options.folder) as folder:
                size = (options.width, layers) if number else (256, 2)  # the first one warms up
                rounds.append(run(weights, *size, options, Path(folder)))
        results[weights] = {name: statistics.median(found[name] for found in rounds[1:]) for name in rounds[0]}
    machine = {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "sha256 GiB/s": hash_speed(),
        "layers": layers,
        "width": options.width,
        "layer GiB": 2 * options.width**2 / GIB,
    }
    print(f"qat {qat.__file__}")  # which checkout; the file of results holds no path of a machine
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'':18}" + "".join(f"{weights:>10}" for weights in results))
    for name in next(iter(results.values())):
        print(f"{name:18}" + "".join(f"{found[name]:10.3f}" for found in results.values()))
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
