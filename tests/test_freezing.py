"""What is trained is what is stored: exactly, for every type, serving dtype and shape, over 2,000 seeded layers."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from optimum.quanto import freeze as quanto_freeze
from optimum.quanto import quantization_map, quantize, requantize
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError, QatError, StateError, TargetError
from qat.files.evidence import frozen_record
from qat.formats import QUANTO
from qat.freezing import freeze, frozen_copy
from qat.hosts import get_target
from qat.layers import QLinear, quantized_layers
from qat.numerics import FrozenWeight, QType
from qat.preparation import prepared_as
from qat.quantizers import Algorithm, Quantized, StraightThrough, WeightQuantizer
from qat.spec import LayerSpec, QuantSpec
from qat.tensors import digest
from tests.helpers import (
    DTYPES,
    WEIGHT_TYPES,
    LearnedStep,
    awkward_weight,
    of_diffusers,
    of_transformers,
    same_bits,
    tiny_model,
    tokens,
)

# One output row, odd sizes, and groups of 128, 96, 64, 32 and a whole row.
SHAPES = [
    (1, 8),
    (3, 5),
    (7, 33),
    (4, 96),
    (5, 128),
    (16, 256),
    (32, 384),
    (3, 192),
    (3, 320),
    (2, 160),
    (1, 256),
    (3, 200),
]
SEEDS = range(8)
QUANTO_NAMES = {"int8": "qint8", "float8": "qfloat8_e4m3fn", "int4": "qint4", "int2": "qint2"}


def zoo(seed: int = 0) -> nn.ModuleDict:
    """A layer of every shape."""
    layers = {f"{out}x{n}": nn.Linear(n, out, bias=False) for out, n in SHAPES}
    for layer in layers.values():
        layer.weight = nn.Parameter(awkward_weight(layer.out_features, layer.in_features, seed))
    return nn.ModuleDict(layers)


def spec_of(weights: str = "int8", dtype: str = "float32", activations: str | None = None) -> QuantSpec:
    return QuantSpec.model_validate({"weights": weights, "dtype": dtype, "activations": activations})


def forwards_weight(layer: nn.Module, in_features: int) -> Tensor:
    """The weight with which a layer multiplies: what it makes of the unit matrix, exactly."""
    with torch.no_grad():
        weight: Tensor = layer(torch.eye(in_features)).t()
    return weight


def stored(layer: nn.Module) -> FrozenWeight:
    return QUANTO.read(layer).weight


@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_frozen_weight_is_the_one_that_the_forward_used(weights: str, dtype: str, algorithm: Algorithm) -> None:
    for seed in SEEDS:
        model = zoo(seed)
        hazards = qat.prepare(model, spec_of(weights, dtype), algorithm=algorithm).inspection.layers
        used = {name: forwards_weight(layer, layer.in_features) for name, layer in quantized_layers(model)}
        assert len(used) == sum(row.weights is not None for row in hazards) >= len(SHAPES) - 2
        freeze(model)
        for name, weight in used.items():
            served = model[name].weight.dequantize()
            assert served.dtype is DTYPES[dtype]
            assert torch.equal(served.float(), weight), (name, seed)
            assert frozen_record(model).layers[name].weight == digest(served), (name, seed)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_frozen_codes_are_quantos_own_at_the_same_scale_and_shift(weights: str) -> None:
    qtype = QUANTO.qtypes[weights]
    for seed in SEEDS:
        model = zoo(seed)
        masters = {name: layer.weight.detach().clone() for name, layer in model.items()}
        qat.prepare(model, spec_of(weights))
        freeze(model, allow_unreached=True)
        for name, master in masters.items():
            codes, scale, shift = (getattr(stored(model[name]), part) for part in ("codes", "scale", "shift"))
            if shift is not None:
                size = qtype.group_size(master.shape[1])
                theirs = torch.ops.quanto.quantize_affine(master, qtype.bits, 0, size, scale, shift)
            else:
                one = master.shape[0] == 1  # one output row: quanto has it per tensor
                own = scale.reshape(()) if one else scale
                theirs = torch.ops.quanto.quantize_symmetric(master, codes.dtype, None if one else 0, own)
            # At scale 0 quanto's codes are NaN cast to an integer, and only values can be compared: all are equal.
            defined = (scale != 0).reshape(-1, 1).expand_as(theirs)
            ours = codes.reshape(theirs.shape).float()
            assert torch.equal(ours[defined], theirs.float()[defined]), (name, seed)


@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_stock_freezing_gives_the_same_weights_in_float32_only(weights: str) -> None:
    # Why we pack: quanto computes its codes in the serving dtype, from scales that it finds there again.
    changed = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        stock = nn.Sequential(nn.Linear(256, 64, bias=False))
        ours = nn.Sequential(nn.Linear(256, 64, bias=False))
        ours[0].load_state_dict(stock[0].state_dict())
        qat.prepare(ours, spec_of(weights, dtype), algorithm=qat.StraightThrough())
        freeze(ours, allow_unreached=True)
        quantize(stock.to(DTYPES[dtype]), weights=QUANTO_NAMES[weights])
        quanto_freeze(stock)
        theirs, mine = stored(stock[0]).codes, stored(ours[0]).codes
        changed[dtype] = float((theirs.float() != mine.float()).float().mean())
    assert changed["float32"] == 0
    assert 0 < changed["bfloat16"] < 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_state_has_quantos_keys(weights: str, dtype: str) -> None:
    model = nn.Sequential(nn.Linear(256, 16), nn.Linear(16, 1))
    qat.prepare(model, spec_of(weights, dtype))
    freeze(model, allow_unreached=True)
    inner = (
        ["weight._data._data", "weight._scale", "weight._shift"]
        if QUANTO.qtypes[weights].has_shift
        else ["weight._data", "weight._scale"]
    )
    expected = {f"{layer}.{key}" for layer in (0, 1) for key in [*inner, "bias", "input_scale", "output_scale"]}
    state = model.state_dict()
    assert set(state) == expected
    for key, tensor in state.items():
        if "_data" not in key:
            assert tensor.dtype is DTYPES[dtype], key
        assert not tensor.requires_grad
    assert state["0.input_scale"] == state["0.output_scale"] == 1
    if not QUANTO.qtypes[weights].has_shift:
        assert state["0.weight._scale"].shape == (16, 1)
        assert state["1.weight._scale"].shape == ()  # one output row: quanto has it per tensor


@pytest.mark.parametrize("algorithm", [StraightThrough(), LearnedStep()], ids=lambda a: str(a.kind))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_quantos_loader_serves_the_same_outputs(weights: str, dtype: str, algorithm: Algorithm) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))

    trained = model()
    qat.prepare(trained, spec_of(weights, dtype), algorithm=algorithm)
    freeze(trained, allow_unreached=True)
    loaded = model().to(DTYPES[dtype])
    requantize(loaded, {key: t.clone() for key, t in trained.state_dict().items()}, quantization_map(trained))
    x = torch.randn(5, 256).to(DTYPES[dtype])
    with torch.no_grad():
        assert same_bits(loaded(x), trained(x))
    assert [type(layer.weight) for layer in (loaded[0], loaded[3])] == [
        type(layer.weight) for layer in (trained[0], trained[3])
    ]


def test_a_trained_scale_is_frozen_and_a_checkpoint_of_it_too() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 16))
        qat.prepare(made, spec_of("int4", "bfloat16"), algorithm=LearnedStep())
        return made

    trained, resumed = model(), model()
    optimizer = torch.optim.Adam(qat.parameter_groups(trained, lr=1e-3, scale_lr=1e-2))
    x, target = torch.randn(32, 256), torch.randn(32, 16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (trained(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    resumed.load_state_dict(trained.state_dict(), strict=True)
    used = {
        name: forwards_weight(layer, layer.in_features) - layer.bias.detach().unsqueeze(1)
        for name, layer in quantized_layers(trained)
    }
    served = {
        name: layer.weight_quantizer.quantize(layer.weight, torch.bfloat16).value
        for name, layer in quantized_layers(trained)
    }
    learned = {name: layer.weight_quantizer.freeze(layer.weight)[0].scale for name, layer in quantized_layers(trained)}
    freeze(trained)
    freeze(resumed)
    assert frozen_record(trained) == frozen_record(resumed)
    for name, weight in served.items():
        assert same_bits(trained.get_submodule(name).weight.dequantize(), weight)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(used[name], weight.float(), rtol=1e-5, atol=1e-6)
        assert same_bits(stored(trained.get_submodule(name)).scale, learned[name])


def test_freezing_is_reported_and_recorded() -> None:
    model = zoo()
    qat.prepare(model, QuantSpec(weights="int4", dtype="float32", overrides={"3x5": "int8"}))
    report = freeze(model, allow_unreached=True)
    assert set(report.layers) == set(model)
    assert (report.target, report.dtype) == ("quanto", "float32")
    assert str(report) == f"froze {len(SHAPES)} layers (int4, int8) for target 'quanto', served in float32"
    assert frozen_record(model).layers == report.layers


def test_a_frozen_model_is_ready_to_run() -> None:
    model = tiny_model("llama").train()
    qat.prepare(model, QuantSpec(), target="transformers")
    freeze(model, allow_unreached=True)
    assert not model.training
    assert not any(isinstance(module, QLinear) for module in model.modules())
    for name, module in model.named_modules():
        if hasattr(module, "weight_qtype"):
            assert not module.weight.requires_grad, name  # type: ignore[union-attr]
    with torch.no_grad():
        assert model(input_ids=tokens()).logits.dtype is torch.bfloat16


def test_only_what_the_loader_casts_is_cast() -> None:
    model = tiny_model("llama")
    rotary = model.get_submodule("model.rotary_emb").inv_freq.clone()  # type: ignore[operator, union-attr]
    qat.prepare(model, QuantSpec(exclude="*.mlp.*"), target="transformers")
    freeze(model, allow_unreached=True)
    assert {p.dtype for name, p in model.named_parameters() if "weight" in name} == {torch.bfloat16}
    assert same_bits(model.get_submodule("model.rotary_emb").inv_freq, rotary)  # type: ignore[arg-type]
    assert model.config.dtype is torch.bfloat16  # type: ignore[union-attr]


class Keeping(nn.Module):
    _keep_in_fp32_modules = ("gate",)

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 64)
        self.body = nn.Linear(64, 64)
        self.register_buffer("table", torch.randn(3), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize(("target", "kept"), [("quanto", False), ("transformers", False), ("diffusers", True)], ids=str)
def test_every_tensor_has_the_dtype_that_the_targets_loader_gives_it(target: str, kept: bool) -> None:
    made = {"diffusers": of_diffusers, "transformers": of_transformers}.get(target, lambda model: model)
    model: Any = made(Keeping())
    qat.prepare(model, QuantSpec(exclude="gate"), target=target)
    freeze(model, allow_unreached=True)
    assert model.gate.weight.dtype is (torch.float32 if kept else torch.bfloat16)
    assert model.mean.dtype is torch.bfloat16  # type: ignore[union-attr]
    assert model.table.dtype is torch.float32  # type: ignore[union-attr]
    assert model.count.dtype is torch.int64  # type: ignore[union-attr]


def test_freezing_for_another_target() -> None:
    model: Any = of_diffusers(Keeping())
    qat.prepare(model, QuantSpec(dtype="float32"))
    with pytest.raises(
        TargetError,
        match=r"1 quantized layers .* such as gate \(the loader never quantizes .*\): prepare for the target",
    ):
        freeze(model, target="diffusers", allow_unreached=True)
    assert isinstance(model.gate, QLinear)
    assert freeze(model, allow_unreached=True).target == "quanto"
    moved = of_transformers(Keeping())
    qat.prepare(moved, QuantSpec(dtype="float32"))
    assert freeze(moved, target="transformers", allow_unreached=True).target == "transformers"
    other = nn.Sequential(nn.Linear(8, 8))
    qat.prepare(other, spec_of(activations="int8"))
    qat.calibrate(other, [torch.ones(2, 8)])
    with pytest.raises(
        TargetError, match=r"prepared for 'quanto' and cannot be served by 'diffusers': model: .*; activations='int8'"
    ):
        freeze(other, target="diffusers")
    with pytest.raises(TargetError, match="target: must be one of"):
        freeze(other, target="onnx")
    assert freeze(other).target == "quanto"


def test_only_a_prepared_model_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        StateError, match=r"was not prepared: call qat.prepare\(model, spec\) first, on this same module"
    ):
        freeze(model)
    qat.prepare(model, spec_of())
    freeze(model, allow_unreached=True)
    with pytest.raises(StateError, match=r"model: is frozen already: export it with qat.export"):
        freeze(model, allow_unreached=True)
    with pytest.raises(StateError, match="model: is frozen already"):
        qat.calibrate(model, [torch.ones(2, 8)])


def test_activations_that_were_never_calibrated_are_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train()
    spec = QuantSpec(dtype="bfloat16", weights="int4", overrides={"1": LayerSpec(weights="int4", activations="int8")})
    qat.prepare(model, spec)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"run qat.calibrate\(model, batches\)"):
        freeze(model, allow_unreached=True)
    assert all(isinstance(layer, QLinear) for layer in model)
    assert model.training
    assert prepared_as(model).spec == get_target("quanto").resolved(spec)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    qat.calibrate(model, [torch.ones(2, 8)])
    freeze(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("key", ["weight", "bias", "weight_quantizer.log_scale"])
def test_a_master_that_is_not_finite_is_refused_and_nothing_changes(key: str, value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 16)).train()
    qat.prepare(model, spec_of(), algorithm=LearnedStep())
    with torch.no_grad():
        model[1].get_parameter(key).view(-1)[3] = value
    with pytest.raises(StateError, match=rf"layer '1' holds inf or NaN in its {key}, .*: go back to an earlier"):
        freeze(model, allow_unreached=True)
    assert all(isinstance(layer, QLinear) for layer in model)
    assert model.training
    assert prepared_as(model).spec == spec_of()


def test_a_frozen_copy_leaves_the_model_training() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).train()
    qat.prepare(model, spec_of())
    copied = frozen_copy(model)
    assert isinstance(model[0], QLinear)
    assert model.training
    assert model[0].weight.requires_grad
    x = torch.randn(3, 64)
    torch.testing.assert_close(copied(x), model(x).detach(), rtol=1e-5, atol=1e-6)


class Restless(Algorithm):
    """Its scale is another one at every call."""

    kind: Literal["restless"] = "restless"

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> WeightQuantizer:
        class Quantizer(WeightQuantizer):
            calls = 0

            def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
                self.calls += 1
                return self.by_scale(weight, torch.full((weight.shape[0], 1), 0.01 * self.calls), None, out_dtype)

        return Quantizer(qtype, dtype)


def test_a_quantizer_that_freezes_to_another_weight_than_it_trained_is_found() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    qat.prepare(model, spec_of(), algorithm=Restless())
    with pytest.raises(QatError, match=r"layer '0': it dequantizes to other values .* a fault of Quantizer"):
        freeze(model, allow_unreached=True)


@pytest.mark.parametrize(("scale", "sign"), [(1.0, -1), (float("inf"), 1)], ids=["zeros of two signs", "nan"])
def test_values_of_other_bits_and_those_that_are_no_numbers_are_found(
    scale: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(self: WeightQuantizer, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        found = self.by_scale(weight, torch.full((8, 1), scale), None, out_dtype)
        return found._replace(value=found.value * sign)

    model = nn.Sequential(nn.Linear(64, 8))  # with scale 1, its weights are codes of zero
    qat.prepare(model, spec_of(), algorithm=StraightThrough())
    monkeypatch.setattr(type(model[0].weight_quantizer), "quantize", quantize)
    with pytest.raises(QatError, match="it dequantizes to other values"):
        freeze(model)


def test_a_layer_within_layers_and_a_tied_embedding_stay_what_they_are() -> None:
    model = tiny_model("opt", tie_word_embeddings=True)
    qat.prepare(model, QuantSpec(weights="int8"), target="transformers")
    freeze(model, allow_unreached=True)
    head, embedding = model.get_submodule("lm_head"), model.get_submodule("model.decoder.embed_tokens")
    assert head.weight is embedding.weight
    assert head.weight.dtype is torch.bfloat16
