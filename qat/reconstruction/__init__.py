"""`reconstruct`: each block of a prepared model is trained to give what the float block gave, one after another.

A phase before end-to-end training. It needs no labels, and the gradients and optimizer state of one block only.
BRECQ (Li et al. 2021, https://arxiv.org/abs/2102.05426) introduced it. Training masters and ranges together is Block-AP
of EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062, section 3.2).

Blocks do not always chain: encoders feed decoders, and skip connections feed the second half of a U. So nothing is
assumed. For each block the model runs up to it, and hooks record how the block is called. That costs two forwards of
the model for each block and batch. Records wait on the CPU, and so do the float weights of the blocks that are done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qat.adapters import without_peft
from qat.blocks import find_blocks
from qat.data import list_batches
from qat.errors import CalibrationError, SpecError, StateError, TrainingError, listed, meant, shown
from qat.hosts import inner_models
from qat.layers import Mode, QuantizedLayer, quantized_layers
from qat.optimizers import no_training
from qat.preparation import parameter_groups, prepared_as
from qat.probing import compiled_parts, kept_modes, seeded, several_processes
from qat.progress import counted
from qat.reconstruction.recording import Call, Recorder, with_inputs
from qat.runs import note_runs, runs, stop_watch

__all__ = ["BlockReport", "ReconstructionReport", "reconstruct"]

logger = logging.getLogger("qat")

Inputs = Literal["quantized", "float"]
Kept = list[tuple[nn.Parameter, Tensor]]
"""Parameters, each with a value on the CPU."""


@dataclass(frozen=True)
class BlockReport:
    """What reconstruction did to one block. Errors are squared errors of outputs, relative to the float outputs."""

    before: float
    after: float
    """As trained, also where the block was restored."""
    calls: int
    """How often the batches call it."""

    @property
    def restored(self) -> bool:
        """Whether training made it worse, so that it is as it was."""
        return self.after > self.before


@dataclass(frozen=True)
class ReconstructionReport:
    """What reconstruction did; prints as a summary, `table` as a line for each block."""

    batches: int
    blocks: dict[str, BlockReport]
    """In the order in which the model runs them."""

    @property
    def restored(self) -> tuple[str, ...]:
        """The blocks that training made worse, so that they are as they were."""
        return tuple(name for name, block in self.blocks.items() if block.restored)

    def __str__(self) -> str:
        found = self.blocks.values()
        before = sum(block.before for block in found) / len(found)
        after = sum(min(block.before, block.after) for block in found) / len(found)
        restored = f"; {len(self.restored)} got worse and are as they were" if self.restored else ""
        return (
            f"reconstructed {len(found)} blocks on {self.batches} batches: "
            f"mean error {before:.3g} -> {after:.3g}{restored}"
        )

    def table(self) -> str:
        """A line for each block: its error before and after."""
        width = max(map(len, self.blocks))
        lines = [f"{'block':{width}}  {'before':>9}  {'after':>9}  calls"]
        for name, block in self.blocks.items():
            note = "  worse, restored" if block.restored else ""
            lines.append(f"{name:{width}}  {block.before:9.3g}  {block.after:9.3g}  {block.calls:5}{note}")
        return "\n".join(lines)


def reconstruct(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 200,
    lr: float = 1e-4,
    scale_lr: float | None = None,
    inputs: Inputs = "quantized",
    vectors: bool = True,
    blocks: Sequence[str] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ReconstructionReport:
    """Train each block of a prepared model to give its float output. In place; in evaluation mode, so without dropout.

    The loss is the squared error of the block's outputs, relative to the squares of the float outputs, by AdamW with a
    cosine to zero. It counts the first tensor that a block returns, and others with as many features. Quantized weights
    and learned scales of the block move, and its vectors; everything outside the blocks stays. A block that got worse
    is put back. Train end to end afterwards.

    Args:
        model: a prepared model, with calibrated activations if it quantizes them. Its weights are still the float ones.
        batches: as for `qat.calibrate`. All of them are kept, and each block sees them over and over.
        steps: optimizer steps a block, each on one recorded call.
        lr: learning rate of the weights and vectors.
        scale_lr: learning rate of learned scales; default a tenth of ``lr``.
        inputs: what a block trains on: ``"quantized"`` outputs of the blocks before it, so that it mends their errors
            too, or ``"float"`` ones.
        vectors: train norms and biases of a block too.
        blocks: full names of the modules to train; default what the library finds: children of outermost lists.
        forward: runs the model once for a batch, as for `qat.calibrate`. Random numbers in it are the same in each run.
        seed: of the order of the calls, and of random numbers in forwards.
        progress: show a bar on the standard error stream, which counts blocks.

    Raises:
        StateError: the model was not prepared, is frozen, compiled, has float16 parameters to train, or one of several
            processes holds it.
        SpecError: an argument is unfit; there are no blocks, or one has nothing to train, or lies inside another.
        CalibrationError: there are no batches, the model cannot run one, no batch reaches a block, a block gives inf or
            NaN, or is called in other ways once it is quantized. Blocks before that one keep what they learned.
        TrainingError: training a block ended in inf or NaN; it is as it was, and blocks before keep what they learned.

    >>> from qat import LearnedAffine, QuantSpec, prepare
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)))
    >>> _ = prepare(model, QuantSpec(weights="int2"), algorithm=LearnedAffine())
    >>> report = reconstruct(model, [torch.randn(32, 64) for _ in range(4)], steps=20, lr=1e-3)
    >>> [block.after < block.before for block in report.blocks.values()]
    [True, True]
    """
    model = without_peft(model)
    prepared_as(model)
    kept = _checked(batches, steps, lr, scale_lr, inputs, seed)
    named = _named_blocks(model, blocks)
    groups = {name: _groups(model, name, block, lr, scale_lr, vectors) for name, block in named.items()}
    _require_one_process(model)
    layers = [layer for _, layer in quantized_layers(model)]
    if not all(layer.masters(layer) for layer in layers):
        raise StateError("model: has codes only, and no float weights to train: call qat.reconstruct before fix_codes")
    if half := [name for name, p in model.named_parameters() if p.dtype is torch.float16 and p.requires_grad]:
        raise StateError(
            f"model: {half[0]} is float16, in which AdamW's squares vanish and steps are NaN: convert the model to "
            "float32 or bfloat16"
        )
    if any(layer.weight_quantizer.compensated for layer in layers):
        raise StateError(
            "model: its start (gptq or best) has changed the float weights that blocks are to follow: prepare it with "
            "start='output' or 'clip'"
        )
    for layer in layers:
        for quantizer in layer.activation_quantizers():
            quantizer.require_scale()
    recorder = Recorder(model, kept, forward, seed)
    found: dict[str, BlockReport] = {}
    before: Kept = []  # of the blocks that are done
    with ExitStack() as stack:
        for manager in (kept_modes(model), no_training(model), torch.inference_mode(False), seeded(seed)):
            stack.enter_context(manager)
        stack.callback(note_runs, model, runs(model))  # what is run here is not how the model will be served
        for layer in layers:
            for key in ("mode", "reached", "trained"):
                stack.callback(setattr, layer, key, getattr(layer, key))
        for _, inner, host in inner_models(model):
            stack.enter_context(host.without_cache(inner))
        stack.callback(stop_watch)  # which an interrupt may have left
        model.eval()
        with _as_float(layers, []):
            order = recorder.count(named)
        for name in counted(order, "reconstructing blocks", progress, len(order)):
            block = named[name]
            with _as_float(layers, before):
                calls = recorder.record(name, block)
            if inputs == "quantized":
                calls = with_inputs(name, calls, recorder.record(name, block))
            with torch.enable_grad():
                found[name], own = _reconstruct(name, block, groups[name], calls, steps)
            before += own
    report = ReconstructionReport(len(kept), found)
    if report.restored:
        logger.warning("%d blocks got worse and are as they were: %s", len(report.restored), listed(report.restored, 4))
    return report


def _checked(
    batches: Iterable[Any], steps: int, lr: float, scale_lr: float | None, inputs: Inputs, seed: int
) -> list[Any]:
    """The batches; raise where an argument is unfit."""
    for name, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SpecError(f"{name}: must be a whole number of at least {least}, got {shown(value)}")
    for name, rate in (("lr", lr), ("scale_lr", lr if scale_lr is None else scale_lr)):
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise SpecError(f"{name}: must be a number above 0, such as 1e-4, got {shown(rate)}")
    if inputs not in get_args(Inputs):
        raise SpecError(
            f"inputs: must be one of {get_args(Inputs)}, got {shown(inputs)}{meant(inputs, get_args(Inputs))}"
        )
    return list_batches(batches, "reconstruction")


def _require_one_process(model: nn.Module) -> None:
    if several_processes():
        raise StateError(
            "model: each process would train blocks of its own: call qat.reconstruct in one process, save "
            "model.state_dict(), and load it into the prepared model of each process"
        )
    if parts := compiled_parts(model):
        raise StateError(
            f"model: {parts[0].rstrip('.') or type(model).__name__} is compiled, and hooks cannot see into it: compile "
            "after qat.reconstruct"
        )


def _named_blocks(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    if names is None:
        found = {n: block for n, block in find_blocks(model).items() if any(quantized_layers(block))}
        if not found:
            raise SpecError("model: none of its blocks has a quantized layer: name modules that have, as blocks=")
        return found
    if isinstance(names, str) or not names:
        raise SpecError(f"blocks: must be a list of names of modules, got {shown(names)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules or not any(quantized_layers(modules[name])):
            raise SpecError(
                f"blocks: {shown(name)} is no module of the model with a quantized layer: take names from "
                "model.named_modules()"
            )
        if outer := [other for other in names if other != name and f"{name}.".startswith(f"{other}.")]:
            raise SpecError(f"blocks: {name!r} lies inside {outer[0]!r}: name one of them")
    return {name: modules[name] for name in names}


def _groups(
    model: nn.Module, name: str, block: nn.Module, lr: float, scale_lr: float | None, vectors: bool
) -> list[dict[str, Any]]:
    """Optimizer groups of what a block trains: nothing that other parts of the model use too."""
    layers = [layer for _, layer in quantized_layers(block)]
    masters = {id(p) for layer in layers for p in layer.masters(layer).values()}
    outside = {id(p) for _, module in model.named_modules(memo={block}) for p in module._parameters.values()}
    groups = []
    for group in parameter_groups(block, lr, scale_lr):
        own = [p for p in group["params"] if id(p) not in outside]
        if group["name"] == "weights":
            own = [p for p in own if id(p) in masters]
        if own and (vectors or group["name"] != "vectors"):
            groups.append(group | {"params": own})
    if not groups:
        raise SpecError(
            f"blocks: {name!r} has nothing to train: no parameter of its quantized layers requires a gradient and "
            "belongs to this block alone: leave it out of blocks="
        )
    return groups


def _reconstruct(
    name: str,
    block: nn.Module,
    groups: list[dict[str, Any]],
    recorded: list[list[Call]],
    steps: int,
) -> tuple[BlockReport, Kept]:
    """Train one block; its report, and its parameters as they were before."""
    calls = [call for batch in recorded for call in batch]
    before = _mean_error(block, calls)
    if not math.isfinite(before):
        raise CalibrationError(f"batches: block {name!r} gives inf or NaN: check the batches and the model")
    kept = _values([p for group in groups for p in group["params"]])
    try:
        _train(block, groups, calls, steps)
        after = _mean_error(block, calls)
        if not math.isfinite(after):
            raise TrainingError(
                f"lr: training block {name!r} ended in inf or NaN; it is as it was: lower lr or scale_lr"
            )
    except BaseException:
        _set(kept)
        raise
    report = BlockReport(before, after, len(calls))
    if report.restored:
        _set(kept)
    logger.info("block %s: error %.3g -> %.3g", name, before, after)
    return report, kept


def _train(block: nn.Module, groups: list[dict[str, Any]], calls: list[Call], steps: int) -> None:
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gradients = [p.grad for p in parameters]
    order: list[int] = []
    try:
        for _ in range(steps):
            order = order or torch.randperm(len(calls)).tolist()
            error = calls[order.pop()].error(block)
            for p, grad in zip(parameters, torch.autograd.grad(error, parameters, allow_unused=True), strict=True):
                p.grad = grad
            optimizer.step()
            rate.step()
    finally:
        for p, grad in zip(parameters, gradients, strict=True):
            p.grad = grad


@torch.no_grad()
def _mean_error(block: nn.Module, calls: list[Call]) -> float:
    return float(torch.stack([call.error(block) for call in calls]).mean())


def _values(parameters: Iterable[nn.Parameter]) -> Kept:
    return [(p, p.detach().to("cpu", copy=True)) for p in parameters]


@torch.no_grad()
def _set(values: Kept) -> None:
    for parameter, value in values:
        parameter.copy_(value)


@contextmanager
def _as_float(layers: list[QuantizedLayer], before: Kept) -> Iterator[None]:
    """The model as it was before: layers compute in float, with the weights that they had."""
    trained = _values(p for p, _ in before)
    for layer in layers:
        layer.mode = Mode(weights=False, activations=False)
    _set(before)
    try:
        yield
    finally:
        _set(trained)
        for layer in layers:
            layer.mode = Mode()
