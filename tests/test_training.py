"""The Lightning callback: when layers appear, what is refused, what the schedule switches."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import qat
from qat.layers import QLinear
from tests.training_modules import (
    INT4,
    INT8,
    INT8_INT8,
    LateModule,
    LearnedStep,
    Tiny,
    UserModule,
    assert_equal_state,
    inputs_of,
    layers_of,
    loader,
    quantization,
    quiet_trainer,
)


class ReadOnly(nn.Sequential):
    """Reads the weight of its layer, and never calls it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, out_features))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self[0].weight.t()


class Watcher(Callback):
    """Notes after each training batch how the layers are switched, and all output scales."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []
        self.scales: list[list[float]] = []
        self.in_validation: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        layer = layers_of(pl_module)[0]
        self.seen.append((layer.mode.weights, layer.mode.observe))
        quantizers = [layer.output_quantizer for layer in layers_of(pl_module)]
        self.scales.append([float(quantizer.scale) for quantizer in quantizers if quantizer is not None])

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        layer = layers_of(pl_module)[0]
        self.in_validation.append((layer.mode.weights, layer.mode.observe))


@pytest.mark.parametrize("kind", [UserModule, LateModule], ids=["in setup", "after configure_model"])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_layers_appear(kind: type[UserModule], verb: str, tmp_path: Path) -> None:
    module = kind()
    getattr(quiet_trainer(tmp_path, quantization(), max_steps=2), verb)(module, loader(2))
    assert [type(layer) for layer in (module.model.first, module.model.second, module.model.head)] == [QLinear] * 3
    assert "configure_model" not in vars(module)
    pickle.dumps(module.model)
    assert len(layers_of(copy.deepcopy(module))) == 3


def test_learned_scales_reach_the_optimizer(tmp_path: Path) -> None:
    for module in (UserModule(), LateModule()):
        trainer = quiet_trainer(tmp_path, quantization(INT8, LearnedStep()), max_steps=3)
        trainer.fit(module, loader())
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        scales = [layer.weight_quantizer.scale for layer in layers_of(module)]
        assert all(id(scale) in held for scale in scales)
        fresh = qat.prepare(model := Tiny(), INT8, algorithm=LearnedStep())
        assert len(fresh.layers) == 3
        torch.manual_seed(1)
        qat.prepare(model := Tiny(), INT8, algorithm=LearnedStep())
        assert not torch.equal(model.first.weight_quantizer.scale, scales[0])  # it was trained


def test_a_model_that_configure_model_only_wraps_is_prepared_before(tmp_path: Path) -> None:
    class Wrapping(UserModule):
        kinds: list[type]

        def configure_model(self) -> None:
            self.kinds = [type(self.model.first)]

    module = Wrapping()
    quiet_trainer(tmp_path, quantization(), max_steps=1).fit(module, loader())
    assert module.kinds == [QLinear]


def test_fit_twice_then_test_with_two_trainers(tmp_path: Path) -> None:
    module = UserModule()
    callback = quantization(INT8_INT8)
    first = quiet_trainer(tmp_path, callback, max_epochs=2)
    first.fit(module, loader())
    layers = layers_of(module)
    first.fit(module, loader())
    second = quiet_trainer(tmp_path, quantization(INT8_INT8))
    second.fit(module, loader())
    second.test(module, loader(), verbose=False)
    assert layers_of(module) == layers


def test_a_model_prepared_in_another_way_is_refused(tmp_path: Path) -> None:
    module = UserModule()
    qat.prepare(module.model, INT8)
    with pytest.raises(qat.StateError, match=r"prepared with weights='int8', but the callback has weights='int4':"):
        quiet_trainer(tmp_path, quantization(INT4)).fit(module, loader())
    with pytest.raises(qat.StateError, match=r"with target='quanto', but the callback has target='transformers':"):
        quiet_trainer(tmp_path, quantization(INT8, target="transformers")).fit(module, loader())
    with pytest.raises(qat.StateError, match=r"prepared with observer=Best\(.*, but the callback has observer=Absmax"):
        quiet_trainer(tmp_path, quantization(INT8, observer=qat.Absmax())).fit(module, loader())


def test_a_weight_that_is_read_without_a_call_is_refused_after_the_first_step(tmp_path: Path) -> None:
    module = UserModule()
    module.model.head = ReadOnly(16, 4)
    with pytest.raises(qat.StateError, match=r"used without calling their layer, in float \(head\.0\): exclude"):
        quiet_trainer(tmp_path, quantization()).fit(module, loader())
    assert len(module.losses) == 1


def test_the_attribute_is_named_when_it_holds_no_module(tmp_path: Path) -> None:
    with pytest.raises(qat.StateError, match=r"UserModule\.network must be the module to prepare, got NoneType"):
        quiet_trainer(tmp_path, quantization(attribute="network")).fit(UserModule(), loader())


def test_the_whole_lightning_module_can_be_prepared(tmp_path: Path) -> None:
    for module in (UserModule(), LateModule()):
        quiet_trainer(tmp_path, quantization(attribute=None), max_steps=1).fit(module, loader())
        assert len(layers_of(module)) == 3
        assert "model.first" in qat.freeze(module).layers


@pytest.mark.parametrize("algorithm", [None, LearnedStep()], ids=["straight through", "learned"])
def test_a_checkpoint_is_restored_into_prepared_layers(algorithm: Any, tmp_path: Path) -> None:
    spec = INT8_INT8
    module = UserModule()
    trainer = quiet_trainer(tmp_path, quantization(spec, algorithm), max_steps=5)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "master.ckpt")
    saved = torch.load(tmp_path / "master.ckpt", weights_only=True)["state_dict"]
    assert saved["model.first.weight"].dtype == torch.float32
    assert "model.first.output_quantizer.scale" in saved
    assert ("model.first.weight_quantizer.scale" in saved) == (algorithm is not None)
    expected = torch.cat(trainer.predict(module, loader()))
    for other in (UserModule(Tiny()), LateModule()):
        again = quiet_trainer(tmp_path, quantization(spec, algorithm))
        outputs = again.predict(other, loader(), ckpt_path=tmp_path / "master.ckpt", weights_only=True)
        assert torch.equal(torch.cat(outputs), expected)
        assert_equal_state(other, module)


def test_start_and_observers_follow_the_steps(tmp_path: Path) -> None:
    watcher = Watcher()
    schedule = {"calibration_batches": 1, "start_step": 2, "observe_from": 1, "observe_until": 4}
    trainer = quiet_trainer(tmp_path, quantization(INT8_INT8, **schedule), watcher, val_check_interval=1, max_steps=6)
    module = UserModule()
    trainer.fit(module, loader(), loader(1))
    assert watcher.seen == [(False, False), (False, True), (True, True), (True, True), (True, False), (True, False)]
    assert watcher.in_validation == [(True, False)] * len(watcher.in_validation)
    assert watcher.scales[0] != watcher.scales[3] == watcher.scales[5]
    assert [layer.mode.weights for layer in layers_of(module)] == [True] * 3


def test_scales_are_held_for_the_last_steps_while_weights_go_on(tmp_path: Path) -> None:
    class Values(Callback):
        def __init__(self) -> None:
            self.scales: list[list[float]] = []
            self.weights: list[float] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.scales.append([float(p.detach().sum()) for n, p in pl_module.named_parameters() if "_quantizer." in n])
            self.weights.append(float(pl_module.model.head.weight.detach().sum()))

    values, algorithm = Values(), qat.LearnedAffine(learn_activations=True)
    callback = quantization(INT8_INT8, algorithm, hold_scales_from=3, calibration_batches=1)
    quiet_trainer(tmp_path, callback, values, max_steps=6).fit(UserModule(), loader())
    assert len(values.scales[0]) > 3
    assert values.scales[0] != values.scales[1] != values.scales[2] != values.scales[3]
    assert values.scales[3] == values.scales[4] == values.scales[5]
    assert len(set(values.weights)) == 6


def test_a_delayed_start_trains_in_float_until_then(tmp_path: Path) -> None:
    plain, delayed = UserModule(), UserModule()
    quiet_trainer(tmp_path, max_steps=6).fit(plain, loader())
    quiet_trainer(tmp_path, quantization(INT4, start_step=3), max_steps=6).fit(delayed, loader())
    same = [one == other for one, other in zip(plain.losses, delayed.losses, strict=True)]
    assert same == [True, True, True, False, False, False]


def test_steps_are_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    watcher = Watcher()
    callback = quantization(INT4, start_step=2)
    quiet_trainer(tmp_path, callback, watcher, accumulate_grad_batches=2).fit(UserModule(), loader())
    assert [quantizing for quantizing, _ in watcher.seen] == [False] * 4 + [True] * 4


def test_observers_alone_can_set_the_scales(tmp_path: Path) -> None:
    """Sanity validation comes before them and runs with float activations."""
    module = UserModule()
    callback = quantization(INT8_INT8, calibration_batches=0, observe_from=0)
    quiet_trainer(tmp_path, callback, max_steps=4).fit(module, loader(), loader(1))
    assert all(bool(layer.output_quantizer.initialized) for layer in layers_of(module))
    assert all(layer.mode.activations for layer in layers_of(module))
    assert torch.isfinite(torch.tensor(module.losses)).all()
    for layer in layers_of(module):  # the last scales are those of all batches, whatever step they were last taken at
        scale = layer.input_quantizer.scale.clone()
        layer.input_quantizer.refresh()
        assert torch.equal(layer.input_quantizer.scale, scale)


@pytest.mark.parametrize(
    "schedule",
    [{}, {"observe_from": 2}, {"start_step": 3, "observe_from": 4}],
    ids=["nothing", "observed too late", "observed after the start"],
)
def test_activations_without_a_source_of_scales_are_refused(schedule: dict[str, int], tmp_path: Path) -> None:
    module = UserModule()
    callback = quantization(INT8_INT8, calibration_batches=0, **schedule)
    with pytest.raises(qat.CalibrationError, match="nothing sets their scales"):
        quiet_trainer(tmp_path, callback).fit(module, loader(), loader(1))
    assert module.losses == []


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_nothing_is_judged_without_scales(verb: str, tmp_path: Path) -> None:
    with pytest.raises(qat.CalibrationError, match="ckpt_path"):
        getattr(quiet_trainer(tmp_path, quantization(INT8_INT8)), verb)(UserModule(), loader())


def test_calibration_before_the_fit_is_kept(tmp_path: Path) -> None:
    module = UserModule()
    qat.prepare(module.model, INT8_INT8)
    report = qat.calibrate(module.model, inputs_of(loader(2, seed=5)))
    quiet_trainer(tmp_path, quantization(INT8_INT8, calibration_batches=0), max_steps=2).fit(module, loader())
    assert float(module.model.first.input_quantizer.scale) == report.scales["first"][0]


@pytest.mark.parametrize("options", [{"shuffle": True}, {"generator": True}, {"workers": True}], ids=str)
def test_calibration_leaves_the_order_of_training_data(options: dict[str, Any], tmp_path: Path) -> None:
    class Ordered(UserModule):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.order.append(float(batch[0].sum()))
            return super().training_step(batch, batch_idx)

    orders = []
    for spec in (INT8, INT8_INT8):
        arguments: dict[str, Any] = {"shuffle": True}
        if "generator" in options:
            arguments["generator"] = torch.Generator().manual_seed(3)
        if "workers" in options:
            arguments |= {"num_workers": 1, "persistent_workers": True}
        module = Ordered()
        module.order = []
        torch.manual_seed(7)
        quiet_trainer(tmp_path, quantization(spec), max_epochs=2).fit(module, loader(**arguments))
        orders.append(module.order)
    assert len(orders[0]) == 16
    assert orders[0] == orders[1]


def test_calibration_reads_every_kind_of_loader(tmp_path: Path) -> None:
    class Paired(UserModule):
        def training_step(self, batch: dict[str, list[torch.Tensor]], batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["one"], batch_idx) + self.loss(batch["other"])

    module = Paired()
    callback = quantization(INT8_INT8, model_inputs=lambda batch: batch["one"][0])
    quiet_trainer(tmp_path, callback).fit(module, {"one": loader(2), "other": loader(3)})
    assert len(module.losses) == 3


def test_weight_decay_on_learned_scales_is_refused_with_the_remedy(tmp_path: Path) -> None:
    class Decaying(UserModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Decaying()
    with pytest.raises(qat.TrainingError, match=r"weight_decay=0.01.*qat\.parameter_groups\(module, lr, scale_lr"):
        quiet_trainer(tmp_path, quantization(INT8, LearnedStep())).fit(module, loader())
    assert module.losses == []
    quiet_trainer(tmp_path, quantization(INT8)).fit(Decaying(), loader(1))  # nothing is learned: nothing to refuse


def test_learned_scales_in_no_optimizer_are_refused(tmp_path: Path) -> None:
    class Early(UserModule):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    with pytest.raises(qat.TrainingError, match="does not hold 3 of 3 learned scales"):
        quiet_trainer(tmp_path, quantization(INT8, LearnedStep())).fit(Early(), loader())
    quiet_trainer(tmp_path, quantization(INT8)).fit(Early(), loader(1))


def test_a_non_finite_loss_stops_and_spoils_nothing(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_on_exception=True)
    module = UserModule(poison_at=3)
    with pytest.raises(qat.TrainingError, match=r"loss: became nan at step 3; .* clip gradients"):
        quiet_trainer(tmp_path, quantization(), saver).fit(module, loader())
    clean = UserModule()
    quiet_trainer(tmp_path, quantization(), max_steps=3).fit(clean, loader())
    assert_equal_state(module, clean)
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in clean.state_dict().items())


def test_a_non_finite_gradient_never_replaces_the_last_checkpoint(tmp_path: Path) -> None:
    class Exploding(UserModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 2:
                self.model.head.weight.grad.fill_(float("inf"))

    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1)
    with pytest.raises(qat.TrainingError, match=r"gradient: made model\.head\.weight non-finite"):
        quiet_trainer(tmp_path, quantization(), saver).fit(Exploding(), loader())
    (left,) = (tmp_path / "ckpt").iterdir()
    saved = torch.load(left, weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values())


def test_a_frozen_model_is_neither_trained_nor_overwritten(tmp_path: Path) -> None:
    module = UserModule()
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = quiet_trainer(tmp_path, quantization(), saver, max_steps=1)
    trainer.fit(module, loader())
    qat.freeze(module.model)
    frozen = module.model.first.weight.dequantize()
    with pytest.raises(qat.StateError, match="frozen and cannot be trained"):
        quiet_trainer(tmp_path, quantization()).fit(module, loader())
    with pytest.raises(qat.StateError, match="ckpt_path: the model is frozen"):
        trainer.test(module, loader(), ckpt_path=saver.last_model_path)
    assert torch.equal(module.model.first.weight.dequantize(), frozen)
    quiet_trainer(tmp_path, quantization()).predict(module, loader())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observe_until": 3}, "must come after observe_from"),
        ({"observe_from": 3, "observe_until": 3}, "must come after observe_from"),
        ({"start_step": -1}, "greater than or equal to 0"),
        ({"begin": 3}, "Extra inputs"),
    ],
    ids=["until alone", "empty window", "negative", "unknown field"],
)
def test_the_schedule_rejects(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(qat.SpecError, match=message):
        qat.QuantizationSchedule(**fields)


def test_a_module_without_linear_layers_says_so(tmp_path: Path) -> None:
    with pytest.raises(qat.QatError):
        quiet_trainer(tmp_path, quantization()).fit(UserModule(nn.Identity()), loader())
