"""`QuantizedTask`: the generic module that the recipes train."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

import qat
from qat.training.losses import divergence
from recipes.tasks import CausalLanguageModelling, evaluate
from tests.training_modules import INT4, INT8, INT8_INT8, LearnedStep, assert_equal_state, quantization, quiet_trainer

pytestmark = pytest.mark.compatibility


class TinyLanguageModel(nn.Module):
    """Takes exactly what the task gives it: labels would be an error."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.embedding(input_ids))))


def text(blocks: int = 16) -> DataLoader[Any]:
    tokens = torch.arange(9).repeat(blocks, 1) + torch.arange(blocks)[:, None]
    rows = [{"input_ids": row, "labels": row} for row in tokens % 16]
    return DataLoader(rows, batch_size=4)


def module(**options: Any) -> qat.QuantizedTask:
    torch.manual_seed(1)
    options = {"task": CausalLanguageModelling(), "learning_rate": 1e-2, **options}
    return qat.QuantizedTask(TinyLanguageModel(), **options)


def test_it_learns_and_logs_the_task_metrics(tmp_path: Path) -> None:
    quantized = module(weight_decay=0.1)
    before = evaluate(quantized.task, quantized.model, text())
    trainer = quiet_trainer(tmp_path, quantization(INT8_INT8), max_epochs=8)
    trainer.fit(quantized, text(), text())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged.keys() == {"train_loss", "val_loss", "val_perplexity"}
    assert logged["val_loss"] < before["loss"] - 0.5
    assert evaluate(quantized.task, quantized.model, text())["loss"] == pytest.approx(logged["val_loss"], abs=1e-5)


def test_metrics_start_afresh_each_time(tmp_path: Path) -> None:
    quantized = module()
    trainer = quiet_trainer(tmp_path, quantization(INT8))
    (first,) = trainer.validate(quantized, text(), verbose=False)
    (second,) = trainer.validate(quantized, text(), verbose=False)
    assert first == second


def test_the_teacher_is_neither_saved_nor_trained(tmp_path: Path) -> None:
    teacher = TinyLanguageModel()
    kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distilled = module(teacher=teacher)
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = quiet_trainer(tmp_path, quantization(INT8), saver, max_epochs=30, check_val_every_n_epoch=30)
    trainer.fit(distilled, text(), text())
    assert set(distilled.state_dict()) == {f"model.{name}" for name in kept}
    assert set(torch.load(saver.last_model_path, weights_only=True)["state_dict"]) == set(distilled.state_dict())
    assert not teacher.training
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    tokens = next(iter(text()))["input_ids"]
    left = divergence(distilled.model(tokens)[:, :-1], teacher(tokens)[:, :-1])
    assert float(left.detach()) < 0.05


def test_the_learning_rate_warms_up_by_steps_and_scales_have_their_own(tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Recorder(LearningRateMonitor):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    quantized = module(scale_learning_rate=4e-3, warmup_steps=4, weight_decay=0.1, decay="constant")
    recorder = Recorder()
    logger = CSVLogger(tmp_path)
    callback = quantization(INT8, LearnedStep())
    quiet_trainer(tmp_path, callback, recorder, max_epochs=2, logger=logger, log_every_n_steps=1).fit(
        quantized, text(), text()
    )
    groups = quantized.optimizers().param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("weights", 0.1),
        ("vectors", 0.0),
        ("scales", 0.0),
    ]
    assert [rate[0] for rate in rates] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert [rate[2] for rate in rates[:4]] == pytest.approx([0.001, 0.002, 0.003, 0.004])


