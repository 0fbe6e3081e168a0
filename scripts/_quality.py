"""The arms of `benchmark_quality`: how each makes, trains and serves a model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

import qat
from scripts._quality_problems import Problem
from scripts._quality_schedule import Average, schedule_of

__all__ = ["ARMS", "Arm", "Run", "evaluate", "post_training", "train"]


@dataclass(frozen=True)
class Arm:
    """How one row of the table trains."""

    prepare: str = "qat"
    """Whose fake quantization: qat, quanto, torchao."""
    algorithm: str = "learned_affine"
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the algorithm."""
    loss: str = "kl"
    """``task``, or what `qat.Distillation` calls the distance from the fine-tuned float model."""
    weight: float = 1.0
    """Share of the distance from that model."""
    hidden: float = 0.0
    """Weight of the relative squared error of the blocks' outputs."""
    tuned: bool = True
    """Begin with the fine-tuned float model; else with the float model."""
    scale_rate: float = 3.0
    """Rate of learned ranges relative to that of the weights."""
    decay: str = "cosine"
    fold: bool = False
    reconstruct: tuple[int, float] = (0, 0.0)
    """Steps of block-wise reconstruction a block before, and their rate relative to that of the weights."""
    cage: float = 0.0
    rank: int = 0
    """Of LoRA on every linear layer, which then trains alone; 0: all weights train."""
    afterwards: bool = False
    """Train in float, and quantize what came of it by ``best``."""
    schedule: dict[str, float] = field(default_factory=dict)
    """Arguments of `schedule_of`."""
    average: float = 0.0
    """Share of the steps at the end whose weights and ranges are averaged."""
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By type; else `RATES`."""


DATA = ("output", "gptq", "best")
FLOAT_RATES = (1e-5, 3e-5, 1e-4)
RATES = {
    "int8": (1e-5, 3e-5, 1e-4),
    "float8": (1e-5, 3e-5, 1e-4),
    "int4": (5e-5, 1e-4, 2e-4),
    "int2": (3e-4, 5e-4, 1e-3),
}
_PLAIN = Arm(
    algorithm="straight_through",
    loss="task",
    tuned=False,
    decay="constant",
    rates={"int4": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4), "int2": (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3)},
)
_PLAIN_KL = Arm(
    algorithm="straight_through",
    rates={"int4": (5e-5, 1e-4, 2e-4, 4e-4), "int2": (3e-4, 5e-4, 1e-3, 2e-3)},
)
_BEST = Arm(
    hidden=1.0, options={"start": "best"}, rates={"int4": (2e-5, 5e-5, 1e-4, 2e-4), "int2": (2e-4, 3e-4, 5e-4, 1e-3)}
)
# Adapters take about ten times the rate of weights; ranges keep the rate that they have beside weights.
_LORA = dataclasses.replace(_BEST, scale_rate=0.3, rates={"int4": (5e-5, 1e-4, 2e-4, 5e-4), "int2": (5e-4, 1e-3, 2e-3)})
ARMS: dict[str, Arm] = {
    "quanto": dataclasses.replace(_PLAIN, prepare="quanto"),
    "quanto, kl": dataclasses.replace(_PLAIN_KL, prepare="quanto"),
    "torchao": dataclasses.replace(_PLAIN, prepare="torchao"),
    "torchao, kl": dataclasses.replace(_PLAIN_KL, prepare="torchao"),
    "straight-through": _PLAIN,
    "straight-through, kl": _PLAIN_KL,
    "straight-through, kl, folded": Arm(algorithm="straight_through", fold=True),
    "straight-through, kl, learned scales": Arm(algorithm="straight_through", options={"learn_activations": True}),
    "straight-through, kl, hidden, folded": Arm(algorithm="straight_through", fold=True, hidden=1.0),
    "mixed, folded": Arm(algorithm="straight_through", fold=True, weight=0.5),
    "learned": Arm(),
    "learned, hidden": Arm(hidden=1.0),
    "best": _BEST,
    "gptq": Arm(hidden=1.0, options={"start": "gptq"}),
    "output": Arm(hidden=1.0, options={"start": "output"}),
    "hqq": Arm(hidden=1.0, options={"start": "hqq"}),
    "reconstructed 2": Arm(hidden=1.0, options={"start": "output"}, reconstruct=(2, 1.0)),
    "reconstructed 100": Arm(hidden=1.0, options={"start": "output"}, reconstruct=(100, 1.0)),
    "reconstructed 400": Arm(hidden=1.0, options={"start": "output"}, reconstruct=(400, 1.0)),
    "clip, reconstructed 400": Arm(hidden=1.0, reconstruct=(400, 1.0)),
    "best, scales x 1": Arm(hidden=1.0, options={"start": "best"}, scale_rate=1.0),
    "best, scales x 0.1": Arm(hidden=1.0, options={"start": "best"}, scale_rate=0.1),
    "best, hidden x 3": Arm(hidden=3.0, options={"start": "best"}),
    "best, hidden x 10": Arm(hidden=10.0, options={"start": "best"}),
    "best, hidden x 10, stable": Arm(hidden=10.0, options={"start": "best", "gradient": "stable"}),
    "best, hidden x 3, stable": Arm(hidden=3.0, options={"start": "best", "gradient": "stable"}),
    "best, stable": Arm(hidden=1.0, options={"start": "best", "gradient": "stable"}),
    "best, quest": Arm(hidden=1.0, options={"start": "best", "mask_margin": 0.5}),
    "dual": Arm(hidden=1.0, algorithm="dual_lsq"),
    "seq": Arm(hidden=1.0, algorithm="stretched_elastic"),
    "clipping": Arm(hidden=1.0, algorithm="learned_clipping"),
    "best, cage": Arm(hidden=1.0, options={"start": "best"}, cage=10.0),
    "best, mixed": Arm(hidden=1.0, options={"start": "best"}, weight=0.5),
    "best, labels": dataclasses.replace(_BEST, loss="task"),
    "best, kl alone": dataclasses.replace(_BEST, hidden=0.0),
    "best, reverse kl": dataclasses.replace(_BEST, loss="reverse_kl"),
    "best, both kl": dataclasses.replace(_BEST, loss="mixed_kl"),
    "best, float start": dataclasses.replace(_BEST, tuned=False),
    "best, constant rate": dataclasses.replace(_BEST, decay="constant"),
    "best, linear": dataclasses.replace(_BEST, decay="linear"),
    "best, delayed": dataclasses.replace(_BEST, schedule={"delay": 0.1}),
    "best, int4 first": dataclasses.replace(_BEST, schedule={"first": 0.25}),
    "best, held": dataclasses.replace(_BEST, schedule={"hold": 0.2}),
    "best, averaged": dataclasses.replace(_BEST, average=0.2),
    **{f"lora {rank}": dataclasses.replace(_LORA, rank=rank) for rank in (8, 16, 32, 64)},
    "lora 64, base kept": dataclasses.replace(_LORA, rank=64, options={"start": "output"}),
    "lora 16, then quantized": Arm(loss="task", tuned=False, rank=16, afterwards=True, rates=_LORA.rates),
}


@dataclass(frozen=True)
class Run:
    """One model to train or to quantize."""

    arm: str
    weights: str
    activations: str | None
    steps: int
    seed: int
    rate: float
    dtype: str = "bfloat16"
    """In which it is served and judged."""

    @property
    def spec(self) -> qat.QuantSpec:
        return qat.QuantSpec.model_validate(
            {"weights": self.weights, "activations": self.activations, "dtype": self.dtype}
        )


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: Iterator[Any],
    steps: int,
    decay: Any,
    loss_of: Callable[[nn.Module, Any], Tensor],
    training: qat.QuantizationSteps | None = None,
    average: float = 0.0,
) -> float:
    """Train for ``steps``, of which the last share ``average`` is averaged. Returns the last loss."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: qat.rate_factor(step, steps, decay=decay))
    loss = torch.zeros(())
    mean = Average(model, steps, average)
    if training is not None:
        training.begin([optimizer], steps=steps)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        if training is not None:
            training.before_step()
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if training is not None:
            training.after_step()
        mean.after(step)
        scheduler.step()
        optimizer.zero_grad()
    if training is not None:
        training.end()
    return float(loss.detach())


