"""Block-wise reconstruction: errors fall, everything else stays, and what is frozen afterwards is what was trained."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError, QatError, SpecError, StateError, TrainingError
from qat.layers import quantized_layers
from qat.reconstruction import BlockReport

INT2 = qat.QuantSpec(weights="int2", dtype="float32")
FAST: dict[str, Any] = {"steps": 12, "lr": 2e-3}


class Block(nn.Module):
    """With a norm, dropout, and an argument that comes by keyword."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, 64), nn.Linear(64, features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.up(self.norm(x)).relu())) * scale


class Chain(nn.Module):
    """Blocks one after another, with a layer before and one after them."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, scale=torch.full((1,), scale))
        y: Tensor = self.head(h)
        return y


class U(Chain):
    """Two lists; the second half gets skip connections, and runs in the opposite order of its list."""

    def __init__(self) -> None:
        super().__init__(2)
        self.ups = nn.ModuleList(Joining() for _ in range(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h, kept = self.embed(x), []
        for block in self.blocks:
            h = block(h, scale=torch.ones(1))
            kept.append(h)
        for block, skipped in zip(reversed(self.ups), reversed(kept), strict=True):
            h, _ = block(h, {"skipped": skipped})
        y: Tensor = self.head(h)
        return y


class Joining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(64, 32)

    def forward(self, x: Tensor, others: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = self.join(torch.cat([x, others["skipped"]], -1))
        others["skipped"].zero_()  # a block may change what it is given
        return y, torch.full((1, 1), torch.inf)  # no hidden state


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, generator=generator) for _ in range(count)]


def prepared(model: nn.Module | None = None, spec: qat.QuantSpec = INT2, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Chain() if model is None else model
    qat.prepare(model, spec, algorithm=qat.LearnedAffine(), **arguments)
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def block_errors(model: nn.Module, original: nn.Module, names: list[str], data: list[Tensor]) -> list[float]:
    """Error of the outputs of blocks when the whole model runs quantized, against the float model, in float64."""

    def outputs(of: nn.Module) -> list[list[Tensor]]:
        found: list[list[Tensor]] = [[] for _ in names]
        hooks = [
            of.get_submodule(name).register_forward_hook(lambda _, __, y, kept=kept: kept.append(y.double()))
            for name, kept in zip(names, found, strict=True)
        ]
        with torch.no_grad():
            for x in data:
                of.eval()(x)
        for hook in hooks:
            hook.remove()
        return found

    pairs = zip(outputs(model), outputs(original), strict=True)
    return [
        sum(float(((y - t) ** 2).sum() / (t**2).sum()) for y, t in zip(*pair, strict=True)) / len(data)
        for pair in pairs
    ]


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_the_error_of_every_block_falls_and_nothing_outside_moves(inputs: Any) -> None:
    model = prepared()
    original, before = Chain(), values(model)
    original.load_state_dict(before, strict=False)
    report = qat.reconstruct(model, batches(), inputs=inputs, **FAST)
    assert list(report.blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(block.after < block.before and block.calls == 3 for block in report.blocks.values())
    moved = changed(model, before)
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias", "low_move", "high_move"}
    assert all(name.startswith("blocks.") for name in moved)
    if inputs == "quantized":  # the errors are those of the quantized model, up to sums in float32
        found = block_errors(model, original, list(report.blocks), batches())
        assert found == pytest.approx([block.after for block in report.blocks.values()], rel=1e-4)


def test_float_inputs_give_the_float_models_outputs_at_each_block() -> None:
    """The blocks before are trained by then, and still the targets are those of the model as it was."""
    model = prepared()
    single = copy.deepcopy(model)
    whole = qat.reconstruct(model, batches(), inputs="float", steps=1, lr=1e-9)
    alone = qat.reconstruct(single, batches(), inputs="float", steps=1, lr=1e-9, blocks=["blocks.2"])
    trained = qat.reconstruct(prepared(), batches(), inputs="float", **FAST)
    assert whole.blocks["blocks.2"].before == alone.blocks["blocks.2"].before == trained.blocks["blocks.2"].before


def test_a_u_shaped_model_in_the_order_in_which_it_runs() -> None:
    model = prepared(U())
    report = qat.reconstruct(model, batches(), **FAST)
    assert list(report.blocks) == ["blocks.0", "blocks.1", "ups.1", "ups.0"]
    assert all(block.after < block.before for block in report.blocks.values())


def test_modes_random_numbers_gradients_and_attributes_are_as_before() -> None:
    model = prepared().train()
    layers = dict(quantized_layers(model))
    model.blocks[0].dropout.eval()
    model.blocks[0].up.weight.grad = gradient = torch.ones(64, 32)
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        qat.reconstruct(model, batches(), **FAST)
    assert torch.equal(torch.rand(1), expected)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert model.blocks[0].up.weight.grad is gradient
    assert not any(layer.reached or layer.mode != type(layer.mode)() for layer in layers.values())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_a_seed_decides_everything() -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        model = prepared()
        torch.manual_seed(seed + 100)  # the caller's own numbers do not matter
        qat.reconstruct(model, batches(), forward=noisy, seed=seed, **FAST)
        return values(model)

    def noisy(model: nn.Module, x: Tensor) -> None:
        model(x + torch.randn(x.shape))

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_vectors_may_stay() -> None:
    model = prepared()
    before = values(model)
    qat.reconstruct(model, batches(), vectors=False, **FAST)
    assert {name.rpartition(".")[2] for name in changed(model, before)} == {"weight", "low_move", "high_move"}
    assert not any("norm" in name for name in changed(model, before))


def test_a_norm_that_two_blocks_share_stays() -> None:
    model = Chain()
    model.blocks[1].norm = model.blocks[0].norm
    before = values(prepared(model))
    qat.reconstruct(model, batches(), **FAST)
    assert {name for name in changed(model, before) if ".norm" in name} == {
        "blocks.2.norm.weight",
        "blocks.2.norm.bias",
    }


def test_a_block_that_got_worse_is_as_it_was_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared()
    before = values(model)
    with caplog.at_level(logging.WARNING, logger="qat"):
        report = qat.reconstruct(model, batches(), steps=3, lr=30.0, blocks=["blocks.1"])
    assert report.restored == ("blocks.1",)
    assert not changed(model, before)
    assert "blocks.1" in caplog.text
    assert "worse, restored" in report.table()
    assert "1 got worse and are as they were" in str(report)


def test_a_loss_that_is_not_finite_restores_the_block_and_names_it() -> None:
    model = prepared()
    before = values(model)
    with pytest.raises(TrainingError, match=r"block 'blocks\.0' ended in inf or NaN"):
        qat.reconstruct(model, batches(), steps=3, lr=1e30)
    assert not changed(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_frozen_and_exported_is_what_was_reconstructed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepared(spec=qat.QuantSpec(weights="int4", dtype="bfloat16"))
    qat.reconstruct(model, batches(), **FAST)
    with caplog.at_level(logging.WARNING, logger="qat"):
        wanted = {n: layer.weight_quantizer.freeze(layer.weight)[1] for n, layer in quantized_layers(model)}
        qat.freeze(model)
    assert not caplog.records  # of layers outside the blocks, which nothing trained
    qat.export(model, tmp_path / "out")
    qat.verify(tmp_path / "out", model, model=Chain())
    served = qat.load(tmp_path / "out", model=Chain())
    assert all(torch.equal(served.get_submodule(name).weight.dequantize(), value) for name, value in wanted.items())


def test_training_afterwards_that_changes_nothing_is_still_said(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared()
    qat.reconstruct(model, batches(), **FAST)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(batches()[0]).square().mean().backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, logger="qat"):
        qat.freeze(model)
    assert "training never changed the weights of 8 layers" in caplog.text


def test_activations_are_quantized_and_their_learned_scales_move() -> None:
    model = Chain()
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    qat.prepare(model, spec, algorithm=qat.LearnedAffine(learn_activations=True))
    with pytest.raises(CalibrationError, match="a scale was never set"):
        qat.reconstruct(model, batches())
    qat.calibrate(model, batches())
    before = values(model)
    report = qat.reconstruct(model, batches(), steps=20, lr=1e-4)
    assert all(block.after <= block.before or block.restored for block in report.blocks.values())
    assert any(name.endswith("input_quantizer.move") for name in changed(model, before))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, SpecError, "steps: must be a whole number of at least 1, got 0"),
        ({"seed": -1}, SpecError, "seed: must be"),
        ({"lr": 0.0}, SpecError, "lr: must be a number above 0"),
        ({"scale_lr": float("nan")}, SpecError, "scale_lr: must be a number above 0"),
        ({"inputs": "both"}, SpecError, "inputs: must be one of"),
        ({"blocks": []}, SpecError, "blocks: must be a list"),
        ({"blocks": "blocks.0"}, SpecError, "blocks: must be a list"),
        ({"blocks": ["blocks.7"]}, SpecError, "'blocks.7' is no module"),
        ({"blocks": ["blocks.0.norm"]}, SpecError, "'blocks.0.norm' is no module of the model with a quantized layer"),
        ({"blocks": ["blocks", "blocks.1"]}, SpecError, "'blocks.1' lies inside 'blocks'"),
        ({"batches": []}, CalibrationError, "at least one batch"),
        ({"batches": torch.ones(2, 16)}, CalibrationError, "must be several batches"),
        ({"batches": [torch.ones(2, 5)]}, CalibrationError, "cannot run batch 0"),
        ({"batches": [torch.full((2, 16), torch.nan)]}, CalibrationError, "block 'blocks.0' gives inf or NaN"),
        ({"forward": lambda model, x: model.embed(x)}, CalibrationError, "3 blocks were never reached in 3 batches"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_and_changes_nothing(
    arguments: dict[str, Any], error: type[QatError], message: str
) -> None:
    model = prepared()
    before = values(model)
    with pytest.raises(error, match=message):
        qat.reconstruct(model, **({"batches": batches()} | FAST | arguments))
    assert not changed(model, before)
    assert model(batches()[0]).requires_grad
    assert all(layer.mode == type(layer.mode)() for _, layer in quantized_layers(model))


def test_models_that_cannot_be_reconstructed_are_refused() -> None:
    with pytest.raises(StateError, match="was not prepared"):
        qat.reconstruct(Chain(), batches())
    with pytest.raises(SpecError, match="no list of blocks"):
        qat.reconstruct(prepared(nn.Sequential(nn.Linear(16, 16))), batches())
    model = prepared()
    model.blocks[0].requires_grad_(False)
    with pytest.raises(SpecError, match=r"'blocks\.0' has nothing to train"):
        qat.reconstruct(model, batches())
    spec = qat.QuantSpec(weights="int2", include=("head",))
    with pytest.raises(SpecError, match="none of its blocks has a quantized layer"):
        qat.reconstruct(prepared(spec=spec), batches())
    model = prepared()
    model.blocks[1]._compiled_call_impl = model.blocks[1]._call_impl  # as compile() sets it
    with pytest.raises(StateError, match=r"blocks\.1 is compiled"):
        qat.reconstruct(model, batches())
    with pytest.raises(StateError, match=r"embed\.weight is float16, .*: convert the model to float32 or bfloat16"):
        qat.reconstruct(prepared(Chain().half()), batches())
    model = prepared()
    qat.freeze(model)
    with pytest.raises(StateError, match="is frozen already"):
        qat.reconstruct(model, batches())


def test_a_block_that_is_called_otherwise_once_quantized() -> None:
    class Gated(Chain):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            h = self.embed(x)
            for number, block in enumerate(self.blocks):
                if number < 2 or not self.embed.mode.weights:
                    h = block(h, scale=torch.ones(1))
            y: Tensor = self.head(h)
            return y

    model = prepared(Gated())
    with pytest.raises(CalibrationError, match=r"calls block 'blocks\.2' with other shapes, or less often"):
        qat.reconstruct(model, batches(), **FAST)


def test_the_report() -> None:
    report = qat.ReconstructionReport(2, {"a": BlockReport(0.5, 0.25, 2), "b": BlockReport(0.5, 0.75, 2)})
    assert str(report) == (
        "reconstructed 2 blocks on 2 batches: mean error 0.5 -> 0.375; 1 got worse and are as they were"
    )
    assert report.table().splitlines()[1].split() == ["a", "0.5", "0.25", "2"]
