"""Lightning's tuners, which run trial steps with all other callbacks taken off, and callbacks that copy the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

import qat
from tests.training_modules import (
    INT4,
    INT8_INT8,
    LateModule,
    UserModule,
    assert_equal_state,
    layers_of,
    loader,
    quantization,
    quiet_trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*not have a `batch_size` attribute.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*dataloader.*:UserWarning"),
]


class Tunable(UserModule):
    """With the two attributes that tuners set, and a note of how its layers were switched in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 2
        self.seen: list[tuple[bool, bool, bool]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        layer = layers_of(self)[0]
        self.seen.append(tuple(layer.mode)[:3])
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        data = loader(8).dataset
        assert isinstance(data, TensorDataset)
        return DataLoader(data, batch_size=self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(qat.parameter_groups(self, lr=self.lr))


class LateTunable(Tunable, LateModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = None


def lr_find(trainer: Any, module: Any) -> None:
    Tuner(trainer).lr_find(module, num_training=6)


def scale_batch_size(trainer: Any, module: Any) -> None:
    Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=2)


def validate_batch_size(trainer: Any, module: Any) -> None:
    module.val_dataloader = module.train_dataloader
    Tuner(trainer).scale_batch_size(module, method="validate", steps_per_trial=2, max_trials=2)


TOOLS = [lr_find, scale_batch_size, validate_batch_size]
SCHEDULES: dict[str, dict[str, int]] = {
    "calibrated": {},
    "observed": {"calibration_batches": 0, "observe_from": 0},
    "delayed": {"start_step": 3},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_a_tuner_runs_and_leaves_a_model_that_trains_as_if_it_had_not_run(
    tool: Any, schedule: dict[str, int], tmp_path: Path
) -> None:
    module, plain = (LateTunable() if tool is lr_find else Tunable() for _ in range(2))
    algorithm = qat.LearnedAffine()
    callback = quantization(INT8_INT8, algorithm, **schedule)
    tool(quiet_trainer(tmp_path, callback, max_steps=6), module)
    if tool is not validate_batch_size:
        assert module.seen
        expected = (not schedule.get("start_step"), "observe_from" in schedule, "observe_from" in schedule)
        assert set(module.seen) == {expected}  # no scales yet: activations stay float unless they are observed
    with pytest.raises(qat.CalibrationError, match="a scale was never set"):
        module.model(torch.zeros(1, 32))  # and outside a trainer they never do so silently

    module.lr, module.batch_size = plain.lr, plain.batch_size = 1e-2, 4
    module.losses.clear()
    module.train()  # a validation leaves it as it is
    for one in (module, plain):
        quiet_trainer(tmp_path, quantization(INT8_INT8, algorithm, **schedule), max_steps=6).fit(one)
    assert module.losses == plain.losses
    assert_equal_state(module, plain)
    assert module.seen[-1] == plain.seen[-1] == (True, True, "observe_from" in schedule)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder], ids=lambda finder: finder.__name__)
def test_finders_among_the_callbacks_come_before_or_after_ours(finder: Any, first: bool, tmp_path: Path) -> None:
    options = {"num_training_steps": 6} if finder is LearningRateFinder else {"steps_per_trial": 2, "max_trials": 2}
    ours, theirs = quantization(INT8_INT8), finder(**options)
    module = Tunable()
    quiet_trainer(tmp_path, *((theirs, ours) if first else (ours, theirs)), max_steps=4).fit(module)
    assert module.seen[0] == (True, False, False)
    assert module.seen[-4:] == [(True, True, False)] * 4
    assert set(qat.freeze(module.model).layers) == {"first", "second", "head"}


def test_a_finder_between_epochs_sees_the_phase_of_training(tmp_path: Path) -> None:
    class Again(LearningRateFinder):
        def on_fit_start(self, *args: Any, **options: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.mark = len(pl_module.seen)
                self.lr_find(trainer, pl_module)

    module = Tunable()
    module.batch_size = 16
    callback = quantization(INT8_INT8, start_step=40)
    quiet_trainer(tmp_path, callback, Again(num_training_steps=3), max_epochs=6).fit(module, val_dataloaders=loader(1))
    assert set(module.seen) == {(False, True, False)}
    assert len(module.seen) > module.mark + 2


def test_an_error_leaves_the_layers_as_they_are_used(tmp_path: Path) -> None:
    module = UserModule(poison_at=2)
    with pytest.raises(qat.TrainingError, match="nan"):
        quiet_trainer(tmp_path, quantization(INT8_INT8, start_step=5)).fit(module, loader())
    assert all(layer.mode.weights and not layer.mode.observe for layer in layers_of(module))


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1), UserModule),
        (lambda: WeightAveraging(use_buffers=False), UserModule),
        (lambda: EMAWeightAveraging(use_buffers=False), UserModule),
        (lambda: EMAWeightAveraging(use_buffers=False), LateModule),
    ],
    ids=["stochastic", "mean", "exponential", "exponential, configured"],
)
def test_weights_are_averaged_by_callbacks_in_any_order(make: Any, kind: type[UserModule], tmp_path: Path) -> None:
    modules = [kind(), kind()]
    for module, first in zip(modules, (True, False), strict=True):
        ours, theirs = quantization(INT4, qat.LearnedAffine(), hold_scales_from=6), make()
        order = (ours, theirs) if first else (theirs, ours)
        quiet_trainer(tmp_path, *order, max_epochs=3).fit(module, loader())
    assert modules[0].losses == modules[1].losses
    assert_equal_state(*modules)
    assert set(qat.freeze(modules[1].model).layers) == {"first", "second", "head"}
