"""An experiment: FSDP2 that gathers codes of int8 weights, one byte each, in place of bfloat16 masters.

`qat.shard` gathers masters, and each rank then quantizes whole weights. Here each rank quantizes its own rows before
the gather, by the extension points that ``fully_shard`` gives a tensor subclass (``fsdp_pre_all_gather``), and makes
values of the codes after it. So half as many bytes travel, and no weight is quantized twice. The model computes the
same function: the script compares losses with those of `qat.shard` (gradients of weights are summed in another order),
and times both beside plain FSDP2::

    torchrun --standalone --nproc-per-node 2 -m scripts.experiment_all_gather --out docs/results/all_gather.json

Only straight-through int8 weights do this, whose scale is that of a row, and only where ranks divide the rows evenly.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree

import qat
from qat import kernels
from qat.blocks import find_blocks
from qat.formats import QUANTO
from scripts.benchmark_speed import SHAPES
from scripts.distributed_check import TRIAL, Stepping, batches, prepared

ARMS = ("plain FSDP2", "straight int8", "codes gathered")
TURNS = 3


class GatheredAsCodes(torch.Tensor):
    """Rows of a float32 master, of which ``fully_shard`` gathers int8 codes and a scale each."""

    @staticmethod
    def __new__(cls, rows: Tensor) -> GatheredAsCodes:
        """Wrap a master."""
        return torch.Tensor._make_wrapper_subclass(
            cls, rows.size(), strides=rows.stride(), dtype=rows.dtype, device=rows.device
        )

    def __init__(self, rows: Tensor) -> None:
        """Keep the master."""
        self.rows = rows

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Every operation is one on the master; what it returns is wrapped where shards are cut and copied."""
        args, kwargs = pytree.tree_map_only(cls, lambda tensor: tensor.rows, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, cls, found) if func in _KEPT else found

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, policy: MixedPrecisionPolicy
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Codes and scales of these rows, as a layer finds them for the whole weight."""
        dtype = policy.param_dtype or self.dtype
        codes, scale, _ = kernels.quantize_own_range(
            self.rows.to(dtype), QUANTO.qtypes["int8"].key, torch.bfloat16, torch.int8
        )
        return (codes, scale), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole fake-quantized weight."""
        codes, scale = outputs
        value = kernels.dequantize(codes, scale, torch.bfloat16, dtype)
        if out is None:
            return value, (value,)
        with torch.autograd._unsafe_preserve_version_counter(out):  # type: ignore[attr-defined]
            out.data.copy_(value)
        return None


_KEPT = {
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten._to_copy.default,
}


def sharded(shape: dict[str, int], arm: str, device: str, mesh: Any) -> nn.Module:
    """The model of an arm, with float32 masters and a policy of bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if arm != "codes gathered":
        model: nn.Module = prepared(shape, arm, device, "bfloat16")
        qat.shard(model, mesh, mp_policy=policy)
        return model
    model = prepared(shape, "plain FSDP2", device)
    for module in [*model.modules()]:
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():  # type: ignore[operator]
            module.weight = nn.Parameter(GatheredAsCodes(module.weight.detach()))
    for unit in (*find_blocks(model).values(), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the rows go, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of an arm a turn")
    arguments = parser.parse_args()
    cuda, rank, ranks = arguments.device == "cuda", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    mesh, shape = init_device_mesh(arguments.device, (ranks,)), SHAPES[arguments.shape] if cuda else TRIAL
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for turn in range(TURNS):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            model = sharded(shape, arm, arguments.device, mesh)
            step, found = Stepping(model), []
            for number, x in enumerate(batches(shape, arguments.steps + 2, ranks, arguments.device)[:, rank]):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                found.append(step(x))
                if cuda:
                    torch.cuda.synchronize()
                if number >= 2:
                    seconds[arm].append(time.perf_counter() - start)
            losses[arm], peaks[arm] = found, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
            del model, step
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    if rank == 0:
        rows = [
            {
                "arm": arm,
                "ms": round(statistics.median(seconds[arm]) * 1e3, 2),
                "ratio": round(statistics.median(seconds[arm]) / statistics.median(seconds[ARMS[0]]), 4),
                "peak_gib": round(peaks[arm], 3),
                "losses": losses[arm],
            }
            for arm in ARMS
        ]
        name = torch.cuda.get_device_name() if cuda else "CPU"
        record = {"device": f"{ranks} x {name}", "torch": torch.__version__, "shape": arguments.shape, "rows": rows}
        record["differences"] = [abs(a / b - 1) for a, b in zip(losses[ARMS[2]], losses[ARMS[1]], strict=True)]
        print(json.dumps(record, indent=1))
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