class StopAt(Callback):
    """Ends a fit, as a machine that is taken away does, so that the planned steps stay the same."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Rates(Callback):
    """Notes the rates of all groups in the first batch of each optimizer step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.setdefault(trainer.global_step, [group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("accumulate", [1, 2], ids=["each batch", "two batches"])
def test_rates_of_all_groups_follow_the_steps_and_are_resumed(accumulate: int, decay: Any, tmp_path: Path) -> None:
    def run(*callbacks: Callback, path: str | None = None) -> tuple[qat.QuantizedTask, dict[int, list[float]]]:
        quantized, rates = module(warmup_steps=3, decay=decay, scale_learning_rate=4e-3), Rates()
        callback = quantization(INT8, LearnedStep())
        trainer = quiet_trainer(tmp_path, callback, rates, *callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
        trainer.fit(
            quantized, text(16 * accumulate), text(), ckpt_path=path, weights_only=None if path is None else True
        )
        return quantized, rates.seen

    whole, rates = run()
    for group, peak in enumerate((1e-2, 1e-2, 4e-3)):
        expected = [peak * qat.rate_factor(step, 8, 3, decay) for step in range(8)]
        assert [rates[step][group] for step in range(8)] == pytest.approx(expected)
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    run(saver, StopAt(4))
    again = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    resumed, later = run(again, path=saver.best_model_path)
    assert later == {step: rates[step] for step in range(4, 8)}
    assert_equal_state(resumed, whole)


def test_a_fit_without_an_end_needs_a_constant_rate(tmp_path: Path) -> None:
    with pytest.raises(qat.TrainingError, match=r"decay: 'cosine' with warmup=None needs the number of steps, got inf"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(module(), text(), text())
    endless = module(warmup_steps=2, decay="constant")
    quiet_trainer(tmp_path, StopAt(3), max_epochs=-1).fit(endless, text(), text())
    assert [group["lr"] for group in endless.optimizers().param_groups] == [1e-2, 1e-2]
    assert endless.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_a_delayed_start_works_with_decay_and_a_teacher(tmp_path: Path) -> None:
    """The steps before the start are those of a float run with the same schedule and teacher, to the bit."""

    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen.append(float(trainer.callback_metrics["train_loss"]))

    seen = []
    for callbacks in ([], [quantization(INT4, qat.LearnedAffine(), start_step=3, hold_scales_from=6)]):
        torch.manual_seed(3)
        options = {"teacher": TinyLanguageModel()}
        losses, distilled = Losses(), module(**options)
        quiet_trainer(tmp_path, *callbacks, losses, max_epochs=2).fit(distilled, text(), text())
        seen.append(losses.seen)
    assert [one == other for one, other in zip(*seen, strict=True)] == [True] * 3 + [False] * 5
    assert seen[1][-1] < seen[1][0]


def test_a_non_finite_loss_stops_a_float_run_too(tmp_path: Path) -> None:
    plain = module()
    torch.nn.init.constant_(plain.model.head.weight, float("nan"))
    before = plain.model.middle.weight.detach().clone()
    with pytest.raises(qat.TrainingError, match="loss: became nan at step 0"):
        quiet_trainer(tmp_path).fit(plain, text(), text())
    assert torch.equal(plain.model.middle.weight, before)


def test_what_a_user_should_know_of_preparing_is_a_warning_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = module()
    tied.model.embedding = nn.Embedding(16, 32)
    tied.model.head.weight = tied.model.embedding.weight
    spec = qat.QuantSpec(weights="int8", dtype="float32", include=("middle", "head"))
    report = qat.inspect(tied.model, spec)
    quiet_trainer(tmp_path, quantization(spec), max_steps=1).fit(tied, text(), text())
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [*report.notes, "untied: head"]


def test_preparing_is_reported_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qat"):
        quiet_trainer(tmp_path, quantization(INT8_INT8), max_steps=1).fit(module(), text(), text())
    messages = [record.getMessage() for record in caplog.records if record.name == "qat"]
    assert len(messages) == 2
    assert messages[0] == "prepared 2 layers"
    assert messages[1].startswith("calibrated 2 layers on 4 batches")


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_weight_mixes_the_distillation_with_the_loss_of_the_task(weight: float, tmp_path: Path) -> None:
    teacher = TinyLanguageModel()
    distilled = module(teacher=teacher, distillation=qat.Distillation(weight=weight, temperature=2.0))
    batch = next(iter(text()))
    logits = distilled.model(batch["input_ids"]).detach()
    far = divergence(logits[:, :-1], teacher(batch["input_ids"])[:, :-1], temperature=2.0)
    expected = (1 - weight) * distilled.task.loss(logits, batch) + weight * far
    losses: list[Tensor] = []

    class Recorder(lightning.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            losses.append(loss.detach())

    quiet_trainer(tmp_path, Recorder(), max_steps=1, limit_val_batches=0).fit(distilled, text(), text())
    torch.testing.assert_close(losses, [expected])


def test_a_task_without_predictions_is_distilled_by_its_logits(tmp_path: Path) -> None:
    class Plain:
        def inputs(self, batch: Any) -> dict[str, Any]:
            return {"input_ids": batch["input_ids"]}

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            raise AssertionError("with weight 1 the labels do not count")

        def metrics(self) -> MetricCollection:
            return MetricCollection({})

    teacher = TinyLanguageModel()
    distilled = module(task=Plain(), teacher=teacher)
    ids = next(iter(text()))["input_ids"]
    expected = divergence(distilled.model(ids), teacher(ids)).detach()
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(distilled, text(), text())
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], expected)


def test_a_distillation_needs_a_teacher() -> None:
    with pytest.raises(qat.TrainingError, match=r"distillation: needs a teacher, got none for Distillation"):
        module(distillation=qat.Distillation())


def test_cached_logits_teach_a_fit(tmp_path: Path) -> None:
    batches = [{"input_ids": batch["input_ids"]} for batch in text()]
    cached = qat.cache_logits(TinyLanguageModel(), batches, tmp_path / "cache", top_k=4)
    trainer = quiet_trainer(tmp_path, quantization(INT8), max_steps=2, limit_val_batches=0)
    trainer.fit(module(teacher=cached), text(), text())
    assert float(trainer.callback_metrics["train_loss"]) > 0
