"""`prepare` does what `inspect` said, in place, and leaves a model that checkpoints and optimizers know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import QatError, SpecError, StateError, TargetError
from qat.layers import QLinear, QuantizedLayer, quantized_layers
from qat.observers import Absmax, Best
from qat.preparation import parameter_groups, prepare, prepared_as
from qat.quantizers import StraightThrough
from qat.spec import LayerSpec, QuantSpec
from tests.helpers import LearnedStep, of_transformers, same_bits, tiny_model, tokens

F32 = QuantSpec(dtype="float32")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8))


def arrives_quantized(layer: QuantizedLayer) -> bool:
    return layer.input_quantizer is not None and layer.input_quantizer.arrives_quantized


def inputs() -> Tensor:
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(1))


def test_the_layers_of_the_inspection_are_prepared_in_place() -> None:
    model = mlp()
    objects = dict(model.named_modules())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    spec = QuantSpec(weights="int4", exclude="4", overrides={"2": "int8"})
    expected = qat.inspect(model, spec)
    report = prepare(model, spec, algorithm=StraightThrough())
    assert report.inspection == expected
    assert report.layers == ("0", "2")
    assert [type(module) for module in model] == [QLinear, nn.ReLU, QLinear, nn.LayerNorm, nn.Linear]
    assert all(model.get_submodule(name) is module for name, module in objects.items())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert [layer.weight_quantizer.qtype.name for _, layer in quantized_layers(model)] == ["int4", "int8"]
    assert str(expected) in str(report)


def test_how_a_model_was_prepared_is_known() -> None:
    model = mlp()
    with pytest.raises(
        StateError, match=r"was not prepared: call qat.prepare\(model, spec\) first, on this same module"
    ):
        prepared_as(model)
    prepare(of_transformers(model), F32, algorithm=LearnedStep(), target="transformers")
    prepared = prepared_as(model)
    assert (prepared.spec, prepared.algorithm, prepared.target) == (F32, LearnedStep(), "transformers")
    assert (prepared.observer, prepared.notes) == (Best(), ())
    other = mlp()
    prepare(other, F32, observer=Absmax())
    assert prepared_as(other).observer == Absmax()


def test_activations_get_quantizers_where_the_spec_says() -> None:
    model = mlp()
    spec = QuantSpec(activations="int8", overrides={"2": LayerSpec(weights="int4")}, dtype="float32")
    prepare(model, spec, observer=Absmax())
    first, second, _ = (layer for _, layer in quantized_layers(model))
    assert first.input_quantizer is not None
    assert first.output_quantizer is not None
    assert first.input_quantizer.rule == Absmax()
    assert second.input_quantizer is second.output_quantizer is None
    default = mlp()
    prepare(default, spec)
    quantizer = next(layer for _, layer in quantized_layers(default)).input_quantizer
    assert quantizer is not None
    assert quantizer.rule == Best()


@pytest.mark.parametrize("verb", ["prepare twice", "prepare after freezing"])
def test_only_a_float_model_is_prepared(verb: str) -> None:
    model = mlp()
    prepare(model, F32)
    if verb == "prepare after freezing":
        qat.freeze(model, allow_unreached=True)
    with pytest.raises(StateError, match="is prepared or frozen already: start from a float model"):
        prepare(model, F32)


@pytest.mark.parametrize(
    ("spec", "target", "error"),
    [
        (QuantSpec(exclude="nope"), "quanto", SpecError),
        (QuantSpec(activations="int8"), "diffusers", TargetError),
        (QuantSpec(), "nowhere", TargetError),
    ],
    ids=["pattern", "target cannot", "no target"],
)
def test_a_refused_preparation_changes_nothing(spec: QuantSpec, target: str, error: type[QatError]) -> None:
    model = mlp()
    with pytest.raises(error):
        prepare(model, spec, target=target)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.LayerNorm, nn.Linear]
    with pytest.raises(StateError):
        prepared_as(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_is_refused(wrap: Any) -> None:
    model = wrap(mlp())
    with pytest.raises(StateError, match=r"model: a \w+ around a model: pass it .model._orig_mod"):
        prepare(model, F32)


def test_something_that_is_no_algorithm_is_refused() -> None:
    with pytest.raises(StateError, match=r"algorithm: must be an Algorithm such as StraightThrough\(\), got 'lsq'"):
        prepare(mlp(), F32, algorithm="lsq")  # type: ignore[arg-type]


def test_float_outputs_may_differ_but_float_parameters_do_not() -> None:
    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prepare(model, QuantSpec(weights="int2"))
    after = dict(model.named_parameters())
    assert all(same_bits(after[name].detach(), value) for name, value in before.items())


def test_a_frozen_model_keeps_no_hook_of_preparation() -> None:
    model = mlp()
    prepare(model, F32)
    duplicate = copy.deepcopy(model)
    for one in (duplicate, model):
        one(inputs())
        qat.freeze(one)
        assert not one._forward_pre_hooks
        assert not one._forward_hooks
        assert not one._load_state_dict_pre_hooks


def test_a_deep_copy_is_prepared_too() -> None:
    model = mlp()
    prepare(model, F32, algorithm=LearnedStep())
    copied = copy.deepcopy(model)
    assert same_bits(copied(inputs()), model(inputs()))
    qat.freeze(copied)
    assert prepared_as(model).spec == F32
    assert isinstance(model[0], QLinear)


def test_a_tied_head_that_is_named_is_untied_and_the_config_told() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    report = prepare(model, QuantSpec(overrides={"lm_head": "int8"}))
    head, embedding = model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")
    assert report.untied == ("lm_head",)
    assert "untied: lm_head" in str(report)
    assert head.weight is not embedding.weight
    assert same_bits(head.weight.detach(), before)  # type: ignore[arg-type]
    assert same_bits(embedding.weight.detach(), before)  # type: ignore[arg-type, operator]
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]


def test_a_tied_head_stays_tied_by_default() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    report = prepare(model, QuantSpec())
    assert report.untied == ()
    assert "lm_head" not in report.layers
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight


def test_a_model_on_the_meta_device_is_prepared() -> None:
    with torch.device("meta"):
        model = mlp()
    assert prepare(model, QuantSpec(weights="int4"), algorithm=LearnedStep()).layers == ("0", "2", "4")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(StateError, match=r"0.weight, .* have no numbers \(meta device\): load its weights first"):
        qat.freeze(model)


@pytest.mark.parametrize("name", ["opt", "bert", "llama", "vit", "t5"])
def test_transformers_models_train_a_step(name: str) -> None:
    model = tiny_model(name).train()
    prepare(model, QuantSpec(weights="int4", dtype="float32"), algorithm=LearnedStep(), target="transformers")
    if name == "vit":
        outputs = model(pixel_values=torch.randn(2, 3, 16, 16)).last_hidden_state
    elif name == "t5":
        outputs = model(input_ids=tokens(), decoder_input_ids=tokens(seed=1)).logits
    else:
        outputs = model(input_ids=tokens())[0]
    outputs.square().mean().backward()
    for layer_name, layer in quantized_layers(model):
        if "pooler" in layer_name:
            continue  # BERT's pooler does not reach the first output
        assert layer.weight.grad is not None, layer_name
        assert all(p.grad is not None for p in layer.quantizer_parameters()), layer_name


def test_parameter_groups_keep_scales_from_weight_decay() -> None:
    model = mlp()
    prepare(model, QuantSpec(weights="int4"), algorithm=LearnedStep())
    groups = {group["name"]: group for group in parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.1,
        "vectors": 0.0,
        "scales": 0.0,
    }
    assert {name: group["lr"] for name, group in groups.items()} == {"weights": 1e-3, "vectors": 1e-3, "scales": 1e-4}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    scales = {id(p) for _, layer in quantized_layers(model) for p in layer.quantizer_parameters()}
    assert {id(p) for p in groups["scales"]["params"]} == scales
    assert len(scales) == 6


def test_parameter_groups_of_a_frozen_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(256, 8))
    prepare(model, QuantSpec())
    qat.freeze(model)
    for module in (model, nn.ModuleDict({"model": model})):  # as a module of Lightning holds it
        with pytest.raises(StateError, match=r"module: is frozen, and frozen layers cannot be trained: export it"):
            parameter_groups(module, lr=1e-3)


def test_parameter_groups_leave_out_what_needs_no_gradient_and_what_is_empty() -> None:
    model = mlp()
    prepare(model, F32)
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, lr=1e-3, scale_lr=5e-2)
    assert [group["name"] for group in groups] == ["weights", "vectors"]
    assert len(groups[0]["params"]) == 2
    learned = mlp()
    prepare(learned, F32, algorithm=LearnedStep())
    assert parameter_groups(learned, lr=1e-3, scale_lr=0.0)[-1]["lr"] == 0.0
    torch.optim.AdamW(groups)


def test_untying_one_model_leaves_another_tied_and_its_config_alone() -> None:
    from tests.exports import small_llama

    both = nn.ModuleDict({"a": small_llama(), "b": small_llama()})
    both["b"].config = both["a"].config  # as models made from one configuration object
    prepare(both, QuantSpec(weights="int8", include=("a.lm_head",)))
    assert both["a"].config.tie_word_embeddings is False
    assert both["b"].config.tie_word_embeddings is True
    assert both["b"].lm_head.weight is both["b"].get_input_embeddings().weight


def test_an_algorithm_that_fails_leaves_the_model_float() -> None:
    class Half(StraightThrough):
        def make(self, weight: Any, qtype: Any, dtype: Any) -> Any:
            return super().make(weight, qtype, dtype) if weight.shape[0] == 16 else None

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32))
    with pytest.raises(StateError, match="must make a WeightQuantizer, made None"):
        prepare(model, QuantSpec(), algorithm=Half())
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    prepare(model, QuantSpec())


def test_layers_whose_sizes_no_float8_product_takes_are_named() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 24), nn.Linear(24, 16))
    spec = QuantSpec(weights="float8", activations="float8")
    report = prepare(model, spec, algorithm=StraightThrough(float8_backward=True))
    (remark,) = report.remarks
    wanted = "float8_backward: 2 layers keep exact gradients, since a size is no multiple of 16: 1, 2"
    assert remark == wanted
    assert remark in str(report)
    assert remark in prepared_as(model).notes
    assert not prepare(nn.Sequential(nn.Linear(24, 24)), spec).remarks
