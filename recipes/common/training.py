"""A fit with the configured trainer, and what comes before and after it: batches, calibration, freezing."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

import qat
from qat.blocks import find_blocks
from qat.calibration import calibrate_parts
from qat.distributed import sharded, unshard
from qat.layers import quantized_layers
from qat.preparation import prepared_as
from qat.starting import awaiting
from qat.training.task import QuantizedTask, Task
from recipes.common.batches import FitBatches, TrainingBatches
from recipes.common.callbacks import StepProgress, averages
from recipes.common.config import ConfigError
from recipes.common.logs import logger_of
from recipes.common.progress import stage
from recipes.common.settings import FSDP2, OptimizationSettings, TrainerSettings
from recipes.data.tensors import move
from recipes.tasks import Batch

__all__ = [
    "FitSettings",
    "calibrate",
    "calibrate_and_freeze",
    "device_of",
    "fit",
    "quantized_copy",
    "require_teacher",
]

logger = logging.getLogger("qat")
_LOGGED = 500  # rows of a log, about


@dataclass(frozen=True)
class FitSettings:
    """What all fits of a run have in common."""

    optimization: OptimizationSettings
    """Steps, scales, decay, warm-up, clipping."""
    trainer: TrainerSettings
    """What Lightning is told."""
    seed: int
    """What is drawn before the first batch; the order of the batches and their noise have a seed of their own."""
    logs: Path | None = None
    """The folder of the run's logs; none: nothing is logged."""


def require_teacher(
    model: nn.Module,
    teacher: nn.Module | qat.CachedLogits | None,
    distillation: qat.Distillation,
    task: Any = None,
    batches: TrainingBatches | None = None,
) -> None:
    """Check that a teacher can teach what is compared, before anything is trained.

    Args:
        model: the student, float.
        teacher: none: nothing is checked, as where the distillation has no weight.
        distillation: what is compared.
        task: says what the model is called with, and which outputs are compared.
        batches: to train on. A cache must hold all rows of a first batch. Two examples are compared, but for attention
            maps, which the fit alone lets models return. None: what needs no batch is checked.

    Raises:
        ConfigError: the teacher is a cache, and an option asks for more than it holds.
        TrainingError: as `qat.Distiller`, for what else does not fit.
    """
    if teacher is None or not distillation.weight:
        return
    if isinstance(teacher, qat.CachedLogits) and distillation.loss != "squared":
        wanted = {"hidden_states": 0, "attention_maps": 0, "temperature": 1}
        unfit = {name: value for name, value in wanted.items() if getattr(distillation, name) != value}
        if unfit:
            options = (f"--optimization.distillation.{name.replace('_', '-')} {value}" for name, value in unfit.items())
            raise ConfigError(
                f"teacher: the cache {str(teacher.directory)!r} holds logits at temperature 1 alone, so "
                f"{' and '.join(unfit)} cannot be compared: pass {' '.join(options)}, or the teacher's model"
            )
    distiller = qat.Distiller(model, teacher, distillation)
    if batches is None:
        return
    distiller.distillation = distillation.model_copy(update={"attention_maps": 0.0})
    collate: Any = batches.collate_fn
    examples = [batches.dataset[index] for index in range(batches.batch_size)]
    if isinstance(teacher, qat.CachedLogits):
        teacher(task.inputs(collate(examples)))
    few = collate(examples[:2])
    with torch.no_grad():
        distiller(task.inputs(few), lambda outputs: task.predictions(outputs, few))


