"""Experts in 3-D parameters run as a reference does that quantizes one expert after another, and keep nothing more."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import AriaTextConfig, GptOssConfig, LongcatFlashConfig, MixtralConfig, NemotronHConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import qat
from qat.errors import StateError
from qat.formats import QUANTO
from qat.layers import QExpert, float_layers, quantized_layers
from qat.layers.expert_forms import _FORMS, form_of
from qat.layers.functional import fake_quantized
from qat.quantizers import Algorithm
from tests.helpers import WEIGHT_TYPES, kept_by, same_bits

HIDDEN, INNER, EXPERTS, TOKENS = 160, 32, 6, 7
FORMS = ("eager", "batched_mm", "grouped_mm")
CLASSES: dict[str, tuple[Any, Any]] = {
    "Mixtral": (
        MixtralExperts,
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS),
    ),
    "GptOss": (GptOssExperts, GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)),
    "Aria": (
        AriaExperts,
        AriaTextConfig(hidden_size=HIDDEN, num_attention_heads=4, intermediate_size=INNER, moe_num_experts=EXPERTS),
    ),
    "NemotronH": (
        NemotronHExperts,
        NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS),
    ),
}
LEARNED = qat.LearnedAffine(start="lsq")  # weights saturate, and no search is waited for
ALGORITHMS: list[Algorithm] = [
    qat.StraightThrough(),
    LEARNED,
    LEARNED.model_copy(update={"mask_margin": 0.5}),
    LEARNED.model_copy(update={"gradient": "stable"}),
    qat.DualLSQ(),
    qat.LearnedClipping(),
    qat.StretchedElastic(),
]


def experts(name: str, form: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    cls, config = CLASSES[name]
    config._experts_implementation = form
    made = cls(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype)


def prepared(module: Any, weights: str = "int4", algorithm: Algorithm = LEARNED) -> Any:
    """The module with every expert quantized; `qat.prepare` takes whole models of transformers."""
    for _, view, cls in list(float_layers(module)):
        weight = cls.effective_weight(view)
        types = QUANTO.types(weights, None, torch.float32)
        cls.adopt(view, algorithm.make(weight, types.weights, types.dtype))
    return module


def call(*chosen: int, count: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of experts, two a token, of which only those ``chosen`` are read."""
    generator = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randperm(len(chosen), generator=generator)[:2] for _ in range(count)])
    x = torch.randn(count, HIDDEN, generator=generator).requires_grad_()
    return x, torch.tensor(chosen)[places], torch.rand(count, 2, generator=generator).requires_grad_()


