"""What freezing asks of layers that never ran, what it puts on record beside the evidence, and what is refused then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import qat
from qat import freezing
from qat.errors import StateError
from qat.files.evidence import frozen_record
from qat.freezing import freeze, frozen_copy
from qat.layers import Mode, QLinear, quantized_layers
from qat.preparation import prepared_as
from qat.spec import QuantSpec
from tests.helpers import tiny_model, tokens

F32 = QuantSpec(dtype="float32")


class ReadsUncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.called(x) @ self.read.weight.t()
        return y


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    qat.prepare(model, F32)
    return model


def reached(model: nn.Module) -> list[bool]:
    return [layer.reached for _, layer in quantized_layers(model)]


def test_a_layer_that_was_never_called_is_refused_by_name_and_recorded_when_it_is_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ReadsUncalled()
    qat.prepare(model, F32)
    model(torch.randn(2, 64))
    assert "the weights of 1 prepared layers are used without calling their layer" in caplog.text
    caplog.clear()
    frozen_copy(model)
    assert not caplog.text
    with pytest.raises(StateError) as raised:
        freeze(model)
    assert str(raised.value) == (
        "model: 1 prepared layers never ran with their quantized weight (read) although the model ran: exclude layers "
        "whose weight is read without a call (prepare finds them with example_inputs), run the model once as it will "
        "be served, or pass allow_unreached=True"
    )
    assert isinstance(model.called, QLinear)
    assert model.training
    assert prepared_as(model).spec == F32
    freeze(model, allow_unreached=True, allow_reads=True)
    assert frozen_record(model).notes == (
        "model: the weights of 1 prepared layers are used without calling their layer, in float (read): exclude those "
        "layers in the spec",
        "1 layers were frozen although they never ran quantized: read",
    )


class ReadsAll(nn.Sequential):
    """Reaches none of its layers, as if another library had patched them."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = input @ layer.weight.t()
        return input


def test_a_model_that_ran_without_reaching_any_layer_is_refused_too() -> None:
    model = ReadsAll(*(nn.Linear(8, 8) for _ in range(6)))
    qat.prepare(model, F32)
    assert frozen_record(frozen_copy(model)).notes == ()
    model(torch.randn(2, 8))
    with pytest.raises(
        StateError,
        match=r"model: 6 prepared layers never ran .* \(0, 1, 2, 3 and 2 more\) although",
    ):
        freeze(model)
    assert reached(model) == [False] * 6
    assert frozen_record(frozen_copy(model)).notes == ()  # the question is for the end of training


def test_a_model_that_did_nothing_since_it_was_prepared_is_frozen() -> None:
    """Then nothing was trained or judged around its layers either."""
    model = two_layers()
    freeze(model)
    assert frozen_record(model).notes == ()


def run_in_evaluation(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(torch.randn(2, 64))


def run_one_layer_alone(model: nn.Module) -> None:
    for width, layer in zip((64, 32), model.children(), strict=True):
        layer(torch.randn(2, width))


@pytest.mark.parametrize("run", [run_in_evaluation, run_one_layer_alone], ids=["evaluation", "layer by layer"])
def test_any_run_of_a_layer_counts(run: Callable[[nn.Module], None]) -> None:
    model = two_layers()
    run(model)
    freeze(model)
    assert frozen_record(model).notes == ()


@pytest.mark.parametrize("checkpoint_of", ["float", "prepared"])
def test_nothing_is_asked_of_layers_that_a_checkpoint_was_loaded_into(checkpoint_of: str) -> None:
    model = two_layers()
    other = two_layers() if checkpoint_of == "prepared" else nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    model.load_state_dict(other.state_dict())
    assert reached(model) == [False, False]
    freeze(model)
    assert frozen_record(model).notes == ()


def test_a_checkpoint_of_one_layer_says_nothing_of_the_other() -> None:
    model = two_layers()
    model.load_state_dict({"0.weight": torch.zeros(32, 64)}, strict=False)
    model.append(nn.Identity())
    model.forward = lambda x: x  # type: ignore[method-assign]
    model(torch.zeros(1))
    assert reached(model) == [False, False]
    with pytest.raises(StateError, match=r"2 prepared layers never ran with their quantized weight \(0, 1\)"):
        freeze(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
@pytest.mark.parametrize("compiled", ["layer", "model"])
def test_nothing_is_asked_of_compiled_layers(compiled: str, caplog: pytest.LogCaptureFixture) -> None:
    model = two_layers()
    (model[0] if compiled == "layer" else model).compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        model(torch.randn(2, 64))
    assert reached(model) == [False, compiled == "layer"]
    freeze(model)
    assert not [record for record in caplog.records if record.name == "qat"]
    assert frozen_record(model).notes == ()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
def test_compiled_checkpointing_of_a_layer_is_one_graph() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    qat.prepare(model, F32)
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 64)).sum().backward()
    assert model[0].weight.grad is not None


