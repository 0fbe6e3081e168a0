"""Faults that are put into a run are found and named by layer, each policy does what it says, and a resume goes on."""

from __future__ import annotations

import logging
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import qat
from qat.layers import quantized_layers
from qat.training.guards import Guard, NumericalGuards
from tests.distributed_worker import mixtral
from tests.training_modules import (
    INT4,
    INT8,
    INT8_INT8,
    ResumableLoader,
    Tiny,
    UserModule,
    assert_equal_state,
    inputs_of,
    loader,
    quantization,
    quiet_trainer,
)

EACH = NumericalGuards(every=1)
LEARNED = qat.LearnedAffine(start="minmax")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "qat" and record.levelno == logging.WARNING]


class At(Callback):
    """Does something to the module before the batch of one step, after the callback has begun it."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.action(pl_module, batch)


def fitted(directory: Path, *more: Callback, guards: NumericalGuards = EACH, **options: Any) -> UserModule:
    spec, algorithm = options.pop("spec", INT8), options.pop("algorithm", LEARNED)
    module = options.pop("module", None) or UserModule()
    batches = options.pop("batches", None) or loader()
    quiet_trainer(directory, quantization(spec, algorithm, guards=guards), *more, **options).fit(module, batches)
    return module


def fill(path: str, value: float, rows: slice = slice(None)) -> Any:
    """Fills a tensor of the model."""

    def action(module: Any, _: Any) -> None:
        tensor = dict([*module.model.named_parameters(), *module.model.named_buffers()])[path]
        (tensor.detach()[rows] if tensor.ndim else tensor).fill_(value)

    return action


def scaled(path: str, factor: float) -> Any:
    return lambda module, _: module.model.get_parameter(path).detach().mul_(factor)


def spoil(_: Any, batch: Any) -> None:
    batch[0][1] = math.nan


class Loop:
    """A prepared model whose layers are looked at after each of its forwards."""

    def __init__(
        self, spec: qat.QuantSpec = INT8, algorithm: qat.Algorithm = LEARNED, guards: NumericalGuards = EACH
    ) -> None:
        torch.manual_seed(1)
        self.user, self.steps, self.batch = UserModule(), 0, inputs_of(loader(1))[0]
        qat.prepare(self.user.model, spec, algorithm=algorithm)
        if spec.activations:
            qat.calibrate(self.user.model, inputs_of(loader()))
        self.guard = Guard(guards, self.user.model, lambda: self.steps)
        self.guard.begin()

    def step(self) -> dict[str, float]:
        self.guard.before_step()
        self.user.model(self.batch)
        self.steps += 1
        return self.guard.after_step()


FAULTS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "zero rows": (
        fill("first.weight", 0.0, slice(0, 16)),
        (INT8, qat.StraightThrough()),
        r"codes died, one or two are left in first \(in 50% of its groups\)",
    ),
    "scale 1e-30": (
        fill("second.weight_quantizer.high_start", 1e-30),
        (INT8,),
        r"scales collapsed in second \(100% of its groups\); .*values saturate in second",
    ),
    "denormal": (
        lambda *given: [
            fill(f"second.weight_quantizer.{end}_start", value)(*given)
            for end, value in (("low", -1e-40), ("high", 1e-40))
        ],
        (INT4,),
        r"scales collapsed in second \(100% of its groups\)",
    ),
    "small weights": (
        scaled("first.weight", 1e-12),
        (INT8, qat.StraightThrough()),
        r"scales collapsed in first \(to 2\^-40 of their start\)$",
    ),
    "large weights": (scaled("first.weight", 30), (INT8,), r"values saturate in first \(9\d% of them\)"),
    "activation scale 1e-30": (
        fill("first.input_quantizer.scale", 1e-30),
        (INT8_INT8,),
        r"scales collapsed in first input \(to 2\^-9\d of their start\); values saturate in first input",
    ),
    "activation scale 1e3": (
        fill("head.input_quantizer.scale", 1e3),
        (INT8_INT8,),
        r"codes died, the range is far too wide in head input \(0\.00% of it is used\)",
    ),
    "output scale 1e-6": (
        fill("first.output_quantizer.scale", 1e-6),
        (INT8_INT8,),
        r"values saturate in first output \(\d+% of them\)",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_degenerate_layers_are_named(what: str, caplog: pytest.LogCaptureFixture) -> None:
    action, options, message = FAULTS[what]
    loop = Loop(*options)
    loop.step()
    action(loop.user, None)
    loop.step()
    loop.step()
    (told,) = warnings(caplog)  # once
    assert told.startswith("by step 2, ")
    assert re.search(message, told), told


def test_scales_that_the_serving_dtype_cannot_hold_are_named_at_once(tmp_path: Path, caplog: Any) -> None:
    module = UserModule()
    module.model.second.weight.detach().mul_(1e-7)
    fitted(tmp_path, module=module, spec=INT8.model_copy(update={"dtype": "float16"}), algorithm=qat.StraightThrough())
    assert warnings(caplog)[0].startswith("by step 0, scales collapsed in second (100% of its groups)")


def test_degenerate_layers_stop_a_run_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fault = FAULTS["large weights"][0]
    with pytest.raises(
        qat.TrainingError, match=r"layers: by step 3, .*values saturate in first .*: lower the learning"
    ):
        fitted(tmp_path, At(2, fault), guards=NumericalGuards(degenerate="stop", every=3))
    loop = Loop(guards=NumericalGuards(degenerate="ignore", every=1))
    fault(loop.user, None)
    loop.step()
    assert not warnings(caplog)


@pytest.mark.parametrize("algorithm", [LEARNED, qat.StraightThrough(), qat.LearnedClipping(), qat.Automatic()])
@pytest.mark.parametrize("spec", [INT8_INT8, INT4, qat.QuantSpec(weights="int2"), qat.QuantSpec(weights="float8")])
def test_a_healthy_model_gives_no_warning(spec: Any, algorithm: Any, caplog: pytest.LogCaptureFixture) -> None:
    Loop(spec, algorithm).step()
    assert not warnings(caplog)


NONFINITE = {
    "NaN in the data": (spoil, r"loss: became nan at step 2; .*inf or NaN is in the batch; the weights and the last"),
    "inf in one weight": (  # a range that clips makes a number of it
        lambda module, _: module.model.second.weight.detach()[3, 4].fill_(math.inf),
        r"layers: by step 3, inf or NaN is in second \(6\.2% of its groups\)",
    ),
    "NaN in a float weight": (
        lambda module, _: module.model.norm.weight.detach()[3].fill_(math.nan),
        r"loss: became nan at step 2; inf or NaN is in model\.norm\.weight; the weights and",
    ),
    "NaN in a range": (
        fill("first.weight_quantizer.high_start", math.nan),
        r"loss: became nan at step 2; inf or NaN is in model\.first\.weight_quantizer\.high_start; the weights",
    ),
    "a gradient": (
        lambda module, _: module.model.second.weight.register_hook(lambda grad: grad * math.inf),
        r"gradient: is not finite at step 2; inf or NaN is in the gradients of model\.second\.weight; the weights",
    ),
    "a huge learning rate": (
        lambda module, _: module.optimizers().param_groups[0].update(lr=1e30),
        r"layers: by step 3, .*values saturate in first .*second .*head .*: lower the learning rate",
    ),
}


@pytest.mark.parametrize("what", NONFINITE)
def test_what_is_not_finite_is_named(what: str, tmp_path: Path) -> None:
    action, message = NONFINITE[what]
    with pytest.raises(qat.TrainingError, match=message):
        fitted(tmp_path, At(2, action), guards=NumericalGuards(degenerate="stop", every=3))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_skipped_step_changes_nothing_but_the_count(accumulated: int, tmp_path: Path, caplog: Any) -> None:
    states = []

    class Noting(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    skip = NumericalGuards(nonfinite="skip", every=0)
    options = {"accumulate_grad_batches": accumulated, "limit_train_batches": 4 * accumulated}
    module = fitted(tmp_path, Noting(), At(2, spoil), guards=skip, **options)
    (told,) = warnings(caplog)
    assert told.startswith("loss: became nan at step 2;")
    assert told.endswith("the step is skipped, 1 in all")
    before, after, last = states[2 * accumulated - 1], states[3 * accumulated - 1], states[-1]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(last["model.head.weight"], after["model.head.weight"])
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_skipping_ends_and_warning_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Spoilt(UserModule):
        def loss(self, batch: list[Tensor]) -> Tensor:
            return super().loss(batch) * math.nan

    with pytest.raises(qat.TrainingError, match=r"loss: became nan at step 2; .*, as in 2 skipped steps before it"):
        fitted(tmp_path, module=Spoilt(), guards=NumericalGuards(nonfinite="skip", most_skipped=3))
    module = UserModule(poison_at=7)
    caplog.clear()
    fitted(tmp_path, module=module, guards=NumericalGuards(nonfinite="warn", every=0))
    assert [text[:33] for text in warnings(caplog)] == ["loss: became nan at step 7; inf o"]
    assert not torch.isfinite(module.model.head.weight).any()


def test_gradients_beyond_the_dtype_of_their_norm_are_finite(tmp_path: Path) -> None:
    fitted(tmp_path, At(2, lambda module, _: module.model.second.weight.register_hook(lambda g: g * 0 + 1e30)))


class Scaled(Callback):
    """Notes the scale of the gradient scaler after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_gradient_scaler_skips_by_itself(policy: Any, tmp_path: Path) -> None:
    def precision() -> Any:
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))]}

    seen, guards = Scaled(), NumericalGuards(nonfinite=policy)
    module = fitted(tmp_path, seen, guards=guards, batches=loader(12), **precision())
    assert seen.seen[0] == 2.0**19  # halved, since gradients of float16 overflowed
    assert seen.seen[-1] > 1
    assert all(torch.isfinite(p).all() for p in module.parameters())
    if policy == "stop":
        with pytest.raises(qat.TrainingError, match=r"loss: became nan at step 9; .*in the batch"):
            fitted(tmp_path, At(9, spoil), guards=guards, batches=loader(12), **precision())
    else:
        halved = Scaled()
        fitted(tmp_path, halved, At(9, spoil), guards=guards, batches=loader(12), **precision())
        assert halved.seen[9] == halved.seen[8] / 2
        assert halved.seen[:9] == seen.seen[:9]