def reference(module: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The float class's forward with matrices that are quantized one by one; gradients of everything."""
    held = copy.deepcopy(module)
    stacks = {}
    for key in held.form.keys:
        values = []
        for _, layer in quantized_layers(held):
            if layer.key == key:
                weight, quantizer = layer.effective_weight(layer), layer.weight_quantizer
                value = fake_quantized(weight, quantizer.quantize(weight, weight.dtype), quantizer)
                values.append(value.t() if held.form.transposed else value)
        stacks[key] = torch.stack(values)
    others = {key: p for key, p in held.named_parameters(recurse=False) if key not in stacks}
    plain = held.of.__new__(held.of)
    plain.__dict__.update({**vars(held), "_modules": {k: m for k, m in held._modules.items() if not k.isdigit()}})
    y = functional_call(plain, {**stacks, **others}, inputs)
    y.square().sum().backward()
    return y.detach(), gradients(held)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def assert_near(found: Any, wanted: Any) -> None:
    """Sums in another order round otherwise."""
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def run(module: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    y = module(*inputs)
    y.square().sum().backward()
    return y.detach(), gradients(module)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("chosen", [(1, 2, 4), tuple(range(EXPERTS))], ids=["some", "all"])
def test_it_computes_what_experts_quantized_one_by_one_do(name: str, form: str, chosen: tuple[int, ...]) -> None:
    module = prepared(experts(name, form))
    inputs, others = call(*chosen), call(*chosen)
    wanted, wanted_gradients = reference(module, others)
    found, found_gradients = run(module, inputs)
    assert_near(found, wanted)
    for key, gradient in wanted_gradients.items():
        assert_near(found_gradients[key], gradient)
    for place in (0, 2):
        assert_near(inputs[place].grad, others[place].grad)
    reached = {layer.index for _, layer in quantized_layers(module) if layer.reached}
    assert reached == set(inputs[1].flatten().tolist())


@pytest.mark.parametrize(
    ("weights", "algorithm"),
    [
        pytest.param(weights, algorithm, id=f"{weights}-{algorithm}")
        for weights in WEIGHT_TYPES
        for algorithm in ALGORITHMS
        if (weights in ("int4", "int2") or not isinstance(algorithm, qat.StretchedElastic))  # for types with a shift
        and (weights != "float8" or algorithm.gradient != "stable")  # for integer codes
    ],
)
def test_one_call_for_all_experts_gives_the_bits_of_one_by_one(
    weights: str, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = prepared(experts("GptOss"), weights, algorithm)
    with torch.no_grad():
        for layer in (layer for _, layer in quantized_layers(module)):
            layer.weight_quantizer.smooth = algorithm.gradient == "stable"
            for parameter in layer.quantizer_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    one, other = copy.deepcopy(module), copy.deepcopy(module)
    found = run(one, call(0, 2, 3))
    calls = []
    monkeypatch.setattr("qat.layers.experts_forward._joined", lambda *_: calls.append(1))
    wanted = run(other, call(0, 2, 3))
    assert calls
    assert same_bits(found[0], wanted[0])
    for key in wanted[1]:
        assert same_bits(found[1][key], wanted[1][key]), key


def test_quantizers_that_differ_are_called_one_by_one() -> None:
    module = prepared(experts("Mixtral"))
    layer = module.get_submodule("1.gate_up_proj")
    fresh = copy.deepcopy(layer.weight_quantizer)
    fresh.masked = False
    layer.weight_quantizer = fresh
    wanted, _ = reference(module, call(0, 1, 2))
    found, _ = run(module, call(0, 1, 2))
    assert_near(found, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_backward_keeps_no_more_than_the_float_module(name: str, form: str) -> None:
    """But for scales, and for what a batched product keeps in either: a copy of a matrix for each token."""
    plain, module = experts(name, form), prepared(experts(name, form))
    sizes = [kept_by(lambda run=run: run(*call(1, 2, 4)))[0].beyond() for run in (plain, module)]  # type: ignore[misc]
    scales = sum(p.nbytes * 6 for _, layer in quantized_layers(module) for p in layer.quantizer_parameters())
    assert sizes[1] <= sizes[0] + scales


def test_recomputed_gradients_are_those_of_kept_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(prepared(experts("GptOss")), call(1, 2, 4))
    monkeypatch.setattr("qat.layers.experts_forward.Recomputed", lambda: None)
    wanted = run(prepared(experts("GptOss")), call(1, 2, 4))
    for key in wanted[1]:
        assert same_bits(found[1][key], wanted[1][key]), key


def test_a_step_between_forward_and_backward_is_refused() -> None:
    module = prepared(experts("Mixtral"))
    y = module(*call(1, 2, 4))
    with torch.no_grad():
        module.gate_up_proj.mul_(2)
    with pytest.raises(StateError, match="changed between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_nothing_inside_and_gives_equal_gradients(reentrant: bool) -> None:
    wanted = run(prepared(experts("Mixtral")), call(1, 2, 4))
    module = prepared(experts("Mixtral"))
    x, routes, weights = call(1, 2, 4)
    kept, y = kept_by(lambda: checkpoint(module, x, routes, weights, use_reentrant=reentrant))
    assert kept.beyond() <= 4 * x.nbytes
    y.square().sum().backward()
    found = gradients(module)
    for key in wanted[1]:
        assert same_bits(found[key], wanted[1][key]), key


def test_nothing_lives_on_after_backward() -> None:
    module = prepared(experts("Mixtral"))

    def alive() -> Iterator[int]:
        return (id(x) for x in gc.get_objects() if issubclass(type(x), Tensor))

    run(module, call(1, 2, 4))
    gc.collect()
    before = len(list(alive()))
    run(module, call(1, 2, 4))
    assert len(list(alive())) <= before


def test_float_mode_is_the_float_module() -> None:
    module, plain = prepared(experts("GptOss")), experts("GptOss")
    for _, layer in quantized_layers(module):
        layer.mode = layer.mode._replace(weights=False)
    inputs = call(1, 2, 4)
    assert same_bits(module(*inputs), plain(*inputs))
    assert not any(layer.reached for _, layer in quantized_layers(module))


def test_no_token_reads_no_expert() -> None:
    module = prepared(experts("Mixtral"))
    x, routes, weights = call(1, 2)
    y = module(x[:0], routes[:0], weights[:0])
    assert y.shape == (0, HIDDEN)
    assert not any(layer.reached for _, layer in quantized_layers(module))


def test_unread_experts_have_gradients_of_zero() -> None:
    """DDP waits for a gradient of each parameter."""
    module = prepared(experts("Mixtral"))
    module(*call(1, 2)).sum().backward()
    layer: Any = module.get_submodule("3.down_proj")
    assert torch.equal(layer.weight_quantizer.high_move.grad, torch.zeros_like(layer.weight_quantizer.high_move))


def test_autocast_computes_in_the_serving_dtype() -> None:
    module = prepared(experts("Mixtral"))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(*call(1, 2, 4))
    y.float().sum().backward()
    assert module.gate_up_proj.grad.dtype is torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_reads_its_own_parameters(copied: Any) -> None:
    module = prepared(experts("GptOss"))
    other = copied(module)
    assert type(other) is type(module)
    layer: Any = other.get_submodule("2.down_proj")
    assert layer.owner is other
    inputs = call(1, 2, 4)
    wanted = module(*inputs)
    assert same_bits(other(*inputs), wanted)
    with torch.no_grad():
        other.down_proj.zero_()
    assert same_bits(module(*inputs), wanted)


def test_parameters_keep_names_and_identity_and_a_float_checkpoint_loads() -> None:
    plain = experts("GptOss")
    kept = dict(plain.named_parameters())
    module = prepared(plain)
    assert all(dict(module.named_parameters())[name] is p for name, p in kept.items())
    assert isinstance(module, GptOssExperts)
    assert isinstance(module.get_submodule("0.gate_up_proj"), QExpert)


def test_data_parallel_copies_are_refused() -> None:
    module = prepared(experts("Mixtral"))
    module._is_replica = True
    with pytest.raises(StateError, match="DistributedDataParallel"):
        module(*call(1, 2))


def test_a_parameter_that_is_computed_is_refused_by_name() -> None:
    module = prepared(experts("Mixtral"))
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    with pytest.raises(StateError, match=r"down_proj of its experts is computed before each forward.*on the float mod"):
        module(*call(1, 2))


def test_a_class_with_a_forward_of_its_own_is_unknown() -> None:
    class Mine(MixtralExperts):
        def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
            return hidden_states

    module = experts("Mixtral")
    assert form_of(module) is not None
    module.__class__ = Mine
    assert form_of(module) is None


@pytest.mark.parametrize("path", _FORMS)
def test_the_table_names_classes_that_exist_and_their_arguments(path: str) -> None:
    module, _, name = path.rpartition(".")
    cls, form = getattr(importlib.import_module(module), name), _FORMS[path]
    assert not form.argument or form.argument in inspect.signature(cls.forward).parameters
    source = inspect.getsource(cls)
    assert all(f"self.{key}" in source or f'"{key}"' in source for key in (*form.keys, *form.counts))


def test_sorted_tokens_of_diffusers_run_by_their_sizes() -> None:
    torch.manual_seed(0)
    module = SwiGLUExperts(HIDDEN, INNER, EXPERTS)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    prepared(module)
    x, sizes = torch.randn(9, HIDDEN), torch.tensor([0, 3, 0, 5, 0, 0])
    found = module(x, sizes)
    for first, last, expert in ((0, 3, 1), (3, 8, 3)):
        up, down = (module.get_submodule(f"{expert}.{key}") for key in ("gate_up_proj", "down_proj"))
        values = [m.weight_quantizer.quantize(m.effective_weight(m), torch.float32).value for m in (up, down)]
        gate, rest = (x[first:last] @ values[0].t()).chunk(2, -1)
        assert_near(found[first:last].detach(), ((nn.functional.silu(gate) * rest) @ values[1].t()).detach())
    assert not found[8:].any()
    assert {layer.index for _, layer in quantized_layers(module) if layer.reached} == {1, 3}


def test_longcats_zero_experts_are_no_experts() -> None:
    config = LongcatFlashConfig(
        hidden_size=HIDDEN, expert_ffn_hidden_size=INNER, n_routed_experts=4, zero_expert_num=2, head_dim=64
    )
    torch.manual_seed(0)
    module = LongcatFlashExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    prepared(module)
    x, _, weights = call(0, 1)
    routes = torch.tensor([[1, 5], [3, 4], [1, 3], [3, 1], [5, 4], [1, 4], [3, 5]])
    found = module(x, routes, weights)
    wanted, _ = reference(module, (x, routes, weights))
    assert_near(found.detach(), wanted)
    assert {layer.index for _, layer in quantized_layers(module) if layer.reached} == {1, 3}
