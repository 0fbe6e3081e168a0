"""Codes without masters: the same values, gradients of scale and shift, and exactly these codes when frozen."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.codes_only import CodesLinear
from qat.errors import QatError, StateError
from qat.layers import quantized_layers
from qat.training.annealing import begin_with
from tests.helpers import DTYPES, WEIGHT_TYPES, LearnedStep, kept_by, tiny_model, tokens


def prepared(weights: Any = "int4", dtype: Any = "float32", **arguments: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 8))
    qat.prepare(model, qat.QuantSpec(weights=weights, dtype=dtype), algorithm=qat.LearnedAffine(), **arguments)
    return model


X = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight_quantizer.freeze(layer.weight)[0].codes for name, layer in quantized_layers(model)}


def train(model: nn.Module, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=lr, scale_lr=lr))
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_model_computes_what_it_computed(weights: str, dtype: str) -> None:
    model = prepared(weights, dtype)
    y, values = model(X), {n: layer.weight_quantizer.freeze(layer.weight)[1] for n, layer in quantized_layers(model)}
    codes = codes_of(model)
    report = qat.fix_codes(model)
    assert report.layers == ("0", "3")
    assert report.nbytes < report.nbytes_before / 2
    assert torch.equal(model(X), y)
    for name, layer in quantized_layers(model):
        frozen, value = layer.weight_quantizer.freeze(layer.weight)
        assert torch.equal(value, values[name])
        assert torch.equal(layer.weight, value.float())
        assert torch.equal(frozen.codes.float(), codes[name].float())
        assert frozen.codes.dtype is codes[name].dtype


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_gradients_are_those_of_a_float64_form(weights: str) -> None:
    """``y = x (s q - z)^T`` by autograd; sums in float32 agree to a part of their largest."""
    model = prepared(weights)
    qat.fix_codes(model)
    layer: Any = model[0]
    quantizer = layer.weight_quantizer
    x = X.clone().requires_grad_()
    y = layer(x)
    weighting = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y * weighting).sum().backward()
    start = quantizer.scale_start.double()
    moves = [torch.zeros_like(start, requires_grad=True) for _ in range(2)]
    rows = quantizer.codes.double().view(start.shape[0], -1)
    value = start * (1 + moves[0]) * rows
    if quantizer.shift_start is not None:
        value = value - (quantizer.shift_start.double() + moves[1] * start * (15 if weights == "int4" else 3) / 2)
    reference = X.double().requires_grad_()
    wanted = reference @ value.view(64, 256).t() + layer.bias.double()
    (wanted * weighting.double()).sum().backward()
    pairs = [(quantizer.scale_move, moves[0]), (x, reference)]
    if quantizer.shift_move is not None:
        pairs.append((quantizer.shift_move, moves[1]))
    for found, exact in pairs:
        assert found.grad is not None
        assert exact.grad is not None
        assert (found.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_training_moves_scales_and_shifts_alone_and_exactly_these_codes_are_served(
    weights: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepared(weights, "bfloat16")
    qat.fix_codes(model)
    codes, before = codes_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v.float(), before[n].float())}
    assert {name.rpartition(".")[2] for name in moved} <= {"scale_move", "shift_move"}
    assert {"0.weight_quantizer.scale_move", "3.weight_quantizer.scale_move"} <= moved
    values = {name: layer.weight_quantizer.freeze(layer.weight)[1] for name, layer in quantized_layers(model)}
    with caplog.at_level(logging.WARNING, logger="qat"):
        qat.freeze(model)
    assert not caplog.records
    qat.export(model, tmp_path / "out")
    architecture = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 8))
    qat.verify(tmp_path / "out", model, model=copy.deepcopy(architecture))
    served = qat.load(tmp_path / "out", model=architecture)
    from qat.formats import QUANTO

    for name, value in values.items():
        found = QUANTO.read(served.get_submodule(name)).weight
        assert torch.equal(found.codes.float(), codes[name].float())
        assert torch.equal(found.dequantize(), value)


def test_vectors_may_train_too() -> None:
    model = prepared()
    qat.fix_codes(model, vectors=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "quantizer" not in name} == {
        "0.bias",
        "1.weight",
        "1.bias",
        "3.bias",
    }


def test_nothing_as_large_as_a_float_weight_is_kept() -> None:
    model = prepared()
    qat.fix_codes(model)
    layer: Any = model[0]
    kept, _ = kept_by(lambda: layer(X))
    codes = layer.weight_quantizer.codes
    assert kept.beyond(X, codes) < codes.nbytes / 4  # scales and shifts, and what their gradients need
    assert not any(p.shape == (64, 256) for p in layer.parameters())


def test_activations_and_autocast() -> None:
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="bfloat16")
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    qat.calibrate(model, [X[:, :64]], spec=spec)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X[:, :64]).float()
        qat.fix_codes(model)
        found = model(X[:, :64]).float()
    found.square().mean().backward()
    # Masters multiply codes, where sums are exact; values are multiplied here, so bfloat16 rounds once more or less.
    assert (found - y).abs().max() <= 2**-6 * y.abs().max()
    qat.freeze(model)


def test_casts_and_pickles_keep_the_codes() -> None:
    model = prepared("float8")
    qat.fix_codes(model)
    codes = codes_of(model)
    file = io.BytesIO()
    torch.save(copy.deepcopy(model).to(torch.bfloat16), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert all(torch.equal(codes[n].float(), c.float()) for n, c in codes_of(again).items())
    assert all(layer.weight_quantizer.codes.dtype is torch.float8_e4m3fn for _, layer in quantized_layers(again))


def test_checkpoints_hold_codes_and_float_ones_are_refused() -> None:
    model, other, masters = prepared(), prepared(), prepared()
    qat.fix_codes(model)
    qat.fix_codes(other)
    train(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    for state in (masters.state_dict(), {k: v for k, v in masters.state_dict().items() if "quantizer" not in k}):
        with pytest.raises(StateError, match=r"int4 there, int4 codes here|holds float weights"):
            other.load_state_dict(state)


def test_after_reconstruction_of_a_language_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    spec = qat.QuantSpec(weights="int2", dtype="float32")
    qat.prepare(model, spec, algorithm=qat.LearnedAffine(), target="transformers")
    data = [{"input_ids": tokens(seed=seed)} for seed in range(2)]
    qat.reconstruct(model, data, steps=3, lr=1e-3)
    qat.fix_codes(model)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    model(**data[0], labels=data[0]["input_ids"]).loss.backward()
    optimizer.step()
    qat.freeze(model)
    qat.export(model, tmp_path / "out")
    qat.verify(tmp_path / "out", model)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_what_was_exported_trains_on_from_its_codes(weights: str, tmp_path: Path) -> None:
    model = prepared(weights, "bfloat16")
    codes = codes_of(model)
    qat.freeze(model)
    qat.export(model, tmp_path / "first")

    def architecture() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 8))

    loaded = qat.load(tmp_path / "first", model=architecture())
    y = loaded(X.bfloat16())
    report = qat.fix_codes(loaded)
    assert report.layers == ("0", "3")
    # Of a layer's sum of products, rounded to 8 bits, only the order may differ.
    assert (loaded(X.bfloat16()) - y).abs().max() <= 2**-6 * y.abs().max()
    optimizer = torch.optim.AdamW(qat.parameter_groups(loaded, lr=1e-2, scale_lr=1e-2))
    loaded(X.bfloat16()).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(found.float(), codes[name].float()) for name, found in codes_of(loaded).items())
    qat.freeze(loaded)
    qat.export(loaded, tmp_path / "second")
    qat.verify(tmp_path / "second", loaded, model=architecture())


def test_a_language_model_from_the_stock_loader_trains_on(tmp_path: Path) -> None:
    model = tiny_model("llama")
    spec = qat.QuantSpec(weights="int4", dtype="bfloat16")
    qat.prepare(model, spec, algorithm=qat.LearnedAffine(), target="transformers")
    qat.freeze(model)
    qat.export(model, tmp_path / "first")
    loaded = qat.load(tmp_path / "first")
    qat.fix_codes(loaded)
    optimizer = torch.optim.AdamW(qat.parameter_groups(loaded, lr=1e-2))
    loaded(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    qat.freeze(loaded)
    qat.export(loaded, tmp_path / "second")
    qat.verify(tmp_path / "second", loaded)


def test_frozen_models_that_cannot_train_on_are_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    qat.calibrate(model, [X[:, :64]], spec=qat.QuantSpec(weights="int8", activations="int8"))
    qat.freeze(model)
    with pytest.raises(StateError, match="2 layers quantize activations"):
        qat.fix_codes(model)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    qat.prepare(model, qat.QuantSpec(weights="int4"), algorithm=LearnedStep())
    qat.freeze(model)
    with pytest.raises(StateError, match="was frozen by 'learned_step'"):
        qat.fix_codes(model)


def _nan(model: nn.Sequential) -> None:
    model[3].weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (qat.fix_codes, "2 layers have codes only, since an earlier qat.fix_codes"),
        (_nan, "layer '3' holds inf or NaN"),
        (lambda model: setattr(model[3], "__class__", type("Mine", (type(model[3]),), {})), "1 layers are no plain"),
        (lambda model: model.to("meta"), "2 layers are on the meta device"),
        (lambda model: begin_with(model, "int4"), r"2 layers still train as int4 .*fixed as int2"),
    ],
    ids=["twice", "nan", "subclass", "meta", "first type"],
)
def test_what_cannot_be_fixed_is_refused(change: Any, message: str) -> None:
    model = prepared("int2")
    change(model)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(QatError, match=message):
        qat.fix_codes(model)
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_a_float_model_is_refused_and_so_is_reconstruction_afterwards() -> None:
    with pytest.raises(StateError, match="was not prepared"):
        qat.fix_codes(nn.Sequential(nn.Linear(4, 4)))
    model = prepared()
    qat.fix_codes(model)
    assert all(isinstance(layer, CodesLinear) for _, layer in quantized_layers(model))
    with pytest.raises(StateError, match="has codes only"):
        qat.reconstruct(model, [X], blocks=["0"])


def test_codes_that_no_data_has_started_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(256, 16))
    qat.prepare(model, qat.QuantSpec(weights="int4"))
    qat.fix_codes(model)
    assert "1 layers are fixed as they start with 'clip', for their own start needs data" in caplog.text


def test_several_processes_can_train_float8_codes(tmp_path: Path) -> None:
    """DistributedDataParallel sends buffers, and gloo knows no float8."""
    model = prepared("float8")
    qat.fix_codes(model)
    codes = codes_of(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(model)(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(found.float(), codes[name].float()) for name, found in codes_of(model).items())
