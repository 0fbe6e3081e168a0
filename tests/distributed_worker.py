"""What each rank of `test_distributed` runs, started by torchrun: it writes what it found into ``DIRECTORY``.

    torchrun --nproc-per-node 2 -m tests.distributed_worker DIRECTORY

References are trained before there is a process group, on rank 0 alone.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import qat
from qat.distributed import gather, unshard
from qat.layers import quantized_layers
from qat.tensors import is_sharded, whole

STEPS, TRANSFORMERS = 3, "transformers"
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def llama() -> Any:
    """Two blocks, whose units two ranks share; of the 65 rows of the embedding they cannot have equal parts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=65, num_key_value_heads=1, tie_word_embeddings=True, **sizes))


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=65, num_key_value_heads=1, num_local_experts=3, **sizes))


INT4 = qat.QuantSpec(weights="int4", dtype="float32")
INT8 = qat.QuantSpec(weights="int8", dtype="float32")
W8A8 = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
CASES: dict[str, tuple[qat.QuantSpec, qat.Algorithm]] = {
    "straight-int8": (INT8, qat.StraightThrough()),
    "straight-int4": (INT4, qat.StraightThrough()),
    "learned-int4": (INT4, qat.LearnedAffine(start="gptq")),
    "w8a8": (W8A8, qat.LearnedAffine(learn_activations=True)),
}
TABLES = qat.QuantSpec(weights="int8", dtype="float32", include=("*proj", "*embed_tokens", "lm_head"))
MORE = {"tied": (TABLES, qat.LearnedAffine(start="minmax")), "experts": (INT4, qat.LearnedAffine(start="minmax"))}
"""Cases that are trained from shards alone."""
BATCHES = torch.randint(65, (STEPS, 2, 2, 16), generator=torch.Generator().manual_seed(1))  # one a step and rank


def prepared(name: str, *, dtype: torch.dtype = torch.float32, serving: str = "float32", to: str = TRANSFORMERS) -> Any:
    spec, algorithm = (CASES | MORE)[name]
    model = (mixtral if name == "experts" else llama)().to(dtype).train()
    qat.prepare(model, spec.model_copy(update={"dtype": serving}), algorithm=algorithm, target=to)
    return model