def test_what_inspection_noted_and_what_was_untied_is_recorded() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    notes = qat.prepare(model, QuantSpec(overrides={"lm_head": "int8"})).inspection.notes
    freeze(model, allow_unreached=True)
    assert frozen_record(model).notes == (*notes, "untied: lm_head")


def frozen_llama(**spec: Any) -> nn.Module:
    model = tiny_model("llama")
    qat.prepare(model, QuantSpec(**spec), target="transformers")
    model(input_ids=tokens())
    freeze(model)
    return model


def diffusers_model() -> nn.Module:
    from tests.diffusion_architectures import ARCHITECTURES

    architecture = ARCHITECTURES["DiTTransformer2DModel"]
    model = architecture.build()
    qat.prepare(model, F32, target="diffusers")
    model(**architecture.example())
    freeze(model)
    return model


@pytest.mark.parametrize(
    "arguments", [{}, {"safe_serialization": True, "max_shard_size": "1GB"}], ids=["plain", "more"]
)
@pytest.mark.parametrize(
    ("make", "name", "part"),
    [
        (frozen_llama, "LlamaForCausalLM", ""),
        (lambda: frozen_llama(weights="int4", dtype="bfloat16"), "LlamaForCausalLM", ""),
        (frozen_llama, "LlamaModel", "model"),
        (diffusers_model, "DiTTransformer2DModel", ""),
    ],
    ids=["llama", "int4", "a model inside", "diffusers"],
)
def test_a_frozen_model_refuses_save_pretrained(
    make: Callable[[], nn.Module], name: str, part: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = make().get_submodule(part)
    with pytest.raises(StateError) as raised:
        model.save_pretrained(tmp_path / "saved", **arguments)
    assert str(raised.value) == (
        f"save_pretrained: this {name} is frozen, and what it would write loads with random weights: write it by "
        "qat.export(model, directory)"
    )
    assert not (tmp_path / "saved").exists()


def test_models_inside_a_wrapper_refuse_save_pretrained_too(tmp_path: Path) -> None:
    wrapped = nn.ModuleDict({"one": tiny_model("llama"), "two": tiny_model("bert")})
    qat.prepare(wrapped, F32)
    for model in wrapped.values():
        model(input_ids=tokens())
    freeze(wrapped)
    for name, model in (("LlamaForCausalLM", wrapped["one"]), ("BertModel", wrapped["two"])):
        save: Any = model.save_pretrained
        with pytest.raises(StateError, match=f"this {name} is frozen"):
            save(tmp_path)


def test_a_prepared_model_and_an_export_still_save(tmp_path: Path) -> None:
    prepared: Any = tiny_model("llama")
    qat.prepare(prepared, F32, target="transformers")
    prepared.save_pretrained(tmp_path / "masters")
    again = type(prepared).from_pretrained(tmp_path / "masters")
    assert torch.equal(again.lm_head.weight, prepared.lm_head.weight)
    assert "model.safetensors" in qat.export(frozen_llama(dtype="float32"), tmp_path / "export").files


def test_a_run_in_float_is_no_run_of_quantized_layers() -> None:
    """As a schedule whose quantization begins after the last step."""
    model = two_layers()
    for _, layer in quantized_layers(model):
        layer.mode = Mode(weights=False)
    model(torch.randn(2, 64))
    with pytest.raises(StateError, match=r"2 prepared layers never ran with their quantized weight"):
        freeze(model)


def test_a_run_before_a_checkpoint_says_nothing_of_its_weights() -> None:
    model = two_layers()
    model(torch.randn(2, 64))
    model.load_state_dict(two_layers().state_dict())
    model.append(nn.Identity())
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    model(torch.randn(2, 64))
    with pytest.raises(StateError, match=r"1 prepared layers never ran with their quantized weight \(1\)"):
        freeze(model)


def prune_it(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def patch_it(layer: nn.Module) -> None:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)  # type: ignore[method-assign, arg-type]


@pytest.mark.parametrize("change", [prune_it, patch_it])
def test_a_layer_that_changed_since_it_was_prepared_is_refused(change: Callable[[nn.Module], None]) -> None:
    model = two_layers()
    model(torch.randn(2, 64))
    change(model[0])
    with pytest.raises(StateError, match="model: layer '0' has changed since it was prepared: its "):
        freeze(model)
    assert isinstance(model[1], QLinear)


def test_hooks_that_freezing_drops_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = two_layers()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(y))
    model(torch.randn(2, 64))
    freeze(model)
    assert "1 layers have hooks, which freezing drops: 1" in caplog.text


