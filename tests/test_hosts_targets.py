"""Rules that hold on every library model inside a module, and models that a target's loader cannot build."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

import qat
from qat.errors import TargetError
from qat.hosts import TARGETS, Host, get_target, host_of
from qat.inspection import inspect
from qat.spec import QuantSpec
from tests.diffusion_architectures import ARCHITECTURES
from tests.exports import small_flux
from tests.helpers import LearnedStep, of_diffusers, tiny_model, tokens

F32 = QuantSpec(dtype="float32")


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Trained(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "module": (Wrapper, "model."),
    "two modules deep": (lambda model: Wrapper(Wrapper(model)), "model.model."),
    "DataParallel": (nn.DataParallel, "module."),
    "LightningModule": (Trained, "model."),
    "Sequential": (nn.Sequential, "0."),
}


def decisions(model: nn.Module, spec: QuantSpec, prefix: str = "") -> dict[str, tuple[str | None, str | None, str]]:
    return {
        row.name.removeprefix(prefix): (row.weights, row.activations, row.reason.replace(prefix, "", 1))
        for row in inspect(model, spec).layers
    }


def test_a_misspelt_target_is_asked_back() -> None:
    with pytest.raises(TargetError, match=r"got 'transformer' \(did you mean 'transformers'\?\)$"):
        qat.prepare(nn.Sequential(nn.Linear(8, 8)), qat.QuantSpec(), target="transformer")
    with pytest.raises(TargetError, match=r"must be one of \['compressed-tensors', .*'transformers'\], got 3$"):
        qat.prepare(nn.Sequential(nn.Linear(8, 8)), qat.QuantSpec(), target=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_head_stays_float_inside_a_wrapper_too(wrapper: str, tied: bool) -> None:
    wrap, prefix = WRAPPERS[wrapper]
    spec = QuantSpec(weights="int2")
    alone = decisions(tiny_model("llama", tie_word_embeddings=tied), spec)
    assert alone["lm_head"][0] is None
    assert [weights for weights, _, _ in alone.values()].count("int2") == 14
    assert decisions(wrap(tiny_model("llama", tie_word_embeddings=tied)), spec, prefix) == alone


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_head_inside_a_wrapper_is_quantized_when_it_is_named(wrapper: str) -> None:
    wrap, prefix = WRAPPERS[wrapper]
    found = decisions(wrap(tiny_model("llama")), QuantSpec(include="*lm_head"), prefix)
    assert found["lm_head"] == ("int8", None, "included by '*lm_head'")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_the_rules_of_diffusers_hold_inside_a_wrapper_too(wrapper: str, activations: str | None) -> None:
    wrap, prefix = WRAPPERS[wrapper]
    spec = QuantSpec.model_validate({"activations": activations})
    architecture = ARCHITECTURES["WanTransformer3DModel"]
    alone = decisions(architecture.build(), spec)
    kept = {name for name, (*_, reason) in alone.items() if "kept in float32" in reason}
    assert kept == {"condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2"}
    assert any("sensitive" in reason for *_, reason in alone.values()) is (activations is not None)
    assert decisions(wrap(architecture.build()), spec, prefix) == alone


def test_each_of_two_models_keeps_its_own_rules() -> None:
    both = nn.ModuleDict({"one": tiny_model("llama"), "two": tiny_model("opt"), "three": nn.Linear(64, 64)})
    report = {row.name: row for row in inspect(both, QuantSpec(activations="int8")).layers}
    assert {name for name, row in report.items() if row.weights is None} == {"one.lm_head", "two.lm_head"}
    head = nn.ModuleDict({"proj_out": nn.Linear(64, 64)})
    mixed = nn.ModuleDict({"text": tiny_model("llama"), "image": of_diffusers(head)})
    report = {row.name: row for row in inspect(mixed, QuantSpec(activations="int8")).layers}
    assert {name for name, row in report.items() if row.weights is None} == {"text.lm_head", "image.proj_out"}


def test_a_wrapped_model_is_frozen_with_its_classes_dtypes() -> None:
    wrapped = Wrapper(ARCHITECTURES["WanTransformer3DModel"].build())
    qat.prepare(wrapped, QuantSpec())
    qat.freeze(wrapped, allow_unreached=True)
    kept = wrapped.get_parameter("model.condition_embedder.time_embedder.linear_1.weight")
    assert kept.dtype is torch.float32
    assert wrapped.get_parameter("model.patch_embedding.weight").dtype is torch.bfloat16


@pytest.mark.parametrize("verb", [inspect, qat.prepare])
def test_only_models_of_transformers_are_prepared_for_it(verb: Callable[..., Any]) -> None:
    fault = "model: this target loads models of transformers alone, got a "
    for model, message in (
        (nn.Sequential(nn.Linear(64, 8)), f"{fault}Sequential: use target 'quanto'"),
        (Wrapper(tiny_model("llama")), f"{fault}Wrapper: pass the model inside it, 'model'"),
        (Wrapper(Wrapper(tiny_model("bert"))), f"{fault}Wrapper: pass the model inside it, 'model.model'"),
        (tiny_model("llama").get_submodule("model.layers.0"), f"{fault}LlamaDecoderLayer: use target 'quanto'"),
        (of_diffusers(nn.Sequential(nn.Linear(64, 8))), f"{fault}Sequential: use target 'quanto'"),
    ):
        with pytest.raises(TargetError) as raised:
            verb(model, F32, target="transformers")
        assert str(raised.value) == message


class Adapter(nn.Module):
    """What peft puts in the place of a layer."""

    def __init__(self, layer: nn.Linear, *, adapts: bool) -> None:
        super().__init__()
        self.base_layer = layer
        if adapts:
            self.lora_A, self.lora_B = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return y


def adapted(model: nn.Module, name: str, *, adapts: bool = True) -> nn.Module:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    model.set_submodule(name, Adapter(layer, adapts=adapts))
    return model


def with_a_new_head() -> nn.Module:
    model: Any = tiny_model("llama")
    model.lm_head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
    return model


def diffusers_model() -> nn.Module:
    return ARCHITECTURES["DiTTransformer2DModel"].build()


UP, QUERY = "model.layers.0.mlp.up_proj", "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("verb", [inspect, qat.prepare])
@pytest.mark.parametrize(
    ("make", "target", "cls", "added"),
    [
        (
            lambda: adapted(tiny_model("llama"), UP, adapts=False),
            "transformers",
            "LlamaForCausalLM",
            f"{UP}.base_layer.weight",
        ),
        (
            lambda: adapted(tiny_model("llama"), UP),
            "transformers",
            "LlamaForCausalLM",
            f"{UP}.base_layer.weight, {UP}.lora_A.weight, {UP}.lora_A.bias and 2 more",
        ),
        (
            with_a_new_head,
            "transformers",
            "LlamaForCausalLM",
            "lm_head.0.weight, lm_head.0.bias, lm_head.1.weight and 1 more",
        ),
        (
            lambda: adapted(diffusers_model(), QUERY, adapts=False),
            "diffusers",
            "DiTTransformer2DModel",
            f"{QUERY}.base_layer.weight, {QUERY}.base_layer.bias",
        ),
    ],
    ids=["renamed layer", "adapter", "another head", "diffusers"],
)
def test_a_model_with_parameters_that_no_load_fills_is_refused_early(
    verb: Callable[..., Any], make: Callable[[], nn.Module], target: str, cls: str, added: str
) -> None:
    model = make()
    with pytest.raises(TargetError) as raised:
        verb(model, F32, target=target)
    assert str(raised.value) == (
        f"model: target {target!r} builds a {cls} without the parameters {added}, so no load could fill them: "
        "merge adapters first (in peft: merge_and_unload), or use target 'quanto'"
    )
    assert qat.prepare(model, F32, target="quanto").layers  # nothing was changed


def test_what_was_added_after_prepare_is_refused_by_freeze_and_export_for_that_target(tmp_path: Path) -> None:
    model = adapted(tiny_model("llama"), UP, adapts=False)
    qat.prepare(model, F32)
    with pytest.raises(TargetError, match=rf"cannot be served by 'transformers': .*{UP}\.base_layer\.weight, so no"):
        qat.freeze(model, target="transformers", allow_unreached=True)
    qat.freeze(model, allow_unreached=True)
    with pytest.raises(TargetError, match=rf"{UP}\.base_layer\.weight, so no load could fill them"):
        qat.export(model, tmp_path / "out", target="transformers")
    assert not (tmp_path / "out").exists()


def test_what_quantizers_learn_is_not_taken_for_an_adapter() -> None:
    model = tiny_model("llama")
    qat.prepare(model, F32, algorithm=LearnedStep())
    model(input_ids=tokens())
    assert qat.freeze(model, target="transformers").target == "transformers"


@pytest.mark.parametrize("target", ["transformers", "diffusers"])
def test_a_model_is_built_once_and_without_memory_to_see_its_parameters(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama") if target == "transformers" else diffusers_model()
    cls, built = type(host_of(model)), []
    build = cls.build

    def counted(self: Host, *arguments: Any, **options: Any) -> nn.Module:
        made = build(self, *arguments, **options)
        built.append({tensor.device.type for tensor in (*made.parameters(), *made.buffers())})
        return made

    monkeypatch.setattr(cls, "build", counted)
    before = torch.get_rng_state()
    qat.prepare(model, F32, target=target)
    assert built == [{"meta"}]
    assert torch.equal(torch.get_rng_state(), before)


def custom(*arguments: Any) -> nn.Module:
    """A class of one's own, which takes more than a configuration where ``arguments`` are given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Custom(LlamaForCausalLM):
        def __init__(self, config: Any, *more: Any) -> None:
            super().__init__(config)
            self.extra = nn.Linear(64, 64)
            if len(more) != len(arguments):
                raise TypeError("arguments")

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return Custom(LlamaConfig(num_attention_heads=4, **sizes), *arguments)


