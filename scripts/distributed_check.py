"""Several ranks of one host: losses and exports of DDP and FSDP2 beside one device, then time and memory of FSDP2.

First a small model. Rank 0 trains it alone, before there is a process group, on the batches of all ranks. Then all
ranks train it by DDP and by `qat.shard`. What is frozen and exported from shards is compared with what one process
exports of the same state, file by file. Then each shape: plain FSDP2 and quantized arms take turns, with float32
masters and a policy of bfloat16; the ratio is that of the medians, and memory the peak of rank 0 within a step::

    python -m scripts.distributed_check --nproc 2 --out docs/results/distributed.json

Rows are written as they come. No arm begins once ``--seconds`` are over, and it says which ones are missing. On a CPU
(gloo) sizes are those of a trial, and memory is not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import qat
from qat.blocks import find_blocks
from qat.tensors import whole
from scripts.benchmark_speed import SHAPES, build

CHECKED = {"hidden": 256, "intermediate": 512, "layers": 2, "heads": 4, "vocabulary": 512, "batch": 2, "length": 64}
TRIAL = {"hidden": 128, "intermediate": 256, "layers": 2, "heads": 2, "vocabulary": 256, "batch": 1, "length": 32}
STEPS, TURNS = 4, 3
CASES: dict[str, tuple[dict[str, str], qat.Algorithm]] = {
    "straight int8": ({"weights": "int8"}, qat.StraightThrough()),
    "straight int4": ({"weights": "int4"}, qat.StraightThrough()),
    "learned int4": ({"weights": "int4"}, qat.LearnedAffine(start="minmax")),
    "W8A8 int8": ({"weights": "int8", "activations": "int8"}, qat.StraightThrough()),
}


def prepared(shape: dict[str, int], name: str, device: str, dtype: str = "float32") -> Any:
    """The float model, for a name that is no case; else as `qat.prepare` leaves it."""
    torch.manual_seed(0)
    model = build(shape, torch.float32, device).train()
    if name in CASES:
        spec, algorithm = CASES[name]
        qat.prepare(
            model,
            qat.QuantSpec.model_validate({**spec, "dtype": dtype}),
            algorithm=algorithm,
            target="transformers",
        )
    return model


def batches(shape: dict[str, int], count: int, ranks: int, device: str) -> Tensor:
    """Token ids, ``(count, ranks, batch, length)``, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    sizes = (count, ranks, shape["batch"], shape["length"])
    return torch.randint(shape["vocabulary"], sizes, generator=generator).to(device)