def fine_tune(model: nn.Module, problem: Problem, steps: int, seed: int, rate: float, decay: str) -> nn.Module:
    """The float arm."""
    model.train()
    groups = [{"params": list(model.parameters()), "lr": rate}]
    fit(model, groups, problem.batches(seed), steps, decay, problem.task_loss)
    return model.eval()


def made(arm: Arm) -> qat.Algorithm:
    """The algorithm of an arm."""
    found: qat.Algorithm = TypeAdapter(qat.AnyAlgorithm).validate_python({"kind": arm.algorithm, **arm.options})
    return found


def add_lora(model: nn.Module, rank: int) -> None:
    """Put adapters over all linear layers but the head, in place; nothing else trains."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=["lm_head"])
    inject_adapter_in_model(config, model)


def prepared(
    model: nn.Module, run: Run, arm: Arm, problem: Problem
) -> tuple[nn.Module, list[dict[str, Any]], qat.QuantizationSteps | None]:
    """``model`` with fake quantization in place, the groups of its optimizer, and what happens at some steps."""
    calibration = list(itertools.islice(problem.batches(run.seed + 1000), 16))
    if arm.prepare == "quanto":
        from optimum.quanto import Calibration, qtypes, quantize

        names = [{"float8": "qfloat8_e4m3fn"}.get(t, f"q{t}") for t in (run.weights, run.activations) if t]
        found = dict(zip(("weights", "activations"), (qtypes[name] for name in names), strict=False))
        quantize(model, **found, exclude=["lm_head", *problem.excluded])
        if run.activations:
            with torch.no_grad(), Calibration():
                for batch in calibration:
                    model(**problem.inputs(batch))
        return model, [{"params": list(model.parameters()), "lr": run.rate}], None
    if arm.prepare == "torchao":
        from scripts.benchmark_speed import arm_torchao

        arm_torchao(model, run.weights, "bfloat16")
        return model, [{"params": list(model.parameters()), "lr": run.rate}], None
    inputs = [problem.inputs(batch) for batch in calibration]
    if arm.rank:
        add_lora(model, arm.rank)
    if arm.afterwards:
        return model, qat.parameter_groups(model, lr=run.rate), None
    if arm.fold:
        qat.fold_outliers(model, inputs, spec=run.spec, target=problem.target)
    qat.prepare(model, run.spec, algorithm=made(arm), target=problem.target)
    needs_data = run.activations is not None or arm.options.get("start") in DATA
    steps, rate = arm.reconstruct
    if steps:
        if needs_data:
            qat.calibrate(model, inputs)
        rate *= run.rate
        qat.reconstruct(model, inputs, steps=steps, lr=rate, scale_lr=arm.scale_rate * rate, seed=run.seed)
    schedule = schedule_of(run.steps, arm.cage, **arm.schedule)
    training = qat.QuantizationSteps(model, schedule, inputs if needs_data else None)
    return model, qat.parameter_groups(model, lr=run.rate, scale_lr=arm.scale_rate * run.rate), training


def distilled(student: nn.Module, teacher: nn.Module, arm: Arm, problem: Problem) -> Callable[[nn.Module, Any], Tensor]:
    """The distance from ``teacher``, mixed with the task's own loss."""
    kind = "squared" if problem.target == "diffusers" else arm.loss
    how = qat.Distillation.model_validate({"loss": kind, "weight": arm.weight, "hidden_states": arm.hidden})
    distiller = qat.Distiller(student, teacher, how)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        outputs, distance = distiller(problem.inputs(batch), problem.compared)
        return distance if arm.weight == 1 else arm.weight * distance + (1 - arm.weight) * problem.loss(outputs, batch)

    return loss_of


