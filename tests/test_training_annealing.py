"""Training that begins with int4 codes and ends with int2: the change, resumed runs, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import qat
from qat.errors import SpecError
from qat.training.annealing import begin_with, end_first_type
from tests.training_modules import (
    INT8,
    LateModule,
    ResumableLoader,
    Tiny,
    UserModule,
    assert_equal_state,
    layers_of,
    loader,
    quantization,
    quiet_trainer,
)

ALL_INT2 = qat.QuantSpec(weights="int2", dtype="float32")
INT2 = qat.QuantSpec(weights="int2", dtype="float32", overrides={"head": "int8"})
LEARNED = qat.LearnedAffine()
FIRST = {"first_weights": "int4", "first_weights_until": 4}


class Types(Callback):
    """Notes at each step the types, the number of different values of a layer, and the moves of its range."""

    def __init__(self) -> None:
        self.types: list[list[str]] = []
        self.moved: list[bool] = []
        self.parameters: list[int] = []
        self.momentum: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.types.append([layer.weight_quantizer.qtype.name for layer in layers_of(pl_module)])
        parameters = list(layers_of(pl_module)[0].weight_quantizer.parameters())
        self.parameters.append(sum(map(id, parameters)))
        self.moved.append(any(bool(p.detach().any()) for p in parameters))
        self.momentum.append(any(p in trainer.optimizers[0].state for p in parameters))


def values_of(layer: Any) -> int:
    """Different values in the first group of a weight."""
    value = layer.weight_quantizer.quantize(layer.weight.detach(), torch.float32).value
    return len(layer.weight_quantizer.qtype.grouped(value)[0].unique())


@pytest.mark.parametrize("algorithm", [LEARNED, qat.StraightThrough()], ids=lambda a: a.kind)
def test_layers_change_at_their_step_and_start_again(algorithm: qat.Algorithm, tmp_path: Path) -> None:
    module, types = UserModule(), Types()
    quiet_trainer(tmp_path, quantization(INT2, algorithm, **FIRST), types).fit(module, loader(8))
    assert types.types == [["int4", "int4", "int8"]] * 4 + [["int2", "int2", "int8"]] * 4
    if algorithm is LEARNED:
        assert types.moved == [False, True, True, True, False, True, True, True]
        assert types.momentum == [False, True, True, True, False, True, True, True]
        assert len(set(types.parameters)) == 1  # the same objects, which the optimizer holds
    assert "first_type" not in " ".join(module.state_dict())
    assert qat.freeze(module.model).layers["first"].weights == "int2"


def test_a_range_starts_again_from_the_weight_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8))
    qat.prepare(model, ALL_INT2, algorithm=LEARNED)
    begin_with(model, "int4")
    assert values_of(model[0]) > 4
    with torch.no_grad():
        model[0].weight.mul_(3.0)
        model[0].weight_quantizer.high_move.add_(0.1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 256)).sum().backward()
    optimizer.step()
    end_first_type(model, [optimizer])
    assert values_of(model[0]) == 4
    fresh = LEARNED.make(model[0].weight.detach(), model[0].weight_quantizer.final_qtype, torch.float32)
    assert_equal_state(model[0].weight_quantizer, fresh)
    assert not any(p in optimizer.state for p in model[0].weight_quantizer.parameters())
    assert model[0].weight in optimizer.state
    before = copy.deepcopy(model.state_dict())
    end_first_type(model, [optimizer])  # once is enough
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


RUNS = {
    "learned": {"algorithm": LEARNED, **FIRST},
    "straight through": {"algorithm": qat.StraightThrough(), **FIRST},
    "with a pull, held scales and a late start": {
        "algorithm": LEARNED,
        **FIRST,
        "cage": 5.0,
        "cage_from": 0.4,
        "hold_scales_from": 6,
        "start_step": 1,
    },
}


class DecayingModule(UserModule):
    """With the decay that `QuantizedTask` has."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(qat.parameter_groups(self, lr=1e-2))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: qat.rate_factor(step, 8))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StopAt(Callback):
    """Ends a fit, as a machine that is taken away does, so that the planned steps stay the same."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("cut", [2, 4, 6], ids=["with int4", "at the change", "with int2"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(run: dict[str, Any], cut: int, tmp_path: Path) -> None:
    whole, cut_off, resumed = DecayingModule(), DecayingModule(), DecayingModule()
    quiet_trainer(tmp_path, quantization(INT2, **run)).fit(whole, ResumableLoader())
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=cut)
    quiet_trainer(tmp_path, quantization(INT2, **run), saver, StopAt(cut)).fit(cut_off, ResumableLoader())
    path = saver.best_model_path
    held = {name for name in torch.load(path, weights_only=True)["state_dict"] if name.endswith("first_type")}
    assert len(held) == (2 if cut < 4 else 0)
    trainer = quiet_trainer(tmp_path, quantization(INT2, **run))
    trainer.fit(resumed, ResumableLoader(), ckpt_path=path, weights_only=True)
    assert len(cut_off.losses) == cut
    assert cut_off.losses + resumed.losses == whole.losses
    assert_equal_state(resumed, whole)


def test_what_still_has_the_first_type_is_not_frozen(tmp_path: Path) -> None:
    module = UserModule()
    trainer = quiet_trainer(tmp_path, quantization(INT2, LEARNED, **FIRST), StopAt(2))
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    rule = r"2 layers still train as int4 \(.*first.*\), but are to be frozen as int2: train on, past"
    with pytest.raises(qat.StateError, match=rule):
        qat.freeze(module.model)
    model = Tiny()  # a checkpoint says so too, however it is loaded
    qat.prepare(model, INT2, algorithm=LEARNED)
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    with pytest.raises(qat.StateError, match=rule):
        qat.freeze(model)
    x = torch.randn(2, 32)
    assert torch.equal(model.eval()(x), module.model.eval()(x))
    fresh = Tiny()
    model.load_state_dict(fresh.state_dict())  # a float checkpoint begins afresh, as the type that is served
    assert layers_of(model)[0].weight_quantizer.qtype.name == "int2"
    qat.freeze(model)


def test_a_fit_without_a_layer_that_it_is_for_is_refused(tmp_path: Path) -> None:
    module = UserModule()
    with pytest.raises(
        qat.TrainingError,
        match=r"first_weights: 'int4' is for layers of fewer bits .* this model has only int8: prepare layers",
    ):
        quiet_trainer(tmp_path, quantization(INT8, **FIRST)).fit(module, loader())
    assert module.losses == []
    with pytest.raises(qat.TrainingError, match="first_weights: 'int8' is for layers of fewer bits"):
        quiet_trainer(tmp_path, quantization(INT2, first_weights="int8", first_weights_until=2)).fit(
            UserModule(), loader()
        )
    with pytest.raises(SpecError, match="first_weights"):
        qat.QuantizationSchedule(first_weights="float", first_weights_until=1)


def test_a_change_after_the_end_is_refused(tmp_path: Path) -> None:
    module = UserModule()
    with pytest.raises(qat.TrainingError, match=r"first_weights_until=4 must come before the fit ends, at step 3: "):
        quiet_trainer(tmp_path, quantization(INT2, **FIRST), max_steps=3).fit(module, loader())
    assert module.losses == []


class Sharding(SingleDeviceStrategy):
    """Says that it shards; `setup` ends before it would."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("make", [UserModule, LateModule], ids=["built before", "configure_model"])