class Stepping:
    """A model and its optimizer; a call is a step."""

    def __init__(self, model: Any, called: nn.Module | None = None) -> None:
        self.called = called or model
        groups = qat.parameter_groups(model, lr=1e-4, weight_decay=0.01)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups)

    def __call__(self, x: Tensor) -> float:
        loss = self.called(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def calibrated(model: Any, name: str, rows: Tensor) -> None:
    if "activations" in CASES.get(name, ({},))[0]:
        qat.calibrate(model, [{"input_ids": x} for x in rows])


def references(device: str, ranks: int) -> dict[str, list[float]]:
    """Losses of one device, on the rows of all ranks."""
    rows, found = batches(CHECKED, STEPS, ranks, device), {}
    for name in CASES:
        model = prepared(CHECKED, name, device)
        calibrated(model, name, rows.flatten(0, 1))
        step = Stepping(model)
        found[name] = [step(x) for x in rows.flatten(1, 2)]
    return found


def mean(losses: list[float], device: str) -> list[float]:
    found = torch.tensor(losses, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found)
    return (found / torch.distributed.get_world_size()).tolist()


def check(name: str, wanted: list[float], device: str, mesh: Any, folder: Path) -> dict[str, Any]:
    """Losses beside those of one device, and whether an export from shards is that of one process, to the bit."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = batches(CHECKED, STEPS, ranks, device)
    row: dict[str, Any] = {"case": name}
    for engine in ("ddp", "fsdp2"):
        model = prepared(CHECKED, name, device)
        if engine == "fsdp2":
            qat.shard(model, mesh)
        calibrated(model, name, rows[:, rank])
        step = Stepping(model, DistributedDataParallel(model) if engine == "ddp" else None)
        losses = mean([step(x) for x in rows[:, rank]], device)
        if rank == 0:
            row[engine] = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
    state = {key: whole(value).clone() for key, value in model.state_dict().items()}
    qat.freeze(model)
    qat.export(model, folder / "shards")
    if rank == 0:
        single = prepared(CHECKED, name, device)
        single.load_state_dict(state)
        qat.freeze(single)
        qat.export(single, folder / "single")
        row["equal"] = _files(folder / "shards") == _files(folder / "single")
        qat.verify(folder / "shards")
    torch.distributed.barrier()
    return row


def _files(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Clock:
    """Whether there is time for more, which all ranks learn from rank 0."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> bool:
        told = [time.monotonic() < self.end]
        torch.distributed.broadcast_object_list(told)
        return told[0]


def speed(
    shape: dict[str, int], names: list[str], device: str, mesh: Any, clock: Clock, steps: int, compiled: bool
) -> list[Any]:
    """Arms in turns, each built afresh, in another order every turn: milliseconds of a step, and peak GiB."""
    warm = 4 if compiled else 2
    rank, ranks, cuda = torch.distributed.get_rank(), torch.distributed.get_world_size(), device == "cuda"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for turn in range(TURNS):
        for name in names if turn % 2 == 0 else names[::-1]:
            if not clock.left():
                break
            model = prepared(shape, name, device, "bfloat16")
            if compiled:
                torch.compiler.reset()
                for block in find_blocks(model).values():
                    block.compile()
            qat.shard(model, mesh, mp_policy=policy)
            rows = batches(shape, steps + warm, ranks, device)[:, rank]
            calibrated(model, name, rows[:1])
            step = Stepping(model)
            for number, x in enumerate(rows):
                if number == warm and cuda:
                    torch.cuda.reset_peak_memory_stats()
                _wait(cuda)
                start = time.perf_counter()
                step(x)
                _wait(cuda)
                if number >= warm:
                    seconds[name].append(time.perf_counter() - start)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
            del model, step
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    found: list[dict[str, Any]] = []
    base = seconds[names[0]]
    for name in names:
        if not seconds[name]:
            found.append({"arm": name, "error": "no time was left"})
            continue
        row: dict[str, Any] = {
            "arm": name,
            "compiled": compiled,
            "batch": shape["batch"],
            "ms": round(statistics.median(seconds[name]) * 1e3, 2),
            "steps": len(seconds[name]),
        }
        row["time_ratio"] = round(statistics.median(seconds[name]) / statistics.median(base), 4)
        if cuda:
            row |= {"peak_gib": round(peaks[name], 3), "memory_ratio": round(peaks[name] / peaks[names[0]], 4)}
        found.append(row)
    return found


def frozen(shape: dict[str, int], device: str, mesh: Any, folder: Path) -> dict[str, Any]:
    """Seconds of freezing and exporting from shards, and how far memory rises above the shards and the frozen model."""
    model = prepared(shape, "learned int4", device, "bfloat16")
    qat.shard(model, mesh)
    cuda = device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    shards, start = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
    qat.freeze(model)
    _wait(cuda)
    row = {"freeze_s": round(time.perf_counter() - start, 2)}
    if cuda:
        sizes = {
            "shards": shards,
            "frozen": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "float": sum(p.numel() for p in build(shape, torch.float32, "meta").parameters()) * 4,
        }
        row |= {f"{key}_gib": round(size / 2**30, 3) for key, size in sizes.items()}
    start = time.perf_counter()
    report = qat.export(model, folder / "large")
    return row | {"export_s": round(time.perf_counter() - start, 2), "export_gib": round(report.total_bytes / 2**30, 3)}


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def rank_main(arguments: argparse.Namespace) -> None:
    """What each rank does."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = arguments.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.matmul.allow_tf32 = False
    clock, wanted = Clock(arguments.seconds), references(arguments.device, ranks) if rank == 0 else {}
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    mesh, names = init_device_mesh(arguments.device, (ranks,)), ["plain FSDP2", *CASES]
    name = torch.cuda.get_device_name() if cuda else "CPU"
    record: dict[str, Any] = {"device": f"{ranks} x {name}", "torch": torch.__version__, "rows": []}

    def add(part: str, row: dict[str, Any]) -> None:
        if rank == 0:
            record["rows"].append({"part": part, **row})
            print(json.dumps(record["rows"][-1]), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    for case in CASES:
        with TemporaryDirectory() as folder:
            add("check", check(case, wanted.get(case, []), arguments.device, mesh, _shared(folder)))
    for shape in arguments.shapes:
        sizes = SHAPES[shape] if cuda else TRIAL
        sizes = sizes | {"batch": arguments.batch or sizes["batch"]}
        for compiled in (False, True) if arguments.compile else (False,):
            for row in speed(sizes, names, arguments.device, mesh, clock, arguments.steps, compiled):
                add(shape, row)
    if clock.left():
        with TemporaryDirectory() as folder:
            add("freeze", frozen(sizes, arguments.device, mesh, _shared(folder)))
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _shared(folder: str) -> Path:
    told = [folder]
    torch.distributed.broadcast_object_list(told)
    return Path(told[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--nproc", type=int, default=2, help="ranks, each with a device of its own")
    parser.add_argument("--out", type=Path, required=True, help="where the rows go, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["cpu", "1b"])
    parser.add_argument("--batch", type=int, default=0, help="rows of a rank; 0: those of the shape")
    parser.add_argument("--compile", action="store_true", help="each arm also with its blocks compiled")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of an arm a turn")
    parser.add_argument("--seconds", type=float, default=330.0, help="after which no arm begins")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return rank_main(arguments)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.nproc)]
    given = {key: vars(arguments)[key] for key in ("out", "device", "batch", "steps", "seconds")}
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]  # torchrun would take --nproc
    options += ["--compile"] if arguments.compile else []
    command = [*torchrun, "-m", "scripts.distributed_check", *options, "--shapes", *arguments.shapes]
    raise SystemExit(subprocess.run(command, timeout=arguments.seconds + 140, check=False).returncode)


if __name__ == "__main__":
    main()
