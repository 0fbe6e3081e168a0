"""Starts that a fit finds with its own batches: when, from which weights, in a resumed run, and at no cost in order."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import qat
from qat.starting import awaiting
from qat.training.annealing import begin_with
from tests.training_modules import (
    ResumableLoader,
    Tiny,
    UserModule,
    assert_equal_state,
    inputs_of,
    layers_of,
    loader,
    quantization,
    quiet_trainer,
)

INT2 = qat.QuantSpec(weights="int2", dtype="float32", overrides={"head": "int8"})
GPTQ = qat.LearnedAffine(start="gptq")
SCHEDULES: dict[str, dict[str, Any]] = {
    "float first": {"start_step": 3},
    "int4 first": {"first_weights": "int4", "first_weights_until": 3},
    "float, then int4": {"start_step": 1, "first_weights": "int4", "first_weights_until": 3},
}


class States(Callback):
    """Keeps the model's state before and after each step, and how many of its layers wait for their start before."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        self.waiting: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(copy.deepcopy(pl_module.model.state_dict()))
        self.waiting.append(len(awaiting(pl_module.model)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.ends.append(copy.deepcopy(pl_module.model.state_dict()))


class Replaying(ResumableLoader):
    """A copy of it, as calibration makes one, begins at the first batch."""

    def __copy__(self) -> Replaying:
        return Replaying(len(self.batches))


class Shuffling(ResumableLoader):
    """A copy of it, as calibration makes one, has an order that nobody knows."""

    def __copy__(self) -> Shuffling:
        other = Shuffling(len(self.batches))
        other.batches = [other.batches[place] for place in torch.randperm(len(other.batches))]
        return other


def started(masters: dict[str, Tensor], first: str | None = None) -> Tiny:
    """A model whose starts are found from ``masters`` on the first two batches, perhaps as another type."""
    model = Tiny()
    model.load_state_dict({name: tensor for name, tensor in masters.items() if "_quantizer." not in name})
    qat.prepare(model, INT2, algorithm=GPTQ)
    if first is not None:
        begin_with(model, first)  # type: ignore[arg-type]
    assert len(qat.calibrate(model, inputs_of(loader())[:2]).starts) == 3
    return model


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_start_is_found_when_quantization_to_a_type_begins(schedule: dict[str, Any], tmp_path: Path) -> None:
    module, before, after = UserModule(), States(), States()
    masters = copy.deepcopy(module.model.state_dict())
    callback = quantization(INT2, GPTQ, calibration_batches=2, **schedule)
    quiet_trainer(tmp_path, before, callback, after, max_steps=5).fit(module, loader())
    float_steps, first = schedule.get("start_step", 0), schedule.get("first_weights")
    assert after.waiting == [3] * float_steps + [0] * (5 - float_steps)
    if float_steps:
        plain = UserModule()
        quiet_trainer(tmp_path, max_steps=float_steps).fit(plain, loader())
        assert plain.losses == module.losses[:float_steps]
        masters = before.ends[float_steps - 1]
    begun, wanted = after.states[float_steps], started(masters, first).state_dict()
    assert begun.keys() == wanted.keys()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in wanted.items())
    if first is not None:  # layers that end as int2 start again, from the masters as they are then; the int8 one stays
        found, wanted = after.states[3], started(before.ends[2]).state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items() if "head" not in name)
        kept = before.ends[2]
        assert all(torch.equal(tensor, found[name]) for name, tensor in kept.items() if "head" in name)
    assert not any("first_type" in name for name in module.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("cut", [1, 3, 4], ids=["before", "at the change", "after"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_resumed_run_starts_what_has_not_started_and_nothing_else(
    schedule: dict[str, Any], cut: int, tmp_path: Path
) -> None:
    def callback() -> Callback:
        return quantization(INT2, GPTQ, calibration_batches=2, **schedule)

    whole, cut_off, resumed = UserModule(), UserModule(), UserModule()
    quiet_trainer(tmp_path, callback(), max_steps=6).fit(whole, Replaying())
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=cut, save_top_k=-1)
    quiet_trainer(tmp_path, callback(), saver, max_steps=6).fit(cut_off, Replaying())
    (path,) = (tmp_path / "ckpt").glob(f"*step={cut}.ckpt")
    trainer = quiet_trainer(tmp_path, callback(), max_steps=6)
    trainer.fit(resumed, Replaying(), ckpt_path=path, weights_only=True)
    assert cut_off.losses == whole.losses == whole.losses[:cut] + resumed.losses
    assert_equal_state(resumed, whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_checkpoint_at_the_change_holds_the_start(schedule: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = UserModule(), UserModule()
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1)
    options: dict[str, Any] = {"calibration_batches": 2, **schedule}
    quiet_trainer(tmp_path, quantization(INT2, GPTQ, **options), saver, max_steps=6).fit(whole, Shuffling())
    (path,) = (tmp_path / "ckpt").glob("*step=3.ckpt")
    torch.manual_seed(5)  # other batches than the whole run saw would give another start
    trainer = quiet_trainer(tmp_path, quantization(INT2, GPTQ, **options), max_steps=6)
    trainer.fit(resumed, Shuffling(), ckpt_path=path, weights_only=True)
    assert_equal_state(resumed, whole)


def test_batches_within_a_fit_leave_order_and_noise_as_they_were(tmp_path: Path) -> None:
    class Noisy:
        """Adds noise from a generator of its own, as the recipe for images does."""

        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(5)

        def __call__(self, examples: Any) -> list[Tensor]:
            inputs, classes = (torch.stack(part) for part in zip(*examples, strict=True))
            return [inputs + torch.randn(inputs.shape, generator=self.generator), classes]

    class Ordered(UserModule):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    seen = []
    for count in (0, 2):
        module = Ordered()
        module.seen = []
        torch.manual_seed(7)
        data = loader(shuffle=True, generator=torch.Generator().manual_seed(3), collate_fn=Noisy())
        callback = quantization(INT2, GPTQ, calibration_batches=count, **SCHEDULES["float, then int4"])
        quiet_trainer(tmp_path, callback, max_epochs=2).fit(module, data)
        seen.append(torch.stack(module.seen))
    assert len(seen[0]) == 16
    assert torch.equal(*seen)


def test_batches_that_training_will_not_see_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = UserModule()
    quiet_trainer(tmp_path, quantization(INT2, GPTQ, calibration_batches=3)).fit(module, iter([*loader(8)]))
    assert len(module.losses) == 5
    assert "from the training loader, a list_iterator: training goes on after them" in caplog.text


def test_a_model_that_takes_no_batches_is_told_before_its_float_steps(tmp_path: Path) -> None:
    module = UserModule()
    callback = quantization(INT2, GPTQ, start_step=3, model_inputs=lambda batch: batch["x"])
    with pytest.raises(qat.CalibrationError, match="model_inputs: the model cannot be called"):
        quiet_trainer(tmp_path, callback).fit(module, loader())
    assert module.losses == []


def test_steps_that_several_optimizers_share_are_not_missed(tmp_path: Path) -> None:
    class Twice(UserModule):
        """Each batch counts as two steps, so that no batch begins at step 3."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            groups = qat.parameter_groups(self, lr=1e-3)
            return [torch.optim.SGD(groups[:1]), torch.optim.SGD(groups[1:])]

    module = Twice()
    callback = quantization(INT2, GPTQ, calibration_batches=2, **SCHEDULES["int4 first"])
    quiet_trainer(tmp_path, callback, max_steps=8).fit(module, loader())
    assert [layer.weight_quantizer.qtype.name for layer in layers_of(module)] == ["int2", "int2", "int8"]
