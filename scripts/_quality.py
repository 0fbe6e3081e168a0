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
from torch import Tensor, nn

import qat
from scripts._quality_problems import Problem

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
    """``task``, or ``kl`` to the fine-tuned float model."""
    hidden: float = 0.0
    """Weight of the relative squared error of the blocks' outputs."""
    tuned: bool = True
    """Begin with the fine-tuned float model; else with the float model."""
    scale_rate: float = 3.0
    """Rate of learned ranges relative to that of the weights."""
    decay: str = "cosine"
    fold: bool = False
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By type; else `RATES`."""


FLOAT_RATES = (1e-5, 3e-5, 1e-4)
RATES = {
    "int8": (1e-5, 3e-5, 1e-4),
    "float8": (1e-5, 3e-5, 1e-4),
    "int4": (5e-5, 1e-4, 2e-4),
    "int2": (3e-4, 5e-4, 1e-3),
}
_PLAIN = Arm(algorithm="straight_through", loss="task", tuned=False, decay="constant")
ARMS: dict[str, Arm] = {
    "quanto": dataclasses.replace(_PLAIN, prepare="quanto"),
    "quanto, kl": dataclasses.replace(_PLAIN, prepare="quanto", loss="kl", tuned=True, decay="cosine"),
    "torchao": dataclasses.replace(_PLAIN, prepare="torchao"),
    "torchao, kl": dataclasses.replace(_PLAIN, prepare="torchao", loss="kl", tuned=True, decay="cosine"),
    "straight-through": _PLAIN,
    "straight-through, kl": Arm(algorithm="straight_through"),
    "straight-through, kl, folded": Arm(algorithm="straight_through", fold=True),
    "straight-through, kl, learned scales": Arm(algorithm="straight_through", options={"learn_activations": True}),
    "straight-through, kl, hidden, folded": Arm(algorithm="straight_through", fold=True, hidden=1.0),
    "learned": Arm(),
    "learned, hidden": Arm(hidden=1.0),
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

    @property
    def spec(self) -> qat.QuantSpec:
        return qat.QuantSpec.model_validate(
            {"weights": self.weights, "activations": self.activations, "dtype": "bfloat16"}
        )


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: Iterator[Any],
    steps: int,
    decay: str,
    loss_of: Callable[[nn.Module, Any], Tensor],
) -> float:
    """Train for ``steps``; the rate warms up for a twentieth of them. Returns the last loss."""
    from math import cos, pi

    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        part = max(0.0, (step - warmup) / max(1, steps - warmup))
        return min(1.0, (step + 1) / warmup) * (1.0 if decay == "constant" else (1 + cos(pi * part)) / 2)

    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss = torch.zeros(())
    for batch in itertools.islice(batches, steps):
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return float(loss.detach())


def fine_tune(model: nn.Module, problem: Problem, steps: int, seed: int, rate: float, decay: str) -> nn.Module:
    """The float arm."""
    model.train()
    groups = [{"params": list(model.parameters()), "lr": rate}]
    fit(model, groups, problem.batches(seed), steps, decay, problem.task_loss)
    return model.eval()


def prepared(model: nn.Module, run: Run, arm: Arm, problem: Problem) -> tuple[nn.Module, list[dict[str, Any]]]:
    """``model`` with fake quantization in place, and the groups of its optimizer."""
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
        return model, [{"params": list(model.parameters()), "lr": run.rate}]
    if arm.prepare == "torchao":
        from scripts.benchmark_speed import arm_torchao

        arm_torchao(model, run.weights, "bfloat16")
        return model, [{"params": list(model.parameters()), "lr": run.rate}]
    kinds: dict[str, Any] = {"straight_through": qat.StraightThrough, "learned_affine": qat.LearnedAffine}
    inputs = [problem.inputs(batch) for batch in calibration]
    if arm.fold:
        qat.fold_outliers(model, inputs, spec=run.spec, target=problem.target)
    qat.prepare(model, run.spec, algorithm=kinds[arm.algorithm](**arm.options), target=problem.target)
    if run.activations:
        qat.calibrate(model, inputs)
    return model, qat.parameter_groups(model, lr=run.rate, scale_lr=arm.scale_rate * run.rate)


def distilled(teacher: nn.Module, hidden: float, problem: Problem) -> Callable[[nn.Module, Any], Tensor]:
    """KL to ``teacher``, and the relative squared error of what blocks give."""
    from qat.blocks import find_blocks

    def capture(model: nn.Module, kept: list[Tensor]) -> None:
        for block in find_blocks(model).values():
            block.register_forward_hook(
                lambda _, __, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
            )

    theirs: list[Tensor] = []
    mine: list[Tensor] = []
    hooked: list[nn.Module] = []
    if hidden:
        capture(teacher, theirs)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        if hidden and model not in hooked:
            capture(model, mine)
            hooked.append(model)
        mine.clear()
        theirs.clear()
        with torch.no_grad():
            goal = teacher(**problem.inputs(batch))
        loss = problem.divergence(model(**problem.inputs(batch)), goal)
        for one, other in zip(mine, theirs, strict=True):
            loss = loss + hidden / len(mine) * (one - other).square().mean() / other.square().mean()
        return loss

    return loss_of


def train(run: Run, problem: Problem, tuned: nn.Module) -> dict[str, Any]:
    """Train an arm, serve it, and judge it as served."""
    arm = ARMS[run.arm]
    torch.manual_seed(run.seed)
    model = copy.deepcopy(tuned if arm.tuned else problem.model)
    model, groups = prepared(model, run, arm, problem)
    model.train()
    teacher = copy.deepcopy(tuned).eval().requires_grad_(False)
    loss_of = problem.task_loss if arm.loss == "task" else distilled(teacher, arm.hidden, problem)
    last = fit(model, groups, problem.batches(run.seed), run.steps, arm.decay, loss_of)
    return served(model.eval(), arm, problem, tuned) | {"last": last}


def post_training(run: Run, problem: Problem, tuned: nn.Module) -> dict[str, Any]:
    """Quantize the fine-tuned model by the range that the arm's name says, without training."""
    start = run.arm.removeprefix("PTQ ")
    algorithm: Any = qat.StraightThrough() if start == "minmax" else qat.LearnedAffine.model_validate({"start": start})
    model = copy.deepcopy(tuned)
    qat.prepare(model, run.spec, algorithm=algorithm, target=problem.target)
    inputs = [problem.inputs(batch) for batch in itertools.islice(problem.batches(run.seed + 1000), 16)]
    if run.activations or start in ("best", "gptq", "output"):
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