def test_a_class_that_its_configuration_does_not_build_is_not_judged() -> None:
    host = get_target("transformers").host
    assert host.added_faults(custom(1)) == []
    assert host.added_faults(custom()) == []
    model = custom()
    del model.config
    assert host.added_faults(model) == []
    assert host.added_faults(nn.Linear(2, 2)) == []


def test_an_export_notes_that_the_code_of_a_class_is_not_copied(tmp_path: Path) -> None:
    notes = {}
    for name, model in (
        ("custom", custom()),
        ("stock", tiny_model("llama")),
        ("plain", nn.Sequential(nn.Linear(8, 8))),
    ):
        qat.prepare(model, F32, target="quanto" if name == "plain" else "transformers")
        qat.freeze(model, allow_unreached=True)
        notes[name] = [note for note in qat.export(model, tmp_path / name).notes if "code is not copied" in note]
    assert notes == {
        "custom": [
            f"the class Custom is defined in {__name__}, not in transformers, and its code is not copied: a load needs "
            "that code imported, or beside the weights"
        ],
        "stock": [],
        "plain": [],
    }


def test_a_class_of_ones_own_around_diffusers_is_noted_too() -> None:
    from diffusers import DiTTransformer2DModel

    class Mine(DiTTransformer2DModel):  # type: ignore[misc]
        pass

    host, model = get_target("diffusers").host, diffusers_model()
    assert host.export_notes(model) == []
    model.__class__ = Mine
    (note,) = host.export_notes(model)
    assert note.startswith(f"the class Mine is defined in {__name__}, not in diffusers, and its code is not copied")


