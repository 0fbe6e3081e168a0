"""Time of the weight operators, plain and fast, beside a copy of the same weight: what a training step adds a layer.

Each operator is timed on several weights in turn, together larger than any cache, filled with random numbers (the
gradient that belongs to them is one and the same). The
table gives the median time in microseconds, and the part of a plain copy's speed that it reaches when the bytes it
must move are counted once (the weight read, and what it makes written)::

    python -m scripts.benchmark_kernels --types float8 int4 > docs/results/kernels_h200.txt
    python -m scripts.benchmark_kernels --device cpu --dtype float32 --shapes 1024 1024 3072 1024 --repeats 7
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat import kernels
from qat.formats import QUANTO
from qat.numerics import QType

BYTES = 1 << 29  # of all weights that are used in turn


def microseconds(run: Callable[[Tensor], object], weights: Iterator[Tensor], repeats: int, device: str) -> float:
    """Median time of ``run`` on the next weight."""
    times = []
    for _ in range(3):
        run(next(weights))
    for _ in range(repeats):
        weight = next(weights)
        if device == "cuda":
            start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]  # the device is busy until all launches are queued: gaps do not count
            start.record()
            run(weight)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            begin = time.perf_counter()
            run(weight)
            times.append((time.perf_counter() - begin) * 1e6)
    return float(statistics.median(times))


def arms(qtype: QType, dtype: torch.dtype, weight: Tensor) -> dict[str, tuple[Callable[[Tensor], object], int]]:
    """What is timed, and how many bytes each must move at least."""
    _, scale, shift = kernels.quantize_own_range(weight, qtype.key, torch.bfloat16, dtype)
    grad = torch.randn_like(weight)
    size, groups = weight.numel() * weight.element_size(), 4 * scale.numel() * (1 if shift is None else 2)
    columns = weight.shape[1]

    def own_range(w: Tensor) -> tuple[Tensor, Tensor | None]:
        return qtype.serve(*qtype.scale_shift(*qtype.weight_range(w)), torch.bfloat16, columns)

    return {
        "copy": (lambda w: w.clone(), 2 * size),
        "range, plain": (own_range, size + groups),
        "fake quantize": (
            lambda w: kernels.fake_quantize_weight(w, scale, shift, qtype.key, torch.bfloat16, dtype),
            2 * size + groups,
        ),
        "fake quantize, plain": (
            lambda w: qtype.fake_quantize(w, scale, shift, torch.bfloat16, dtype),
            2 * size + groups,
        ),
        "range and fake quantize": (
            lambda w: kernels.quantize_own_range(w, qtype.key, torch.bfloat16, dtype),
            2 * size + groups,
        ),
        "scale gradients": (lambda w: kernels.scale_gradients(w, scale, shift, qtype.key, grad), 3 * size + 2 * groups),
        "scale gradients, plain": (lambda w: qtype.scale_gradients(w, scale, shift, grad), 3 * size + 2 * groups),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights")
    parser.add_argument("--types", nargs="*", default=list(QUANTO.qtypes), choices=list(QUANTO.qtypes))
    parser.add_argument("--shapes", nargs="*", type=int, default=[3072, 3072, 12288, 3072, 3072, 15360])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path, default=None, help="write everything as JSON here too")
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(f"{device}; torch {torch.__version__}; {arguments.dtype}")
    rows: list[dict[str, Any]] = []
    for shape in zip(arguments.shapes[::2], arguments.shapes[1::2], strict=True):
        torch.manual_seed(0)
        one = torch.randn(shape, device=arguments.device, dtype=dtype)
        count = max(2, BYTES // (one.numel() * one.element_size()))
        weights = [one, *(torch.randn_like(one) for _ in range(count - 1))]
        for qtype in arguments.types:
            speed = 0.0
            for name, (run, size) in arms(QUANTO.qtypes[qtype], dtype, one).items():
                taken = microseconds(run, cycle(weights), arguments.repeats, arguments.device)
                speed = speed or size / taken  # of the copy, which comes first
                rows.append(
                    {
                        "shape": shape,
                        "type": qtype,
                        "what": name,
                        "microseconds": round(taken, 1),
                        "of_copy": round(size / taken / speed, 3),
                    }
                )
                print(f"{shape!s:14} {qtype:7} {name:24} {taken:10.1f} us {size / taken / speed:6.2f}", flush=True)
    if arguments.output is not None:
        record = {"device": device, "torch": torch.__version__, "dtype": arguments.dtype, "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
