"""What each verb does with experts in 3-D parameters, which no hook of a layer sees: it works, or names them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qat
from qat.errors import CalibrationError, SpecError, StateError
from qat.layers import quantized_layers
from qat.quantizers.activation import LearnedScale
from qat.training.annealing import begin_with, end_first_type
from qat.training.cage import cage_step
from tests.helpers import same_bits
from tests.test_experts import QUICK, TOKENS, build, logits, train

BATCHES = [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]


def calibrated(name: str = "MixtralForCausalLM", form: str = "grouped_mm", **options: Any) -> Any:
    model = build(name)
    model.set_experts_implementation(form)
    spec = qat.QuantSpec(**{"weights": "int8", "activations": "int8", "dtype": "float32", **options})
    qat.calibrate(model, BATCHES, spec=spec, target="transformers")
    return model


def expert(model: Any, name: str) -> Any:
    return model.get_submodule(f"model.layers.0.mlp.experts.{name}")


@pytest.mark.loads(
    "transformers", "qat.load", layers=("experts",), weights=("int8", "float8"), activations="same", equal="outputs"
)
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("form", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_activations_are_served_as_they_are_trained(name: str, form: str, kind: str, tmp_path: Path) -> None:
    model = calibrated(name, form, weights=kind, activations=kind)
    before = logits(model)
    qat.freeze(model)
    assert same_bits(logits(model), before)
    qat.export(model, tmp_path / "out", example_inputs=BATCHES[0])
    loaded = qat.load(tmp_path / "out")
    loaded.set_experts_implementation(form)  # type: ignore[operator]
    assert same_bits(logits(loaded), before)


def test_what_an_expert_reads_is_quantized_once_by_one_scale() -> None:
    """By the arithmetic of the type, around the float module."""
    model = calibrated()
    owner = model.model.layers[0].mlp.experts
    outer, inner = (expert(model, f"0.{key}").input_quantizer for key in ("gate_up_proj", "down_proj"))
    assert expert(model, "3.down_proj").input_quantizer is inner
    assert [name for name, _ in owner.named_modules() if name.endswith("input_quantizer")] == [
        "0.gate_up_proj.input_quantizer",
        "0.down_proj.input_quantizer",
    ]

    def rounded(x: Tensor, quantizer: Any) -> Tensor:
        return torch.round(x / quantizer.scale).clamp(-128, 127) * quantizer.scale

    torch.manual_seed(1)
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    routes = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]])
    wanted = torch.zeros(5, 64)
    for token in range(5):
        for place in range(2):
            matrices = []
            for key in ("gate_up_proj", "down_proj"):
                layer = expert(model, f"{routes[token, place]}.{key}")
                matrices.append(layer.weight_quantizer.quantize(layer.effective_weight(layer), torch.float32).value)
            gate, up = (matrices[0] @ rounded(x[token], outer)).chunk(2)
            hidden = rounded(torch.nn.functional.silu(gate) * up, inner)
            wanted[token] += weights[token, place] * (matrices[1] @ hidden)
    with torch.no_grad():
        found = owner(x, routes, weights)
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # a value may lie near a rounding boundary


def test_a_rarely_reached_expert_needs_no_tokens_of_its_own() -> None:
    model = build("MixtralForCausalLM")
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    report = qat.calibrate(model, [{"input_ids": TOKENS[:1, 5:6]}], spec=spec, target="transformers")
    assert {name.rpartition("layers.0.")[2] for name in report.layers if "layers.0.mlp" in name} == {
        "mlp.experts.0.gate_up_proj",
        "mlp.experts.0.down_proj",
    }
    assert logits(model).isfinite().all()
    errors = [side.error for name, sides in report.layers.items() if "experts" in name for side in sides]
    assert all(0 < error < 0.05 for error in errors)


def test_activations_that_would_be_too_far_off_stay_float(caplog: pytest.LogCaptureFixture) -> None:
    model = build("MixtralForCausalLM")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[:, :, 0] *= 1e4
    qat.prepare(
        model,
        qat.QuantSpec(weights="int8", activations="int8", dtype="float32"),
        target="transformers",
        observer=qat.Best(largest_error=1e-9),
    )
    report = qat.calibrate(model, BATCHES)
    assert "model.layers.0.mlp.experts.0.gate_up_proj" in report.kept_float
    assert expert(model, "2.gate_up_proj").activation_qtype is None
    before = logits(model)
    qat.freeze(model)
    assert same_bits(logits(model), before)


def test_scales_of_activations_learn() -> None:
    model = build("MixtralForCausalLM")
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    qat.prepare(model, spec, target="transformers", algorithm=qat.StraightThrough(learn_activations=True))
    qat.calibrate(model, BATCHES)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    quantizer = expert(model, "0.down_proj").input_quantizer
    assert isinstance(quantizer, LearnedScale)
    assert quantizer.move.grad.abs().sum() > 0
    other = build("MixtralForCausalLM")
    qat.prepare(other, spec, target="transformers", algorithm=qat.StraightThrough(learn_activations=True))
    other.load_state_dict(model.state_dict())
    assert same_bits(logits(other), logits(model))


def test_scales_are_observed_while_weights_train_in_float() -> None:
    model, plain = calibrated(), build("MixtralForCausalLM")
    for _, layer in quantized_layers(model):
        layer.mode = layer.mode._replace(weights=False, activations=False, observe=True)
    quantizer = expert(model, "0.down_proj").input_quantizer
    before = quantizer.scale.clone()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj.mul_(4)
        plain.model.layers[0].mlp.experts.gate_up_proj.mul_(4)
    assert same_bits(logits(model), logits(plain))
    quantizer.refresh()
    assert quantizer.scale > 2 * before


def test_cage_pulls_every_expert() -> None:
    model = build("GptOssForCausalLM")
    qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers")
    optimizer = torch.optim.SGD(qat.parameter_groups(model, lr=0.1))
    assert cage_step(model, optimizer, strength=10.0) == 12
    for _, layer in quantized_layers(model):
        weight = layer.effective_weight(layer).detach()
        assert torch.equal(weight, layer.weight_quantizer.quantize(weight, torch.float32).value)


def test_another_type_may_come_first() -> None:
    model = build("MixtralForCausalLM")
    qat.prepare(model, qat.QuantSpec(weights="int2"), target="transformers", algorithm=QUICK)
    begin_with(model, "int4")
    first = logits(model)
    with pytest.raises(StateError, match="still train as int4"):
        qat.freeze(model)
    end_first_type(model)
    assert not torch.equal(logits(model), first)
    qat.freeze(model)


def test_an_uncalibrated_model_is_refused() -> None:
    model = build("MixtralForCausalLM")
    qat.prepare(model, qat.QuantSpec(weights="int8", activations="int8"), target="transformers")
    for _, layer in quantized_layers(model):
        if layer.called:
            layer.mode = layer.mode._replace(activations=False)
    with pytest.raises(
        CalibrationError, match=r"never set for layer 'model\.layers\.0\.mlp\.experts\.0\.gate_up_proj'"
    ):
        logits(model)


def test_activations_stay_float_where_they_cannot_be_seen(caplog: pytest.LogCaptureFixture) -> None:
    quantized = qat.QuantSpec(weights="int8", activations="int8", quantize_outputs=True)
    for name, spec, why in (
        ("MixtralForCausalLM", quantized, "no layer gives their outputs"),
        ("Llama4ForCausalLM", quantized.model_copy(update={"quantize_outputs": False}), "does not show what its"),
    ):
        report = qat.inspect(build(name), spec, target="transformers")
        assert {row.activations for row in report.layers if ".experts." in row.name} == {None}
        assert [note for note in report.notes if why in note]


def test_llama4_adds_in_place_to_what_a_layer_gives() -> None:
    model = build("Llama4ForCausalLM")
    spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32")
    qat.calibrate(model, BATCHES, spec=spec, target="transformers")
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].feed_forward.experts.down_proj.grad.abs().sum() > 0


def test_experts_of_a_parameter_share_their_activations() -> None:
    overrides = {"*experts.1.down_proj": qat.LayerSpec(weights="int8", activations="int8")}
    with pytest.raises(SpecError, match="give all of them the same activations"):
        qat.inspect(
            build("MixtralForCausalLM"), qat.QuantSpec(weights="int8", overrides=overrides), target="transformers"
        )


def test_reconstruction_trains_experts_of_a_block() -> None:
    model = build("MixtralForCausalLM", num_hidden_layers=2)
    spec = qat.QuantSpec(weights="int2", dtype="float32")
    qat.prepare(model, spec, target="transformers", algorithm=qat.LearnedAffine())
    before = expert(model, "0.down_proj").owner.down_proj.detach().clone()
    report = qat.reconstruct(model, BATCHES, steps=8, lr=1e-4)
    assert list(report.blocks) == ["model.layers.0", "model.layers.1"]
    assert not report.restored
    assert not torch.equal(expert(model, "0.down_proj").owner.down_proj, before)


@pytest.mark.parametrize("score", ["output", "gradient", "kl"])
def test_a_search_wants_types_of_experts(score: Any) -> None:
    model = build("MixtralForCausalLM")
    with pytest.raises(SpecError, match=r"overrides: no damage of 8 matrices of experts can be seen"):
        qat.search(model, qat.QuantSpec(), BATCHES, budget="int8", score=score, target="transformers")
    spec = qat.QuantSpec(overrides={"*experts*": "int4"}, dtype="float32")
    found = qat.search(model, spec, BATCHES, budget="int4", score=score, target="transformers")
    report = qat.inspect(model, found.spec, target="transformers")
    assert {row.weights for row in report.layers if ".experts." in row.name} == {"int4"}


def test_codes_alone_do_not_train_experts() -> None:
    model = build("MixtralForCausalLM")
    train(model, qat.QuantSpec(weights="int4"))
    with pytest.raises(StateError, match=r"8 layers are no plain QLinear: exclude them"):
        qat.fix_codes(copy.deepcopy(model))
    qat.freeze(model)
    with pytest.raises(StateError, match=r"8 layers are experts in one parameter \(model\.layers\.0\.mlp\.experts"):
        qat.fix_codes(model)


def test_folding_leaves_experts_alone() -> None:
    model = build("MixtralForCausalLM").double()
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    before = logits(model)
    kept = model.model.layers[0].mlp.experts.gate_up_proj.clone()
    qat.fold_outliers(model, BATCHES, spec=qat.QuantSpec(weights="int8", activations="int8"), target="transformers")
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, kept)
    assert (logits(model) - before).abs().max() < 1e-9


def test_a_failed_calibration_leaves_a_float_model() -> None:
    model = build("MixtralForCausalLM")
    cls, keys = type(model.model.layers[0].mlp.experts), set(model.state_dict())
    with pytest.raises(CalibrationError):
        qat.calibrate(model, [{"input_ids": TOKENS + 1000}], spec=qat.QuantSpec(weights="int4"), target="transformers")
    assert type(model.model.layers[0].mlp.experts) is cls
    assert set(model.state_dict()) == keys


def test_an_example_finds_what_reads_experts_no_other_way() -> None:
    report = qat.inspect(
        build("MixtralForCausalLM"),
        qat.QuantSpec(weights="int8"),
        target="transformers",
        example_inputs=BATCHES[0],
    )
    assert all(row.weights for row in report.layers if ".experts." in row.name)


def test_a_weight_of_experts_that_is_read_elsewhere_is_named() -> None:
    model = build("MixtralForCausalLM")
    qat.prepare(model, qat.QuantSpec(weights="int8"), target="transformers")
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda module, _, y: y + 0 * module.down_proj.sum())
    logits(model)
    with pytest.raises(StateError, match=r"without calling their layer, in float \(model\.layers\.0\.mlp\.experts"):
        qat.freeze(model)


def test_inf_in_experts_is_refused() -> None:
    model = build("MixtralForCausalLM")
    qat.prepare(model, qat.QuantSpec(weights="int8"), target="transformers")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 0, 0] = torch.inf
    with pytest.raises(StateError, match=r"layers\.0\.mlp\.experts\.2\.down_proj' holds inf or NaN in its weight"):
        qat.freeze(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
def test_compiled_experts_compute_the_same() -> None:
    block, x = calibrated().model.layers[0].mlp, torch.randn(2, 5, 64)
    with torch.no_grad():
        assert same_bits(torch.compile(block, backend="eager")(x), block(x))