def test_a_resumed_run_knows_what_the_first_one_knew(tmp_path: Path) -> None:
    guards = NumericalGuards(nonfinite="skip", every=2)
    faults = (At(1, spoil), At(2, FAULTS["large weights"][0]))
    ends = []

    class Ends(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (own,) = [c for c in trainer.callbacks if isinstance(c, qat.QuantizationAwareTraining)]
            ends.append(own._guard.state_dict())  # type: ignore[union-attr]

    def run(name: str, steps: int, **options: Any) -> UserModule:
        saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=4, save_top_k=-1)
        module = UserModule()
        trainer = quiet_trainer(
            tmp_path, quantization(INT8, LEARNED, guards=guards), *faults, saver, Ends(), max_steps=steps, max_epochs=-1
        )
        trainer.fit(module, ResumableLoader(), **options)
        return module

    whole = run("whole", 7)
    run("part", 4)
    (checkpoint,) = (tmp_path / "part").iterdir()
    assert_equal_state(run("part", 7, ckpt_path=checkpoint), whole)
    assert ends[0] == ends[2]
    assert ends[0]["skipped"] == 1
    assert "values saturate first int8" in ends[0]["told"]
    assert ends[0]["starts"].keys() == {f"{name} int8" for name in ("first", "second", "head")}