def fit(
    name: str,
    model: nn.Module,
    task: Task,
    batches: TrainingBatches,
    *,
    learning_rate: float,
    settings: FitSettings,
    callbacks: Sequence[lightning.Callback] = (),
    teacher: nn.Module | qat.CachedLogits | None = None,
    resume: Path | None = None,
) -> lightning.Trainer:
    """Train a model in place.

    A fit that goes on from a checkpoint ends with the weights of one without a break, bit for bit on a CPU.

    Args:
        name: what the progress bar says.
        model: float; a `qat.QuantizationAwareTraining` among the callbacks prepares it.
        task: loss and metrics.
        batches: to train on; each process takes its own of them.
        learning_rate: the peak rate of the weights.
        settings: what all fits of a run have in common.
        callbacks: Lightning's; checkpoints are written only when one of them does.
        teacher: what to distil from, where the settings give distillation a weight.
        resume: a checkpoint to go on from; only tensors and plain data are read from it.

    Returns:
        The trainer, which knows whether this process is the one that goes on alone.

    Raises:
        TrainingError: the loss became non-finite, or the data ended before all steps were done.
    """
    optimization, count = settings.optimization, settings.optimization.steps * settings.trainer.accumulate_grad_batches
    teacher = teacher if optimization.distillation.weight > 0 else None
    lightning.seed_everything(settings.seed, verbose=False)
    model.train()
    if settings.trainer.gradient_checkpointing:
        _checkpoint_activations(model)
    shards, compiled = settings.trainer.strategy == FSDP2, settings.trainer.compile
    trained: Any = torch.compile(model) if compiled and not shards else model
    module = (_ShardedTask if shards else QuantizedTask)(
        trained,
        task,
        learning_rate=learning_rate,
        scale_learning_rate=optimization.scale_learning_rate,
        weight_decay=optimization.weight_decay,
        warmup_steps=optimization.warmup_steps,
        decay=optimization.decay,
        teacher=teacher,
        distillation=None if teacher is None else optimization.distillation,
    )
    if isinstance(module, _ShardedTask):
        module.compiles_blocks = compiled
    average = averages(optimization, callbacks)
    trainer = _trainer(
        settings.trainer,
        lambda: logger_of(settings.trainer.logger, settings.logs, name, resume),
        log_every_n_steps=max(1, optimization.steps // _LOGGED),
        max_steps=optimization.steps,
        max_epochs=-1,
        # No epoch is longer than the fit, so that the last step also ends one.
        limit_train_batches=count,
        gradient_clip_val=optimization.gradient_clip,
        callbacks=[StepProgress(name), *callbacks, *average],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    maps = teacher is not None and optimization.distillation.attention_maps > 0
    with _attention_maps(model, teacher) if maps else nullcontext(), _without_cache(model):
        shared = FitBatches(batches, trainer, count)
        trainer.fit(module, shared, ckpt_path=None if resume is None else str(resume), weights_only=True)
    if shards:
        unshard(model)
        if not [*quantized_layers(model)]:
            _uncompile(model)  # a prepared one stays compiled until it is frozen, since nobody saw its layers run
    if shared.resumed_at_end:
        for callback in average:  # the average takes the place of the weights in a hook that a fit without steps skips
            callback.on_train_end(trainer, module)
    if trainer.global_step < optimization.steps:
        raise qat.TrainingError(
            f"optimization.steps: {name} ended after {trainer.global_step} of {optimization.steps} steps: give every "
            "process at least one whole batch (more data, or a smaller batch_size)"
        )
    return trainer


class _ShardedTask(QuantizedTask):
    """One whose model is sharded where training begins, after the callback has prepared it."""

    compiles_blocks = False
    """Compile block by block, as what gathers shards stays outside compiled code."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not sharded(self.model):
            qat.shard(self.model, self.device_mesh)
            for block in find_blocks(self.model).values() if self.compiles_blocks else ():
                block.compile()


class _Sharding(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks; checkpoints are single files, as those of other strategies."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def calibrate(model: nn.Module, batches: Iterable[Batch], device: torch.device, *, starts: bool = True) -> None:
    """Calibrate with batches that lie elsewhere, on a device, where the model then stays.

    Without ``starts``, weights whose start needs data go on waiting for it.
    """
    calibrate_parts(model.to(device), (move(batch, device) for batch in batches), starts=starts)


def calibrate_and_freeze(model: nn.Module, batches: Iterable[Batch], count: int, device: torch.device) -> None:
    """Calibrate with ``count`` batches, on the device of this process, then freeze on the CPU.

    The model is frozen for the target that it was prepared for. Batches may be nested; they are what the model is
    called with. Several processes compare their activation ranges, and the backend of GPUs moves no tensor that lies on
    the CPU.
    """
    with stage("calibrating and freezing" if _needs_batches(model) else "freezing"):
        if count:
            calibrate(model, itertools.islice(batches, count), device)
        qat.freeze(model.cpu())
        _uncompile(model)


def _uncompile(model: nn.Module) -> None:
    for module in model.modules():
        module._compiled_call_impl = None


def quantized_copy(
    model: nn.Module, batches: Iterable[Batch], count: int, device: torch.device, *, later: bool, **prepared_for: Any
) -> nn.Module:
    """Prepare a float model for training, and return a frozen copy: what quantization without training gives.

    Both are calibrated, on the same batches: once, since starts take long to find.

    Args:
        model: float; prepared and calibrated in place, and left on the CPU.
        batches: what the model is called with; they may be nested.
        count: how many calibrate.
        device: where, as for `calibrate_and_freeze`.
        later: whether the model trains before its weights begin to quantize: then they get their start in the fit.
        prepared_for: arguments of `qat.prepare`.
    """
    qat.prepare(model, **prepared_for)
    for note in prepared_as(model).notes:
        logger.warning("%s", note)
    needed = _needs_batches(model)
    kept = list(itertools.islice(batches, count)) if needed else []
    if needed and len(kept) < count:
        logger.warning(
            "schedule.calibration_batches: asks for %s, and a pass over the data has %s, which calibrate",
            count,
            len(kept),
        )
    with stage("calibrating and freezing" if needed else "freezing"):
        quantized = copy.deepcopy(model) if later else model
        if kept:
            calibrate(quantized, kept, device)
        if not later:
            quantized = copy.deepcopy(model.cpu())
        elif kept:
            calibrate(model, kept, device, starts=False)
        model.cpu()
        qat.freeze(quantized.cpu())
    return quantized


def _needs_batches(model: nn.Module) -> bool:
    return bool(awaiting(model)) or any(layer.input_quantizer is not None for _, layer in quantized_layers(model))


@contextmanager
def _attention_maps(*models: Any) -> Iterator[None]:
    """Let models of transformers compute attention in the form that returns its probabilities."""
    if not all(hasattr(model, "set_attn_implementation") for model in models):
        names = ", ".join(type(model).__name__ for model in models)
        raise ConfigError(f"optimization.distillation.attention_maps: no model of transformers: {names}: set it to 0")
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.set_attn_implementation("eager")
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Let a model of transformers keep no keys and values, which training never reads and compiling stumbles over."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        yield
        return
    try:
        config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        config.use_cache = before  # type: ignore[union-attr]


def _checkpoint_activations(model: nn.Module) -> None:
    enable: Any = getattr(model, "enable_gradient_checkpointing", None)
    if enable is not None:  # of diffusers; never reentrant
        enable()
        return
    # Renamed within transformers 5; the old name warns in the releases that have the new one.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def _trainer(
    settings: TrainerSettings, logger_made: Callable[[], Any] = lambda: None, **options: Any
) -> lightning.Trainer:
    """Make a trainer that says nothing, or say in one line why the settings do not allow one."""
    ours = {"gradient_checkpointing", "compile", "checkpoint_every", "keep_checkpoints", "logger"}
    lightnings = settings.model_dump(exclude=ours)
    if settings.strategy == FSDP2:
        lightnings["strategy"] = _Sharding()
    try:
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        return lightning.Trainer(logger=logger_made() or False, **quiet, **options, **lightnings)
    except Exception as error:  # what Lightning, its plug-ins and absent packages raise has no common base
        lightnings["logger"] = settings.logger
        given = ", ".join(f"{name}={value!r}" for name, value in lightnings.items())
        raise ConfigError(
            f"trainer: Lightning cannot train with {given}: {' '.join(str(error).split())}; change these settings"
        ) from error


def device_of(settings: TrainerSettings) -> torch.device:
    """Where this process trains, and therefore calibrates and judges (Lightning hands models back on the CPU).

    Raises:
        ConfigError: nothing here can train with these settings; called first, this comes before any work.
    """
    strategy: Any = _trainer(settings, enable_checkpointing=False).strategy
    alone = isinstance(getattr(strategy, "cluster_environment", None), LightningEnvironment)
    if settings.num_nodes > 1 and alone and "MASTER_ADDR" not in os.environ:  # it would wait for the other nodes
        raise ConfigError(
            f"trainer.num_nodes: {settings.num_nodes} nodes need a launcher that starts the run on each: use torchrun "
            "or SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    device: torch.device = strategy.root_device
    if device.type == "cpu" and settings.precision == "16-mixed":  # of which Lightning makes bf16-mixed
        raise ConfigError("trainer.precision: '16-mixed' needs a GPU, and this process has a CPU: use 'bf16-mixed'")
    return device if device.type == "cuda" else torch.device("cpu")
