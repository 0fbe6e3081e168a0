"""Averages of master weights: judged and exported as re-quantized, by Lightning's callback and by torch's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qat
from tests.training_modules import (
    INT4,
    INT8_INT8,
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

LEARNED = qat.LearnedAffine(learn_activations=True)


class Noting(EMAWeightAveraging):
    """Keeps the parameters after every step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(decay=0.5, use_buffers=False, **options)
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self.seen.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("spec", [INT4, INT8_INT8], ids=["int4", "int8 activations"])
def test_the_average_is_judged_and_frozen_as_it_is_quantized(spec: qat.QuantSpec, tmp_path: Path) -> None:
    module, averaging = UserModule(), Noting(update_starting_at_step=2)
    callback = quantization(spec, LEARNED if spec is INT8_INT8 else qat.LearnedAffine(), calibration_batches=2)
    trainer = quiet_trainer(tmp_path, callback, averaging)
    trainer.fit(module, loader(8), loader(2, seed=9))
    average = averaging.seen[2]
    for parameters in averaging.seen[3:]:
        average = {name: (average[name] + parameters[name]) / 2 for name in average}
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter.double(), average[name], rtol=1e-5, atol=1e-6), name
        assert "_move" not in name or bool(parameter.detach().any())
    judged = float(trainer.callback_metrics["val_loss"])
    layers = layers_of(module)
    outputs = [module.model(x) for x in inputs_of(loader(1))]
    values = [layer.weight_quantizer.quantize(layer.weight.detach(), torch.float32).value for layer in layers]
    assert judged == pytest.approx(float(trainer.validate(module, loader(2, seed=9), verbose=False)[0]["val_loss"]))
    qat.freeze(module.model)
    frozen = [module.model.first, module.model.second, module.model.head]
    assert all(torch.equal(layer.weight.dequantize(), value) for layer, value in zip(frozen, values, strict=True))
    assert torch.allclose(module.model(inputs_of(loader(1))[0]), outputs[0], atol=2e-2)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_with_an_average_is_resumed(tmp_path: Path) -> None:
    spec = qat.QuantSpec(weights="int2", dtype="float32")
    schedule = {"first_weights": "int4", "first_weights_until": 3}

    def callbacks() -> list[Any]:
        averaging = EMAWeightAveraging(decay=0.5, use_buffers=False, update_starting_at_step=3)
        return [quantization(spec, qat.LearnedAffine(), **schedule), averaging]

    for at in (2, 5):
        whole, cut, resumed = UserModule(), UserModule(), UserModule()
        quiet_trainer(tmp_path, *callbacks(), max_steps=8).fit(whole, ResumableLoader())
        saver = ModelCheckpoint(tmp_path / f"{at}", every_n_train_steps=at, save_top_k=-1)
        quiet_trainer(tmp_path, *callbacks(), saver, max_steps=8).fit(cut, ResumableLoader())
        (path,) = (tmp_path / f"{at}").glob(f"*step={at}.ckpt")
        trainer = quiet_trainer(tmp_path, *callbacks(), max_steps=8)
        trainer.fit(resumed, ResumableLoader(), ckpt_path=path, weights_only=True)
        assert_equal_state(resumed, whole)
        assert cut.losses == whole.losses == whole.losses[:at] + resumed.losses
        qat.freeze(resumed.model)


