"""Whole runs with the callback: resumed, in other precisions, accumulated, compiled, and without Lightning at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

import qat
from tests.training_modules import (
    INT4,
    INT8,
    INT8_INT8,
    LateModule,
    LearnedStep,
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

RUNS = {
    "int4": {"spec": INT4},
    "int8 learned": {"spec": INT8, "algorithm": LearnedStep()},
    "int8 activations": {"spec": INT8_INT8},
    "int8 activations, learned": {"spec": INT8_INT8, "algorithm": LearnedStep()},
    "observed while training": {"spec": INT8_INT8, "calibration_batches": 1, "observe_from": 1, "observe_until": 9},
    "delayed": {"spec": INT4, "start_step": 8},
}


def arrives_quantized(layer: Any) -> bool:
    return layer.input_quantizer is not None and layer.input_quantizer.arrives_quantized


@pytest.mark.parametrize(
    ("accumulate", "cut_after"), [(1, 12), (2, 6)], ids=["each batch, in the second epoch", "two batches, in the first"]
)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(
    run: dict[str, Any], accumulate: int, cut_after: int, tmp_path: Path
) -> None:
    """Cut in the middle of an epoch; only tensors and plain data are read back."""
    whole, cut, resumed = UserModule(), UserModule(), UserModule()
    with torch.no_grad():
        resumed.model.first.weight.zero_()  # whatever it starts from must not matter
    limits = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    at = cut_after // accumulate
    quiet_trainer(tmp_path, quantization(**run), **limits).fit(whole, ResumableLoader())
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=at)
    quiet_trainer(tmp_path, quantization(**run), saver, **{**limits, "max_epochs": 3}, max_steps=at).fit(
        cut, ResumableLoader()
    )
    path = saver.best_model_path
    again = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=at)
    trainer = quiet_trainer(tmp_path, quantization(**run), again, **limits)
    trainer.fit(resumed, ResumableLoader(), ckpt_path=path, weights_only=True)
    assert len(cut.losses) == cut_after
    assert cut.losses + resumed.losses == whole.losses
    assert_equal_state(resumed, whole)
    for one, other in zip(layers_of(resumed), layers_of(whole), strict=True):
        assert arrives_quantized(one) == arrives_quantized(other)
    assert not run["spec"].activations or arrives_quantized(whole.model.second)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_scales_stay_float32_in_every_precision(precision: str, tmp_path: Path) -> None:
    class Single(UserModule):
        def loss(self, batch: list[Tensor]) -> Tensor:
            assert batch[0].dtype == master or "mixed" in precision
            return super().loss(batch)

    masters = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
    master = masters.get(precision, torch.float32)
    module = Single()
    callback = quantization(INT8_INT8, LearnedStep())
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = quiet_trainer(tmp_path, callback, saver, precision=precision, gradient_clip_val=1.0, max_epochs=4)
    trainer.fit(module, loader())
    for layer in layers_of(module):
        assert layer.weight.dtype == master
        state = [*layer.weight_quantizer.state_dict().values(), *layer.input_quantizer.state_dict().values()]
        assert {tensor.dtype for tensor in state if tensor.is_floating_point()} == {torch.float32}
    saved = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    assert saved["model.first.weight_quantizer.scale"].dtype == torch.float32
    assert saved["model.first.weight"].dtype == master
    assert sum(module.losses[-8:]) < sum(module.losses[:8])
    qat.freeze(module.model)


def test_scales_stay_float32_in_a_model_built_under_bf16_true(tmp_path: Path) -> None:
    module = LateModule()
    callback = quantization(INT8_INT8, LearnedStep())
    quiet_trainer(tmp_path, callback, precision="bf16-true", max_steps=2).fit(module, loader())
    layer = module.model.first
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight_quantizer.scale.dtype == torch.float32
    assert layer.output_quantizer.scale.dtype == torch.float32


def test_accumulated_batches_train_like_one_large_batch(tmp_path: Path) -> None:
    many, one = UserModule(), UserModule()
    quiet_trainer(tmp_path, quantization(INT8), accumulate_grad_batches=2).fit(many, loader(2))
    data = loader(2).dataset
    quiet_trainer(tmp_path, quantization(INT8)).fit(one, torch.utils.data.DataLoader(data, batch_size=8))
    assert torch.allclose(many.model.first.weight, one.model.first.weight, atol=1e-4)
    assert not torch.allclose(many.model.first.weight, UserModule().model.first.weight, atol=1e-4)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_gradient_checkpointing_changes_nothing(run: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain, recomputed = UserModule(Tiny()), UserModule(Tiny(checkpointing=True))
    recomputed.load_state_dict(plain.state_dict())
    for module in (plain, recomputed):
        quiet_trainer(tmp_path, quantization(**run)).fit(module, loader())
    assert plain.losses == recomputed.losses
    scales = [name for name in plain.state_dict() if name.endswith(("weight", "scale"))]
    assert all(torch.equal(plain.state_dict()[name], recomputed.state_dict()[name]) for name in scales)


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.parametrize(
    ("spec", "when"),
    [(INT4, "after its first call"), (INT8_INT8, "before its first call")],
    ids=["int4, after its first call", "int8 activations, before"],
)
def test_a_compiled_model_trains_like_an_eager_one(spec: qat.QuantSpec, when: str, tmp_path: Path) -> None:
    """Traced without generated code, which other tests compare; here it matters that the new layers are traced."""
    torch.compiler.reset()
    eager, compiled = UserModule(), UserModule()
    compiled.model = torch.compile(compiled.model, backend="aot_eager")
    if when == "after its first call":
        compiled.model(torch.randn(4, 32))
    for module in (eager, compiled):
        quiet_trainer(tmp_path, quantization(spec, start_step=2)).fit(module, loader())
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert set(qat.freeze(compiled.model._orig_mod).layers) == {"first", "second", "head"}


def test_a_plain_loop_with_the_four_calls(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    batches = list(loader())

    qat.prepare(model, spec)
    qat.calibrate(model, [x for x, _ in batches])
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(4):
        for x, y in batches:
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    qat.calibrate(model, [x for x, _ in batches])
    qat.freeze(model)
    qat.export(model, tmp_path / "out", target="quanto", example_inputs=(batches[0][0],))

    assert sum(losses[-8:]) < sum(losses[:8])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_trained_user_module_freezes_to_what_its_forward_used(tmp_path: Path) -> None:
    module = UserModule()
    quiet_trainer(tmp_path, quantization(INT4), max_epochs=2).fit(module, loader())
    trained = [layer.weight_quantizer.quantize(layer.weight, torch.float32).value for layer in layers_of(module)]
    x = inputs_of(loader())[0]
    outputs = module.eval().model(x).detach()
    qat.freeze(module.model)
    frozen = [module.model.first, module.model.second, module.model.head]
    assert all(torch.equal(layer.weight.dequantize(), weight) for layer, weight in zip(frozen, trained, strict=True))
    assert torch.allclose(module.model(x), outputs, atol=1e-5)