def train(run: Run, problem: Problem, tuned: nn.Module) -> dict[str, Any]:
    """Train an arm, serve it, and judge it as served."""
    arm = ARMS[run.arm]
    torch.manual_seed(run.seed)
    model = copy.deepcopy(tuned if arm.tuned else problem.model)
    model, groups, training = prepared(model, run, arm, problem)
    model.train()
    teacher = copy.deepcopy(tuned).eval().requires_grad_(False)
    loss_of = problem.task_loss if arm.loss == "task" else distilled(model, teacher, arm, problem)
    last = fit(model, groups, problem.batches(run.seed), run.steps, arm.decay, loss_of, training, arm.average)
    if arm.afterwards:
        model.eval()
        qat.prepare(model, run.spec, algorithm=qat.LearnedAffine(start="best"), target=problem.target)
        qat.calibrate(
            model, [problem.inputs(batch) for batch in itertools.islice(problem.batches(run.seed + 1000), 16)]
        )
    return served(model.eval(), arm, problem, tuned) | {"last": last}


def post_training(run: Run, problem: Problem, tuned: nn.Module) -> dict[str, Any]:
    """Quantize the fine-tuned model by the range that the arm's name says, without training."""
    start = run.arm.removeprefix("PTQ ")
    algorithm: Any = qat.StraightThrough() if start == "minmax" else qat.LearnedAffine.model_validate({"start": start})
    model = copy.deepcopy(tuned)
    qat.prepare(model, run.spec, algorithm=algorithm, target=problem.target)
    inputs = [problem.inputs(batch) for batch in itertools.islice(problem.batches(run.seed + 1000), 16)]
    if run.activations or start in DATA:
        qat.calibrate(model, inputs)
    return served(model, Arm(), problem, tuned)


def served(model: nn.Module, arm: Arm, problem: Problem, tuned: nn.Module) -> dict[str, Any]:
    """Freeze, export and reload ``model``; judge what was reloaded, in bfloat16."""
    if arm.prepare == "quanto":
        from optimum.quanto import freeze

        model.to(torch.bfloat16)
        freeze(model)
    elif arm.prepare == "torchao":
        model.to(torch.bfloat16)  # fake-quantized: torchao's conversion has another format
    else:
        qat.freeze(model)
        with tempfile.TemporaryDirectory() as folder:
            qat.export(model, folder)
            model = qat.load(folder).to(problem.device)
    return evaluate(model, problem, tuned)


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem, tuned: nn.Module | None = None) -> dict[str, Any]:
    """The loss of each held-out batch; with a float model, KL to it and the share of other predictions."""
    losses, divergences, changed = [], [], []
    model.eval()
    for batch in problem.held_out:
        out = model(**problem.inputs(batch, torch.bfloat16))
        losses.append(float(problem.loss(out, batch)))
        if tuned is not None:
            goal = tuned(**problem.inputs(batch))
            divergences.append(float(problem.divergence(out, goal)))
            changed.append(float(problem.changed(out, goal)))
    found: dict[str, Any] = {"losses": losses, "loss": sum(losses) / len(losses)}
    if divergences:
        found |= {"kl": sum(divergences) / len(divergences), "changed": sum(changed) / len(changed)}
    return found