@pytest.mark.parametrize("missing", ["gguf", "compressed_tensors"])
def test_a_missing_package_is_a_fault_of_its_own_targets_alone(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others look at it only to say which target could hold a layer that stays float."""
    monkeypatch.setitem(sys.modules, missing, None)
    for name, target in TARGETS.items():
        model: nn.Module = small_flux() if "diffusers" in name else tiny_model("llama")
        spec = qat.QuantSpec(weights="q8_0" if "gguf" in name else "int8")
        own = missing.replace("_", "-") in (name, target.format.library, target.format.name.partition("-")[0])
        if own:
            with pytest.raises(qat.TargetError, match="package"):
                qat.inspect(model, spec, target=name)
        else:
            assert qat.inspect(model, spec, target=name).quantized_share > 0


@pytest.mark.parametrize(("target", "missing"), [("compressed-tensors", "compressed_tensors"), ("gguf", "gguf")])
def test_a_missing_package_is_not_told_as_damage(
    target: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    qat.prepare(model, qat.QuantSpec(weights="q8_0" if target == "gguf" else "int8"), target=target)
    qat.freeze(model, allow_unreached=True)
    qat.export(model, tmp_path / "out")
    monkeypatch.setitem(sys.modules, missing, None)
    for verb in (qat.load, qat.verify):
        with pytest.raises(
            qat.LoadError, match=rf"out': target: its loaders need the package {target}, which is missing"
        ):
            verb(tmp_path / "out")