def test_sharded_weights_are_refused_in_setup(make: Any, tmp_path: Path) -> None:
    starts = qat.LearnedAffine(start="best")
    for callback, message in (
        (quantization(INT2, **FIRST), "first_weights needs whole weights, which Sharding shards: use ddp"),
        (quantization(INT2, starts), "the start of 3 layers needs whole weights, which Sharding shards: call qat.prep"),
    ):
        with pytest.raises(qat.TrainingError, match=message):
            quiet_trainer(tmp_path, callback, Started(), strategy=Sharding("cpu")).fit(make(), loader())
    module = UserModule()
    qat.prepare(module.model, INT2, algorithm=starts)
    qat.calibrate(module.model, [x for x, _ in loader(2)])
    with pytest.raises(RuntimeError, match="setup is over"):
        quiet_trainer(tmp_path, quantization(INT2, starts), Started(), strategy=Sharding("cpu")).fit(module, loader())


class Started(Callback):
    def on_fit_start(self, *_: Any) -> None:
        raise RuntimeError("setup is over")


def test_an_algorithm_that_learns_something_else_at_the_first_type_is_refused() -> None:
    class Fickle(qat.StraightThrough):
        def make(self, weight: Any, qtype: Any, dtype: Any) -> Any:
            return (LEARNED if qtype.bits == 4 else qat.StraightThrough()).make(weight, qtype, dtype)

    model = nn.Sequential(nn.Linear(64, 8))
    qat.prepare(model, ALL_INT2, algorithm=Fickle())
    with pytest.raises(qat.TrainingError, match="first_weights: Fickle learns other parameters at int4 than at int2"):
        begin_with(model, "int4")
    assert model[0].weight_quantizer.qtype.name == "int2"