def test_what_looks_find_is_logged_and_changes_no_bit(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    options: dict[str, Any] = {"spec": INT8_INT8, "algorithm": qat.LearnedAffine(learn_activations=True)}
    watched = fitted(tmp_path, guards=NumericalGuards(every=2, log=True), logger=logger, **options)
    assert_equal_state(watched, fitted(tmp_path, guards=NumericalGuards(every=0), **options))
    head, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 6  # the start, four looks, and one of the loss in the validation
    columns = head.split(",")
    for name in ("first/int8", "first/input/int8", "first/output/int8", "head/input/int8"):
        assert {f"quantization/{name}/{key}" for key in ("error", "saturated", "code_use", "drift")} <= {*columns}
    first = dict(zip(columns, rows[0].split(","), strict=True))
    assert 0 < float(first["quantization/first/int8/error"]) < 0.05
    assert not [name for name in columns if "second/input" in name]  # which arrives quantized


def test_no_scales_are_looked_at_in_a_float_start_or_a_compiled_model(tmp_path: Path) -> None:
    model = Tiny()
    qat.prepare(model, INT8)
    guard = Guard(NumericalGuards(every=1, log=True), model, lambda: 1, activations=False)
    guard.begin()
    guard.before_step()
    assert all(layer.mode.watch is None for _, layer in quantized_layers(model))
    for _, layer in quantized_layers(model):
        layer.mode = layer.mode._replace(weights=False)
    guard._last = 0
    assert guard.after_step() == {}


def test_no_batch_is_held_after_its_step() -> None:
    loop, batch = Loop(), torch.ones(2)
    held = weakref.ref(batch)
    loop.guard.before_step(batch)
    del batch
    loop.guard.after_step()
    assert held() is None


def test_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = mixtral()
    qat.prepare(model, INT8_INT8, target="transformers")
    ids = torch.arange(32).view(2, 16)
    qat.calibrate(model, [{"input_ids": ids}])
    step = [0]
    guard = Guard(EACH, model, lambda: step[0])
    guard.begin()
    guard.before_step()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.detach()[1] = 0
    dict(quantized_layers(model))["model.layers.0.mlp.experts.0.down_proj"].input_quantizer.scale.mul_(0.01)  # type: ignore[union-attr]
    model(input_ids=ids)
    step[0] = 1
    guard.after_step()
    (told,) = warnings(caplog)
    assert "codes died, one or two are left in model.layers.0.mlp.experts.1.down_proj (in 100%" in told
    assert "values saturate in model.layers.0.mlp.experts.0.down_proj input" in told


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(qat.SpecError, match="NumericalGuards: nonfinite: Input should be 'stop', 'skip' or 'warn'"):
        NumericalGuards(nonfinite="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "action", "message"),
    [
        (INT8, fill("first.bias", -math.inf), r"by step 1, inf or NaN is in first\.bias"),
        (
            INT8_INT8,
            fill("second.bias", math.inf),
            r"by step 1, inf or NaN is in second\.bias; .*codes hide, is in sec",
        ),
        (INT8_INT8, spoil, r"inf or NaN, which codes hide, is in first input \(\d+\.\d% of its values\)"),
    ],
    ids=["bias before a ReLU", "bias", "batch"],
)
@pytest.mark.parametrize("nonfinite", ["stop", "warn"])
def test_a_look_finds_what_reaches_no_loss(spec: Any, action: Any, message: str, nonfinite: Any, caplog: Any) -> None:
    loop = Loop(spec, guards=NumericalGuards(every=1, nonfinite=nonfinite, degenerate="ignore"))
    loop.batch = inputs_of(loader(1))[0]
    action(loop.user, [loop.batch])
    if nonfinite == "stop":
        with pytest.raises(qat.TrainingError, match=message):
            loop.step()
    else:
        loop.step()
        assert any(re.search(message, told) for told in warnings(caplog))
