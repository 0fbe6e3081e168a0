"""What stays float and is said: weights outside linear layers, layers that are not what they seem, adapters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import qat
from qat.errors import SpecError
from qat.inspection import FloatWeight, InspectReport, inspect
from qat.layers import QLinear
from qat.spec import QuantSpec
from tests.architectures import ARCHITECTURES
from tests.helpers import tiny_model

F32 = QuantSpec(dtype="float32")


def reasons(report: InspectReport) -> dict[str, str]:
    return {row.name: row.reason for row in report.layers if row.weights is None}


class Mixed(nn.Module):
    """A weight of every sort: 640 of them in the linear layer, 1,764 elsewhere but for biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3)}) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(3, 16, 8))
        self.bag = nn.EmbeddingBag(10, 16)
        self.pair = nn.Bilinear(4, 4, 4)
        self.recurrent = nn.LSTM(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(16))
        self.linear = nn.Linear(16, 40)
        self.tied = nn.Embedding(10, 16)
        self.tied.weight = self.embed.weight


TABLE = "the loader of target 'quanto' replaces no Embedding: no target for such a model does"
CONVOLUTION = "convolution, float by default (include it by name to quantize it)"


def test_every_weight_outside_linear_layers_is_listed_once() -> None:
    report = inspect(Mixed(), F32)
    assert report.others == (
        FloatWeight("experts", "Mixed", (3, 16, 8)),
        FloatWeight("embed.weight", "Embedding", (10, 16), TABLE),
        FloatWeight("blocks.0.conv.weight", "Conv2d", (4, 2, 3, 3), CONVOLUTION),
        FloatWeight("blocks.1.conv.weight", "Conv2d", (4, 2, 3, 3), CONVOLUTION),
        FloatWeight("bag.weight", "EmbeddingBag", (10, 16)),
        FloatWeight("pair.weight", "Bilinear", (4, 4, 4)),
        FloatWeight("recurrent.weight_ih_l0", "LSTM", (16, 4)),
        FloatWeight("recurrent.weight_hh_l0", "LSTM", (16, 4)),
    )
    assert report.left_float == {
        "experts": "3-D weight of Mixed: no quantized form",
        "embed": TABLE,
        "blocks.0.conv": CONVOLUTION,
        "blocks.1.conv": CONVOLUTION,
        "bag": "2-D weight of EmbeddingBag: no quantized form",
        "pair": "3-D weight of Bilinear: no quantized form",
        "recurrent.weight_ih_l0": "2-D weight of LSTM: no quantized form",
        "recurrent.weight_hh_l0": "2-D weight of LSTM: no quantized form",
    }
    assert report.quantized_parameters == 640


def test_a_note_tells_the_largest_of_them_but_for_embeddings() -> None:
    model = Mixed()
    (note,) = inspect(model, F32).notes
    total = sum(parameter.numel() for parameter in model.parameters())
    told = 3 * 16 * 8 + 2 * 4 * 2 * 9 + 160 + 64 + 2 * 64
    assert note == (
        f"{told / total:.1%} of the parameters are weights outside nn.Linear and stay float: "
        f"experts (Mixed, {384 / total:.1%}), bag.weight (EmbeddingBag, {160 / total:.1%}), "
        f"blocks.*.conv.weight (Conv2d, {144 / total:.1%}), pair.weight (Bilinear, {64 / total:.1%}) and 2 more"
    )
    only = nn.ModuleDict({"embed": nn.Embedding(10, 16), "linear": nn.Linear(16, 16)})
    assert inspect(only, F32).notes == ()
    assert inspect(only, F32).left_float == {"embed": TABLE}


def test_they_stand_in_the_table_and_in_json() -> None:
    report = inspect(Mixed(), F32)
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in str(report).splitlines()}
    share = f"{144 / report.parameters:.1%}"
    assert lines["blocks.*.conv.weight"] == ["float", "-", f"Conv2d, stays float: {share} of the parameters"]
    assert lines["embed.weight"][2].startswith("Embedding, stays float: ")
    data = json.loads(json.dumps(report.to_json()))
    assert tuple(FloatWeight(**row | {"shape": tuple(row["shape"])}) for row in data["others"]) == report.others


class UnknownExperts(MixtralExperts):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


def test_unknown_experts_are_said_in_the_notes_the_manifest_and_the_card(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["MixtralForCausalLM"]
    model: Any = architecture.build()
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = UnknownExperts
    share = sum(p.numel() for p in model.parameters() if p.ndim == 3) / sum(p.numel() for p in model.parameters())
    report = qat.prepare(model, F32, target="transformers").inspection
    (note,) = report.notes
    assert note.startswith(f"{share + 0.001:.1%} of the parameters are weights outside nn.Linear")  # and the routers
    assert "model.layers.*.mlp.experts.gate_up_proj (UnknownExperts, " in note
    assert "model.layers.*.mlp.gate.weight (MixtralTopKRouter, 0.1%)" in note
    model(**architecture.example())
    qat.freeze(model)
    exported = qat.export(model, tmp_path / "out")
    assert note in exported.notes
    manifest = json.loads((tmp_path / "out" / "qat_manifest.json").read_text())
    assert manifest["frozen"]["left_float"] == report.left_float
    experts = {name: reason for name, reason in report.left_float.items() if "experts" in name}
    reason = "3-D weight of UnknownExperts, whose forward is unknown: no quantized form"
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{part}": reason
        for layer in range(2)
        for part in ("gate_up_proj", "down_proj")
    }
    card = (tmp_path / "out" / "README.md").read_text()
    section = card[card.index("## Layers left float") :]
    row = "`model.layers.*.mlp.experts.gate_up_proj` (2), `model.layers.*.mlp.experts.down_proj` (2)"
    assert f"| {row} | 3-D weight of UnknownExperts, whose forward is unknown: no quantized form |" in section
    assert f"- {note}" in section