@pytest.mark.parametrize("key", ["0.bias", "norm.weight"])
def test_numbers_that_float16_cannot_hold_are_refused(key: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    model.add_module("norm", nn.LayerNorm(32))
    qat.prepare(model, QuantSpec(weights="int8", dtype="float16"))
    model.get_parameter(key).data[3] = 1e5
    with pytest.raises(StateError, match=rf"model: {key} holds numbers beyond .65504, .* serve in bfloat16"):
        freeze(model)
    assert isinstance(model[0], QLinear)


@pytest.mark.parametrize("count", [1, 2])
def test_prepared_layers_that_were_replaced_are_refused(count: int) -> None:
    """As resize_token_embeddings replaces a head, and merge_and_unload of peft all layers under adapters."""
    model = two_layers()
    for index in range(2 - count, 2):
        model[index] = nn.Linear(*model[index].weight.shape[::-1])
    with pytest.raises(StateError, match=rf"{count} of 2 prepared layers were replaced since .*leave peft's merge_and"):
        freeze(model)


def test_prepared_layers_with_other_names_are_frozen() -> None:
    model = two_layers()
    model[1] = nn.Sequential(model[1])
    assert set(freeze(model).layers) == {"0", "1.0"}


def test_a_master_narrower_than_the_serving_dtype_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for dtype, said in ((torch.bfloat16, True), (torch.float32, False)):
        caplog.clear()
        model = nn.Sequential(nn.Linear(64, 32)).to(dtype)
        qat.prepare(model, F32)
        freeze(model)
        assert ("1 layers trained in a narrower dtype than they are served in" in caplog.text) is said


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_table_that_no_file_holds_and_that_was_changed_is_told(
    factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    rotary = model.get_submodule("model.rotary_emb")
    rotary.inv_freq.mul_(factor)  # position interpolation
    rotary.bfloat16()
    qat.prepare(model, F32)
    freeze(model)
    told = "model.rotary_emb.inv_freq is in no file: it is set to what the target's loader makes, not what it was"
    assert (told in caplog.text) is (factor != 1.0)


def test_an_interrupted_freeze_is_refused_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    qat.prepare(model, qat.QuantSpec())
    original, count = freezing._freeze_layer, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(freezing, "_freeze_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qat.freeze(model)
    monkeypatch.undo()
    with pytest.raises(StateError, match=r"1 layers are frozen and others are not \(first: '0'\)"):
        qat.freeze(model)