class Fan(Tiny):
    """Two layers read one tensor, so that a calibration gives them one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Linear(32, 32)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.second(torch.relu(self.first(x) + self.other(x)))
        return outputs


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_with_an_average_of_a_calibrated_model_is_resumed(tmp_path: Path) -> None:
    def fitted(folder: str, path: Path | None, *others: Any) -> UserModule:
        module = UserModule(Fan())
        qat.prepare(module.model, INT8_INT8)
        qat.calibrate(module.model, inputs_of(loader()))
        callbacks = [quantization(INT8_INT8), EMAWeightAveraging(decay=0.5, use_buffers=False), *others]
        trainer = quiet_trainer(tmp_path / folder, *callbacks, max_steps=8)
        trainer.fit(module, ResumableLoader(), ckpt_path=path, weights_only=True)
        return module

    whole = fitted("a", None, ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5))
    (path,) = (tmp_path / "kept").iterdir()
    assert_equal_state(fitted("b", path), whole)


def test_averages_that_would_mix_are_refused(tmp_path: Path) -> None:
    callback = quantization(INT4, qat.LearnedAffine())
    with pytest.raises(qat.TrainingError, match=r"EMAWeightAveraging would average buffers, .* use_buffers=False"):
        quiet_trainer(tmp_path, callback, EMAWeightAveraging()).fit(UserModule(), loader())
    int2 = qat.QuantSpec(weights="int2", dtype="float32")
    callback = quantization(int2, qat.LearnedAffine(), first_weights="int4", first_weights_until=4)
    averaging = EMAWeightAveraging(use_buffers=False, update_starting_at_step=3)
    with pytest.raises(qat.TrainingError, match=r"averages from before first_weights_until=4, .*at_step=4\)"):
        quiet_trainer(tmp_path, callback, averaging).fit(UserModule(), loader())
    with pytest.raises(qat.TrainingError, match=r"StochasticWeightAveraging starts by epochs, .*: use EMAWeight"):
        quiet_trainer(tmp_path, callback, StochasticWeightAveraging(1e-3)).fit(UserModule(), loader())
    callback = quantization(INT4, qat.StraightThrough())
    quiet_trainer(tmp_path, callback, WeightAveraging(), max_steps=2).fit(UserModule(), loader())
    callback = quantization(INT4, qat.LearnedAffine(start="gptq"), start_step=4)
    with pytest.raises(qat.TrainingError, match=r"averages from before start_step=4, .*at_step=4\)"):
        quiet_trainer(tmp_path, callback, averaging).fit(UserModule(), loader())


@pytest.mark.parametrize("last", [{"update_starting_at_step": 3}, {"update_starting_at_epoch": 1}], ids=str)
def test_an_average_of_nothing_is_refused(last: dict[str, int], tmp_path: Path) -> None:
    """It would end the fit with the weights from before."""
    module, options = UserModule(), {"update_every_n_steps": int("update_starting_at_step" in last)}
    late = {name: value + 1 for name, value in last.items()}
    averaging = EMAWeightAveraging(use_buffers=False, **options, **late)
    rule = rf"nothing in the 4 steps of this fit .*update_starting_at_step is {late.get('update_starting_at_step')}\)"
    with pytest.raises(qat.TrainingError, match=rule):
        quiet_trainer(tmp_path, quantization(INT4), averaging, max_epochs=2).fit(module, loader(2))
    assert module.losses == []
    before = module.model.first.weight.detach().clone()
    averaging = EMAWeightAveraging(decay=0.5, use_buffers=False, **options, **last)
    quiet_trainer(tmp_path, quantization(INT4), averaging, max_epochs=2).fit(module, loader(2))
    assert not torch.equal(module.model.first.weight, before)


def test_held_scales_are_averaged_as_held(tmp_path: Path) -> None:
    module = UserModule()
    callback = quantization(INT4, qat.LearnedAffine(), hold_scales_from=4)
    noting = Noting(update_starting_at_step=4)
    quiet_trainer(tmp_path, callback, noting, max_steps=7).fit(module, loader())
    held = noting.seen[3]["model.first.weight_quantizer.high_move"]
    assert bool(held.any())
    assert torch.allclose(module.model.first.weight_quantizer.high_move.double(), held, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [INT4, INT8_INT8], ids=["int4", "int8 activations"])
def test_a_plain_loop_with_the_averaged_model_of_torch(spec: qat.QuantSpec, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, batches = Tiny(), list(loader())
    qat.prepare(model, spec, algorithm=qat.LearnedAffine())
    qat.calibrate(model, inputs_of(loader()))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-2))
    expected: dict[str, torch.Tensor] = {}
    for x, y in batches:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        for name, p in model.named_parameters():
            new = p.detach().double()
            expected[name] = 0.8 * expected[name] + 0.2 * new if name in expected else new.clone()
    served = averaged.module
    for name, p in served.named_parameters():
        assert torch.allclose(p.double(), expected[name], rtol=1e-5, atol=1e-6), name
    qat.freeze(served)
    qat.export(served, tmp_path / "out", example_inputs=(batches[0][0],))
    qat.verify(tmp_path / "out", served, inputs=(batches[0][0],), model=Tiny())