def test_the_refusal_of_gpt2_says_what_its_layers_are() -> None:
    with pytest.raises(SpecError) as raised:
        inspect(ARCHITECTURES["GPT2LMHeadModel"].build(), QuantSpec())
    assert str(raised.value) == (
        "spec: no layer of the model would be quantized; reasons: [\"the loader of target 'quanto' replaces no Conv1D: "
        "use target 'transformers' or 'gguf'\", \"the loader of target 'quanto' replaces no Embedding: use target "
        "'transformers' or 'gguf'\", 'tied to another weight (include it by name to untie and quantize it)']: use "
        "target 'gguf' or 'transformers', or change the spec's patterns"
    )


@pytest.mark.parametrize(
    ("name", "pattern", "module", "cls"),
    [
        ("Wav2Vec2ForCTC", "*conv_layers.0.conv", None, "Conv1d"),
    ],
)
def test_a_pattern_for_such_weights_is_told_what_they_are(
    name: str, pattern: str, module: str | None, cls: str
) -> None:
    model = ARCHITECTURES[name].build()
    found = module or next(path for path, _ in model.named_modules() if path.endswith(pattern[1:]))
    with pytest.raises(SpecError) as raised:
        inspect(model, QuantSpec(include=pattern))
    assert str(raised.value) == (
        f"include: pattern {pattern!r} matches no layer that can be quantized, only {found} and the like: a {cls}, "
        "whose weights have no quantized form"
    )


def patched(layer: nn.Linear) -> None:
    """As a patch for LoRA does."""
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2  # type: ignore[method-assign, assignment]


def weight_normed(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's notice that there is a newer one
        weight_norm(layer)


OWN_FORWARD = "its object has a forward of its own (as accelerate's hooks and adapters' patches set it), which would"
COMPUTED = "its weight is no parameter of its own but computed before each forward (as pruning and weight_norm do)"
SUBCLASS = "ParametrizedLinear is not exactly nn.Linear: its own forward would be lost"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: add_hook_to_module(layer, ModelHook()), OWN_FORWARD),
        (patched, OWN_FORWARD),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), COMPUTED),
        (lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0), COMPUTED),
        (weight_normed, COMPUTED),
        (spectral_norm, COMPUTED),
        (parametrizations.weight_norm, SUBCLASS),
        (parametrizations.orthogonal, SUBCLASS),
        (lambda layer: setattr(layer, "weight", nn.Buffer(layer.__dict__["_parameters"].pop("weight").data)), COMPUTED),
        (lambda layer: layer.double().to(torch.complex64), "its weight has dtype torch.complex64: a master weight is"),
    ],
    ids=[
        "accelerate's hook",
        "patched forward",
        "prune",
        "structured prune",
        "weight_norm",
        "spectral_norm",
        "parametrized weight_norm",
        "parametrized orthogonal",
        "buffer",
        "complex",
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_a_layer_that_is_more_than_it_seems_stays_float(change: Callable[[nn.Linear], Any], reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    change(model[0])
    report = qat.prepare(model, F32).inspection
    assert list(reasons(report)) == ["0"]
    assert reasons(report)["0"].startswith(reason)
    assert report.left_float == reasons(report)
    assert [isinstance(layer, QLinear) for layer in model] == [False, False, True]


@pytest.mark.parametrize("change", [prune.l1_unstructured, prune.random_unstructured], ids=["l1", "random"])
@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "loaded"])
def test_a_pruned_layer_is_served_as_it_was_trained(change: Callable[..., Any], loaded: bool) -> None:
    def prepared() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        change(model[0], "weight", 0.5)
        qat.prepare(model, F32)
        return model

    model, truth, again = prepared(), prepared(), prepared()
    x, y = torch.randn(16, 64), torch.randint(0, 8, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for other in (truth, again):
        other.load_state_dict(model.state_dict())
    expected = truth.eval()(x)
    served = again if loaded else model
    qat.freeze(served)
    torch.testing.assert_close(served(x), expected, rtol=1e-5, atol=1e-6)


def test_a_model_whose_every_layer_has_a_hook_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = dispatch_model(tiny_model("llama"), {"": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(SpecError, match=r"no layer of the model would be quantized; reasons: .*accelerate's hooks"):
        qat.prepare(model, F32)
    assert not any(isinstance(module, QLinear) for module in model.modules())


class _Lora(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 64, bias=False)})


@pytest.mark.parametrize("module", ["peft.tuners.loha.layer", "mine"])
def test_what_is_part_of_an_adapter_of_peft_stays_float(module: str) -> None:
    lora = type("Linear", (_Lora,), {"__module__": module})
    model = nn.ModuleDict({"up": lora(nn.Linear(64, 64)), "down": nn.Linear(64, 64)})
    found = reasons(inspect(nn.ModuleDict({"deep": model}), F32))
    parts = ("base_layer", "lora_A.default", "lora_B.default")
    reason = "belongs to the adapter deep.up: merge it into the model first (in peft: merge_and_unload)"
    expected = {f"deep.up.{part}": reason for part in parts}
    assert found == (expected if module.startswith("peft") else {})
