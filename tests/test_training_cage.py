"""CAGE: the update against a float64 form, what it leaves alone, and fits with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

import qat
from qat.layers import Mode
from qat.training.cage import cage_step, pull_after_steps
from qat.training.schedule import QuantizationSchedule
from tests.training_modules import INT4, UserModule, layers_of, loader, quantization, quiet_trainer


def served(layer: Any) -> Tensor:
    """The value that the layer's weight is served with, from its codes, in float64."""
    frozen, _ = layer.weight_quantizer.freeze(layer.weight.detach())
    codes = frozen.codes.double().reshape(len(frozen.scale), -1)
    shift = 0 if frozen.shift is None else frozen.shift.double()
    return (codes * frozen.scale.double() - shift).reshape(layer.weight.shape)


def model_of(spec: qat.QuantSpec, algorithm: qat.Algorithm, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4))
    qat.prepare(model, spec, algorithm=algorithm)
    return model


@pytest.mark.parametrize("algorithm", [qat.StraightThrough(), qat.LearnedAffine()], ids=lambda a: a.kind)
@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
def test_a_loop_with_it_is_the_formula_in_float64(weights: Any, algorithm: qat.Algorithm) -> None:
    """Each step: SGD as torch does it, then w - lr lambda (w - Q(w)) with the learning rate of the weight's group."""
    spec = qat.QuantSpec(weights=weights, dtype="float32")
    model = model_of(spec, algorithm)
    first, last = layers_of(model)
    groups = [{"params": [first.weight, first.bias], "lr": 0.02}, {"params": [last.weight, last.bias], "lr": 0.005}]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule = QuantizationSchedule(cage=10.0, cage_from=0.25)
    x = torch.randn(16, 256)
    for step in range(4):
        strength = 10.0 * max(0.0, (step + 1 - 1) / 3)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        expected = []
        for layer, peak in ((first, 0.02), (last, 0.005)):
            rate = peak / (1 + step)
            stepped = layer.weight.detach() - torch.tensor(rate) * layer.weight.grad
            before = layer.weight.detach().clone()
            with torch.no_grad():
                layer.weight.copy_(stepped)
                pull = rate * strength * (stepped.double() - served(layer))
                layer.weight.copy_(before)
            expected.append(stepped.double() - pull)
        optimizer.step()
        assert cage_step(model, optimizer, schedule.cage_at(step, 4)) == 2
        scheduler.step()
        for layer, weight in zip((first, last), expected, strict=True):
            # Both round to float32 once or twice, near |w| < 0.5: 2^-24, and the SGD step rounds as much.
            assert torch.allclose(layer.weight.double(), weight, rtol=0, atol=2e-7)
    assert strength == 10.0


def test_it_ends_at_the_quantized_value_and_not_beyond() -> None:
    model = model_of(INT4, qat.LearnedAffine())
    layers = layers_of(model)
    expected = [layer.weight_quantizer.quantize(layer.weight.detach(), torch.float32).value for layer in layers]
    assert cage_step(model, torch.optim.SGD(model.parameters(), lr=1.0), 1e6) == 2
    assert all(torch.equal(layer.weight, value) for layer, value in zip(layers, expected, strict=True))


def leave_float(model: nn.Module) -> None:
    model[0].mode = Mode(False, False, False)  # type: ignore[operator]


def freeze_master(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)  # type: ignore[operator]


@pytest.mark.parametrize("leave", [leave_float, freeze_master], ids=["not quantized yet", "not trained"])
def test_it_leaves_alone(leave: Callable[[nn.Module], None]) -> None:
    model = model_of(INT4, qat.StraightThrough())
    leave(model)
    before = [layer.weight.detach().clone() for layer in layers_of(model)]
    assert cage_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 1.0) == 1
    same = [torch.equal(layer.weight, old) for layer, old in zip(layers_of(model), before, strict=True)]
    assert same == [True, False]
    assert cage_step(model, torch.optim.SGD([model[2].bias], lr=0.1), 1.0) == 0


class Rates(Callback):
    """Notes masters around each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(layers_of(pl_module)[0].weight.detach().clone())


class Decaying(UserModule):
    """A rate that changes after each step: the pull takes the one of the step before it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(qat.parameter_groups(self, lr=1e-2))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_fit_pulls_in_its_last_part_as_a_plain_loop_does(tmp_path: Path) -> None:
    module, plain, rates = Decaying(), Decaying(), Rates()
    callback = quantization(INT4, qat.StraightThrough(), cage=10.0, cage_from=0.5)
    trainer = quiet_trainer(tmp_path, callback, rates, accumulate_grad_batches=2)
    trainer.fit(module, loader(8))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks

    qat.prepare(plain.model, INT4, algorithm=qat.StraightThrough())
    configured = plain.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for number, batch in enumerate(loader(8)):
        (plain.loss(batch) / 2).backward()
        if number % 2:
            optimizer.step()
            cage_step(plain.model, optimizer, callback.schedule.cage_at(number // 2, 4))
            scheduler.step()
            optimizer.zero_grad()
            assert torch.equal(layers_of(plain)[0].weight, rates.weights[number])
    unpulled = Decaying()
    callback = quantization(INT4, qat.StraightThrough())
    quiet_trainer(tmp_path, callback, accumulate_grad_batches=2).fit(unpulled, loader(8))
    assert not torch.equal(unpulled.model.first.weight, module.model.first.weight)
    qat.freeze(module.model)


def test_float_steps_before_the_start_are_not_pulled(tmp_path: Path) -> None:
    weights = []
    for cage in (0.0, 10.0):
        rates = Rates()
        callback = quantization(INT4, cage=cage, cage_from=0.0, start_step=4)
        quiet_trainer(tmp_path, callback, rates).fit(UserModule(), loader(8))
        weights.append(rates.weights)
    same = [torch.equal(one, other) for one, other in zip(*weights, strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_a_fit_without_an_end_or_without_masters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qat.TrainingError, match=r"schedule: cage=1\.0 needs the number of steps: set max_steps"):
        quiet_trainer(tmp_path, quantization(INT4, cage=1.0), max_epochs=-1).fit(UserModule(), loader())

    class BiasesOnly(UserModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.ndim < 2], lr=0.1)

    module, callback = BiasesOnly(), quantization(INT4, qat.StraightThrough(), cage=1.0)
    with pytest.raises(qat.TrainingError, match=r"cage=1\.0 pulls trained weights .* no optimizer holds one: leave"):
        quiet_trainer(tmp_path, callback).fit(module, loader())
    assert module.losses == []


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(qat.TrainingError, match=r"cage=1\.0 needs whole weights, which Sharding shards: use ddp"):
        pull_after_steps(nn.Identity(), QuantizationSchedule(cage=1.0), [], lambda: 0, 4, "Sharding")