def train(model: nn.Module, batches: Tensor, called: nn.Module | None = None) -> list[float]:
    """Losses of one rank, whose batches are ``(steps, rows, tokens)``."""
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-3, weight_decay=0.1))
    losses = []
    for x in batches:
        loss = (called or model)(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mean(losses: list[float]) -> list[float]:
    found = torch.tensor(losses, dtype=torch.float64)
    torch.distributed.all_reduce(found)
    return (found / torch.distributed.get_world_size()).tolist()  # type: ignore[no-any-return]


def whole_state(model: nn.Module) -> dict[str, Any]:
    return {key: whole(value).clone() for key, value in model.state_dict().items()}


@contextmanager
def poisoned(model: Any, rank: int) -> Iterator[None]:
    """Let the first block's input be inf on rank 1, in the second batch."""
    calls = itertools.count()

    def spoil(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        return y * torch.inf if rank and next(calls) else y

    handle = model.model.embed_tokens.register_forward_hook(spoil)
    yield
    handle.remove()


def told(action: Callable[[], Any]) -> str:
    try:
        action()
    except qat.QatError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sharded_by_user(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for block in (*model.model.layers, model):  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    return model


def run(directory: Path) -> dict[str, Any]:
    rank = int(torch.distributed.get_rank())
    mesh, most = init_device_mesh("cpu", (2,)), dict[str, int]()
    found: dict[str, Any] = {"most": most}

    def finish(name: str, model: nn.Module, state: Mapping[str, Any], **how: Any) -> None:
        """Freeze and export from shards, and on one process from the same state."""
        whole_at_once = []

        def gathering(layer: nn.Module, cast: dict[int, torch.dtype]) -> None:
            gather(layer, cast)
            masters = (p for _, one in quantized_layers(model) for p in one.masters(one).values())
            whole_at_once.append(len({id(p) for p in masters if not is_sharded(p)}))

        with unittest.mock.patch("qat.freezing.gather", gathering):
            qat.freeze(model)
        most[name] = max(whole_at_once)
        report = qat.export(model, directory / name)
        assert report.directory == directory / name
        assert (directory / name).is_dir()
        if rank == 0:
            single = prepared(name.partition("/")[0], **how)
            single.load_state_dict(state)
            qat.freeze(single)
            qat.export(single, directory / f"{name}-single")

    for name in CASES:
        model = prepared(name)
        qat.calibrate(model, list(BATCHES[:, rank]))
        found[f"{name}/ddp"] = mean(train(model, BATCHES[:, rank], DistributedDataParallel(model)))
        model = prepared(name)
        qat.shard(model, mesh)
        qat.calibrate(model, list(BATCHES[:, rank]))
        found[f"{name}/fsdp2"] = mean(train(model, BATCHES[:, rank]))
        with torch.no_grad():
            model(BATCHES[0, rank])  # leaves the rest and the ranges gathered
        finish(f"{name}/fsdp2", model, whole_state(model))

    for name in MORE:
        model = prepared(name)
        qat.shard(model, mesh)
        train(model, BATCHES[:, rank])
        finish(f"{name}/fsdp2", model, whole_state(model))

    model = prepared("learned-int4", serving="bfloat16")
    qat.shard(model, mesh, mp_policy=BFLOAT16)
    found["policy"] = mean(train(model, BATCHES[:, rank]))
    state = whole_state(model)
    with torch.no_grad():
        model.eval()(BATCHES[0, rank])
    finish("learned-int4/policy", model, state, dtype=torch.bfloat16, serving="bfloat16")
    if rank == 0:
        masters = prepared("learned-int4", serving="bfloat16")
        masters.load_state_dict(state)
        qat.freeze(masters)
        qat.export(masters, directory / "learned-int4" / "masters")

    within = {"shard_placement_fn": lambda p: Shard(p.ndim - 1) if p.shape[-1] % 2 == 0 else Shard(0)}
    model = sharded_by_user(prepared("straight-int4"), mesh, **within)
    found["straight-int4/within-groups"] = mean(train(model, BATCHES[:, rank]))
    finish("straight-int4/within-groups", model, whole_state(model))
    found["lightning"] = lightning(directory)
    found["skipped"] = {
        name: fitted(directory / f"skipped-{name}", strategy, 1, "skip").sums
        for name, strategy in (("ddp", DDPStrategy()), ("fsdp2", sharding()))
    }
    found["refused"] = refusals(rank, mesh, directory)
    return found


class Tuned(LightningModule):
    """Any module of a user, but that it shards where the strategy has a mesh."""

    def __init__(self, poisoned: int | None = None) -> None:
        super().__init__()
        self.model, self.poisoned = llama(), poisoned
        self.losses: list[float] = []
        self.sums: list[float] = []  # of all weights that this rank holds, before each step

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            qat.shard(self.model, self.device_mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.sums.append(sum(float(getattr(p, "to_local", lambda p=p: p)().sum()) for p in self.parameters()))
        if self.global_rank == self.poisoned:
            loss = loss * torch.nan
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(qat.parameter_groups(self, lr=1e-3, weight_decay=0.1))


def fitted(
    directory: Path, strategy: Any, poisoned: int | None = None, nonfinite: Any = "stop", **options: Any
) -> Tuned:
    """What Lightning trains in two epochs of two steps, with a checkpoint after each."""
    module = Tuned(poisoned)
    quantization = qat.QuantizationAwareTraining(
        INT4,
        qat.LearnedAffine(start="gptq"),
        qat.QuantizationSchedule(calibration_batches=2),
        target=TRANSFORMERS,
        model_inputs=lambda batch: {"input_ids": batch},
        guards=qat.NumericalGuards(nonfinite=nonfinite, degenerate="stop", every=2),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=4,
        gradient_clip_val=0.1,
        callbacks=[quantization, ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(BATCHES[:2].flatten(0, 2), batch_size=2), **options)
    return module


def sharding(*, parts: bool = True) -> ModelParallelStrategy:
    """Over both ranks; checkpoints are directories of ``parts``, or files of whole weights."""
    return ModelParallelStrategy(2, tensor_parallel_size=1, save_distributed_checkpoint=parts)


def lightning(directory: Path) -> dict[str, list[float]]:
    found = {"ddp": fitted(directory / "ddp-steps", DDPStrategy()).losses}
    for parts in (True, False):
        name = "parts" if parts else "file"
        steps = directory / f"{name}-steps"
        whole = fitted(steps, sharding(parts=parts))
        resumed = fitted(steps, sharding(parts=parts), ckpt_path=steps / "step=2.ckpt", weights_only=False)
        unshard(resumed.model)
        for module, kind in ((whole, "whole"), (resumed, "resumed")):
            found[f"{name}/{kind}"] = module.losses
            qat.freeze(module.model)
            if kind == "whole" or torch.distributed.get_rank() == 0:  # of whole weights each process exports its own
                qat.export(module.model, directory / "lightning" / f"{name}-{kind}")
    return found


def refusals(rank: int, mesh: DeviceMesh, directory: Path) -> dict[str, str]:
    found = {}
    x = BATCHES[0, rank]

    def learned() -> Any:
        return prepared("learned-int4")

    model = prepared("straight-int4")
    parallelize_module(model.model.layers[0], mesh, {"mlp.up_proj": ColwiseParallel()})
    found["tensor parallel"] = told(lambda: model(x))
    other = sharded_by_user(learned(), mesh, mp_policy=BFLOAT16)
    found["cast ranges"] = told(lambda: train(other, BATCHES[:1, rank]))
    shards: Any = prepared("w8a8")
    qat.shard(shards, mesh)
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found["a mesh"] = told(lambda: qat.shard(learned(), two))
    found["again"] = told(lambda: qat.shard(shards, mesh))
    found["fix_codes"] = told(lambda: qat.fix_codes(shards))
    found["prepare"] = told(lambda: qat.prepare(sharded_by_user(llama(), mesh), INT4))
    found["a part"] = told(lambda: qat.freeze(shards.model))
    found["a layer"] = told(lambda: shards.model.layers[0].mlp.up_proj(torch.ones(1, 128)))
    found["loss"] = told(lambda: fitted(directory / "none", sharding(), poisoned=1))
    found["counts"] = told(lambda: qat.calibrate(shards, [x] * (1 + rank)))
    found["batches"] = told(lambda: qat.calibrate(shards, (x if not rank else 1 / 0 for _ in range(2))))
    with poisoned(shards, rank):
        found["inf"] = told(lambda: qat.calibrate(shards, [x, x]))
    qat.calibrate(shards, [x])
    outputs = prepared("w8a8", to="quanto")
    qat.shard(outputs, mesh)
    found["outputs"] = told(lambda: qat.calibrate(outputs, [x]))
    if rank:
        with suppress(AttributeError):
            shards.model.layers[0].mlp.up_proj.weight_quantizer.final_codes = lambda _: 1 / 0
    found["freeze"] = told(lambda: qat.freeze(shards, allow_unreached=True))
    reads = learned()
    layer = reads.model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda _, __, y: y + 0 * layer.mlp.up_proj.weight.sum())
    qat.shard(reads, mesh)
    train(reads, BATCHES[:1, rank])
    found["reads"] = told(lambda: qat.freeze(reads))
    model = learned()
    qat.shard(model, mesh)
    qat.freeze(model)
    (directory / "taken").write_text("")
    found["export"] = told(lambda: qat.export(model, directory / "taken"))
    if rank == 0:
        qat.export(model, directory / "alone")  # others need not come
    return found


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    references = {}
    if os.environ["RANK"] == "0":
        for name in CASES:
            model = prepared(name)
            qat.calibrate(model, list(BATCHES.flatten(0, 1)))
            references[name] = train(model, BATCHES.flatten(1, 2))
    torch.distributed.init_process_group("gloo")
    try:
        found = {"references": references, **run(directory)}
        (directory / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
