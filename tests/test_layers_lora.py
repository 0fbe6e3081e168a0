"""LoRA's layer: the merged weight bit for bit, its gradients, what is kept for backward, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.errors import StateError, TrainingError
from qat.layers.lora import QLoraLinear
from qat.training.cage import pull_after_steps
from tests.helpers import kept_by, same_bits

KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
}
TYPES: tuple[Any, ...] = ("int8", "float8", "int4", "int2")


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, autocast: bool = True, **config: Any) -> Any:
    """A PeftModel of one layer, whose adapter is not zero."""
    torch.manual_seed(seed)
    inner = nn.Sequential(nn.Linear(128, 48)).to(dtype)
    config = {"r": 8, "lora_alpha": 12, "target_modules": ["0"]} | config
    model = get_peft_model(inner, LoraConfig(**config), autocast_adapter_dtype=autocast)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "magnitude" in name:
                parameter.mul_(1.1)
    return model


def layer_of(model: Any) -> Any:
    return model.get_base_model()[0]


def prepared(weights: Any = "int4", algorithm: Any = None, *, dtype: Any = "float32", **config: Any) -> Any:
    model = adapted(**config)
    qat.prepare(model, qat.QuantSpec(weights=weights, dtype=dtype), algorithm=algorithm)
    return model


@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapter", "adapter-as-base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_what_peft_merges(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    for seed in range(5):
        model = adapted(seed, dtype, autocast, **KINDS[kind])
        found = QLoraLinear.effective_weight(layer_of(model)).detach()
        merged: Any = model.merge_and_unload()
        assert same_bits(found, merged[0].weight)


@pytest.mark.parametrize("seed", range(20))
def test_the_frozen_weight_is_the_trained_one(seed: int) -> None:
    kind, weights = list(KINDS)[seed % 3], TYPES[seed % 4]
    model = prepared(weights, dtype="bfloat16", seed=seed, **KINDS[kind])
    start, x = copy.deepcopy(model.state_dict()), torch.randn(16, 128)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-2, scale_lr=1e-3))
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer, seen = layer_of(model), []
    with torch.no_grad():
        made = layer.weight_quantizer.quantize(layer.effective_weight(layer), torch.bfloat16).value
        layer.weight_quantizer.quantize, original = (
            lambda *a: seen.append(original(*a)) or seen[0],
            layer.weight_quantizer.quantize,
        )
        model(x)
        del layer.weight_quantizer.quantize
    assert torch.equal(seen[0].value.bfloat16(), made)  # what a forward uses
    trained = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert trained
    assert not any("base_layer" in key for key in trained)
    qat.freeze(model)
    assert same_bits(model.get_base_model()[0].weight.dequantize(), made)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_merged_weight_handed_on(kind: str, weights: Any) -> None:
    model, x, y = prepared(weights, **KINDS[kind]), torch.randn(6, 128), torch.randn(6, 48)
    layer, names = layer_of(model), ("lora_A", "lora_B", "lora_magnitude_vector")
    plain = nn.Sequential(nn.Linear(128, 48))
    plain[0].weight.data, plain[0].bias.data = QLoraLinear.effective_weight(layer).detach(), layer.bias.detach()
    qat.prepare(plain, qat.QuantSpec(weights=weights, dtype="float32"))
    plain[0].weight_quantizer.load_state_dict(layer.weight_quantizer.state_dict())
    given = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = model(given[0]), plain(given[1])
    for output in outputs:
        output.backward(y)
    assert torch.equal(*outputs)
    assert torch.equal(given[0].grad, given[1].grad)
    ranges = zip(layer.quantizer_parameters(), plain[0].quantizer_parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in ranges)
    a, b, *m = (getattr(layer, part)["default"].weight for part in names if getattr(layer, part))
    value = layer.base_layer.weight.detach() + layer.scaling["default"] * (b @ a)
    merged = (m[0] / value.norm(dim=1).detach()).view(-1, 1) * value if m else value
    wanted = torch.autograd.grad(merged, (a, b, *m), plain[0].weight.grad)
    for parameter, grad in zip((a, b, *m), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)
    assert layer.base_layer.weight.grad is None


def test_inspection_holds_no_merged_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of(adapted(dtype=dtype))
        like, weight = QLoraLinear.like_weight(layer), QLoraLinear.effective_weight(layer)
        assert (like.shape, like.dtype, like.device) == (weight.shape, weight.dtype, weight.device)
        assert like.untyped_storage().nbytes() == dtype.itemsize


def test_a_base_that_trains_gets_its_gradient() -> None:
    model = prepared("int8")
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_()
    model(torch.randn(4, 128)).sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_nothing_of_the_size_of_the_weight_is_kept(kind: str, autocast: bool) -> None:
    model, x = prepared("int4", **KINDS[kind]), torch.randn(4, 128)
    layer = layer_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept, output = kept_by(lambda: model(x))
    base = layer.base_layer.weight
    assert base.data_ptr() in kept.storages
    assert kept.beyond(base) < base.nbytes / 2
    output.float().sum().backward()
    assert layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_autocast_agree(kind: str) -> None:
    model, x = prepared("int4", **KINDS[kind]), torch.randn(4, 128, requires_grad=True)
    found = []
    for use in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(model, x, use_reentrant=False) if use else model(x)
        y.float().square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        found.append((y.detach(), *grads))
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own compiler does
def test_compiled_it_computes_the_same() -> None:
    model, x = prepared("int4"), torch.randn(4, 128)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append((y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("algorithm", [qat.StraightThrough(), qat.LearnedClipping(), qat.DualLSQ()], ids=str)
def test_other_algorithms_train_the_adapter(algorithm: Any) -> None:
    model = prepared("int4", algorithm)
    model(torch.randn(4, 128)).square().sum().backward()
    assert layer_of(model).lora_A["default"].weight.grad.abs().sum() > 0


def test_ranges_begin_with_the_base() -> None:
    torch.manual_seed(0)
    model, plain = get_peft_model(nn.Sequential(nn.Linear(128, 48)), LoraConfig(target_modules=["0"])), None
    plain = copy.deepcopy(model.get_base_model()[0].base_layer)
    host = nn.Sequential(plain)
    for one in (model, host):
        qat.prepare(one, qat.QuantSpec(weights="int4"))
    states = layer_of(model).weight_quantizer.state_dict(), host[0].weight_quantizer.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_without_its_adapter_it_is_the_base() -> None:
    model, x = prepared("int4"), torch.randn(4, 128)
    layer = layer_of(model)
    with model.disable_adapter():
        assert torch.equal(layer.effective_weight(layer), layer.base_layer.weight)
        off = model(x)
    base = layer.weight_quantizer.quantize(layer.base_layer.weight, torch.float32).value
    torch.testing.assert_close(off, x @ base.t() + layer.bias)
    assert not torch.allclose(model(x), off)
    merged = layer.effective_weight(layer).detach()
    model.merge_adapter()
    assert same_bits(layer.effective_weight(layer).detach(), merged)


def test_while_nothing_is_quantized_it_is_pefts_own() -> None:
    model, x = adapted(), torch.randn(4, 128)
    wanted = model(x)
    qat.prepare(model, qat.QuantSpec(weights="int4"))
    layer_of(model).mode = layer_of(model).mode._replace(weights=False)
    assert torch.equal(model(x), wanted)


def _second(model: Any) -> None:
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])


TWO = r"has several active adapters \['default', 'other'\].*set_adapter"
FAULTS = [
    pytest.param({}, _second, TWO, id="two"),
    pytest.param({"lora_dropout": 0.1}, None, r"has lora_dropout=0.1.*lora_dropout=0.0", id="dropout"),
    pytest.param({"lora_bias": True}, None, "has a bias in its adapter: use lora_bias=False", id="bias"),
]


@pytest.mark.parametrize(("config", "change", "message"), FAULTS)
def test_what_is_no_one_weight_is_refused(config: Any, change: Any, message: str) -> None:
    model = adapted(**config)
    if change is not None:
        change(model)
    with pytest.raises(StateError, match=rf"model: layer '0' {message}"):
        qat.prepare(model, qat.QuantSpec(weights="int4"))
    assert type(layer_of(model)).__module__.startswith("peft")


def test_it_is_refused_after_prepare_too() -> None:
    model = prepared("int4")
    _second(model)
    with pytest.raises(StateError, match=TWO):
        model(torch.randn(2, 128))
    with pytest.raises(StateError, match=TWO):
        qat.freeze(model)
    model.set_adapter("other")
    model(torch.randn(2, 128))
    qat.freeze(model)


def test_an_adapter_without_a_model_around_it() -> None:
    """As `LoraModel` and transformers' ``add_adapter`` put adapters into a model."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(128, 48))
    LoraModel(inner, LoraConfig(target_modules=["0"]), "mine")  # type: ignore[arg-type]
    assert qat.prepare(inner, qat.QuantSpec(weights="int4")).layers == ("0",)
    inner(torch.randn(2, 128)).sum().backward()
    qat.freeze(inner)
    assert not any("lora" in name for name, _ in inner.named_parameters())


def test_cage_needs_weights_of_their_own() -> None:
    model = prepared("int4")
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    assert qat.cage_step(model, optimizer, 1.0) == 0
    schedule = qat.QuantizationSchedule(cage=10.0)
    with pytest.raises(TrainingError, match="pulls trained weights of prepared layers, but no optimizer holds one"):
        pull_after_steps(model, schedule, [optimizer], lambda: 0, 10)
