"""Every reason for which a layer stays float, what a target cannot tell apart, and bytes that come true."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qat
from qat.errors import SpecError, StateError, TargetError
from qat.inspection import InspectReport, LayerInspection, inspect
from qat.layers import QLinear
from qat.spec import LayerSpec, QuantSpec
from tests.helpers import DTYPES, WEIGHT_TYPES, of_transformers, tiny_model


class Router(nn.Linear):
    """A subclass with a forward of its own."""


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)


class Net(nn.Module):
    """Two blocks, and a last layer that is called like one in each block, as in Flux."""

    def __init__(self, width: int = 64, last: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.proj_out = nn.Linear(width, last or width)

    def get_output_embeddings(self) -> nn.Module | None:
        return None


class HeadNet(Net):
    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out


class KeepingNet(Net):
    _keep_in_fp32_modules = ("proj_out",)


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.body = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 32, bias=False)
        self.lm_head.weight = self.embed.weight


def several_names() -> nn.Module:
    shared = nn.Linear(64, 64)
    return nn.ModuleDict({"one": shared, "two": shared, "other": nn.Linear(64, 64)})


def rows(report: InspectReport) -> dict[str, LayerInspection]:
    return {layer.name: layer for layer in report.layers}


F32 = QuantSpec(dtype="float32")
HAZARDS = nn.ModuleDict({"bad": nn.Linear(20, 8), "good": nn.Linear(32, 8)})
ENCODER = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(64, 4, 64), "good": nn.Linear(64, 64)})


@pytest.mark.parametrize(
    ("model", "spec", "target", "name", "reason"),
    [
        (Net(), QuantSpec(exclude="proj_out"), "quanto", "proj_out", "excluded by 'proj_out'"),
        (Net(), QuantSpec(include="blocks.*"), "quanto", "proj_out", "matches no include pattern"),
        (Net(), QuantSpec(overrides={"proj_out": "float"}), "quanto", "proj_out", "override 'proj_out': float"),
        (
            nn.ModuleDict({"router": Router(64, 4), "good": nn.Linear(64, 4)}),
            F32,
            "quanto",
            "router",
            "Router is not exactly nn.Linear: its own forward would be lost",
        ),
        (
            ENCODER,
            F32,
            "quanto",
            "encoder.self_attn.out_proj",
            "NonDynamicallyQuantizableLinear is not exactly nn.Linear",
        ),
        (
            ENCODER,
            F32,
            "quanto",
            "encoder.linear1",
            "TransformerEncoderLayer reads the weight without calling the layer",
        ),
        (
            ENCODER,
            F32,
            "quanto",
            "encoder.linear2",
            "TransformerEncoderLayer reads the weight without calling the layer",
        ),
        (several_names(), F32, "quanto", "one", "registered under several names \\['one', 'two'\\]"),
        (TiedNet(), F32, "quanto", "lm_head", "tied to another weight \\(include it by name"),
        (HeadNet(), F32, "quanto", "proj_out", "output head, float by default \\(include it by name"),
        (HAZARDS, QuantSpec(), "quanto", "bad", "kernel: int8 with bfloat16 .* \\(20\\) is not a multiple of 16"),
        (
            of_transformers(nn.ModuleDict({"bad": nn.Linear(256, 24), "good": nn.Linear(256, 32)})),
            QuantSpec(weights="int4"),
            "transformers",
            "bad",
            "kernel: int4 with bfloat16 .* out_features \\(24\\) divisible by 16",
        ),
        (
            of_transformers(KeepingNet()),
            QuantSpec(dtype="float16"),
            "transformers",
            "proj_out",
            "kept in float32 by the loader",
        ),
    ],
    ids=[
        "excluded",
        "not included",
        "override to float",
        "subclass",
        "attention's out_proj",
        "encoder layer's linear1",
        "encoder layer's linear2",
        "several names",
        "tied",
        "output head",
        "int8 hazard",
        "int4 hazard",
        "kept in float32",
    ],
)
def test_a_layer_stays_float_for_a_reason(
    model: nn.Module, spec: QuantSpec, target: str, name: str, reason: str
) -> None:
    report = inspect(model, spec, target=target)
    row = rows(report)[name]
    assert row.weights is None
    assert row.bytes_after == row.bytes_before
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(row.reason)
    assert any(layer.weights for layer in report.layers)
    assert row.reason in str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hazard_or_a_kept_module_is_one_of_its_dtype_only(dtype: str) -> None:
    spec = QuantSpec.model_validate({"dtype": dtype})
    assert rows(inspect(of_transformers(KeepingNet()), spec, target="transformers"))["proj_out"].weights == "int8"
    assert (rows(inspect(HAZARDS, spec))["bad"].weights == "int8") is (dtype == "float32")


def test_a_hazard_cannot_be_asked_for_by_name() -> None:
    assert rows(inspect(HAZARDS, QuantSpec(include=("bad", "good"))))["bad"].weights is None


def test_a_model_that_is_itself_a_linear_layer_cannot_be_replaced() -> None:
    with pytest.raises(
        SpecError, match="it is the model itself, which cannot be replaced in place: put it into a module"
    ):
        inspect(nn.Linear(64, 64), F32)


def test_a_head_or_a_tied_weight_is_quantized_when_it_is_named() -> None:
    assert rows(inspect(HeadNet(), QuantSpec(overrides={"proj_out": "int4"})))["proj_out"].weights == "int4"
    report = inspect(TiedNet(), QuantSpec(include="*"))
    assert rows(report)["lm_head"].weights == "int8"
    assert "lm_head: its weight is tied; quantizing it breaks the tie" in "\n".join(report.notes)


def test_an_untied_weight_is_counted_with_its_float_copy() -> None:
    spec = QuantSpec(include=("body", "lm_head"))
    report, float_head = inspect(TiedNet(), spec), inspect(TiedNet(), QuantSpec())
    head = rows(report)["lm_head"]
    assert report.parameters == float_head.parameters + 32 * 64
    assert head.bytes_after == head.bytes_before + 32 * 64 + 32 * 2  # the floats, the codes, the scales
    assert "its float copy stays in the file beside the codes" in "\n".join(report.notes)
    model = TiedNet()
    qat.prepare(model, spec)
    assert sum(p.numel() for p in model.parameters()) == report.parameters


def test_two_layers_that_are_tied_to_each_other_leave_no_float_copy() -> None:
    model = nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Linear(64, 64)})
    model["two"].weight = model["one"].weight
    report = inspect(model, QuantSpec(include="*"))
    assert report.parameters == 2 * (64 * 64 + 64)
    assert report.bytes_after == 2 * (64 * 64 + 64 * 2)
    assert "float copy" not in "\n".join(report.notes)


@pytest.mark.parametrize("verb", [inspect, qat.prepare])
@pytest.mark.parametrize("spec", [{"weights": "int4"}, "int4", None], ids=str)
def test_what_is_no_spec_is_refused(verb: Callable[..., object], spec: object) -> None:
    with pytest.raises(SpecError, match=r"spec: must be a QuantSpec, got .*: write QuantSpec\(weights='int8'\)"):
        verb(Net(), spec)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_tie_is_seen_on_the_meta_device_too(name: str) -> None:
    with torch.device("meta"):
        model = tiny_model(name, tie_word_embeddings=True)
    head = rows(inspect(model, QuantSpec()))["lm_head"]
    assert head.weights is None
    assert "tied" in head.reason


def test_the_meta_device_gives_the_same_report() -> None:
    real = inspect(tiny_model("bert"), QuantSpec(weights="int4", overrides={"*.query": "int8"}), target="transformers")
    with torch.device("meta"):
        model = tiny_model("bert")
    assert inspect(model, real.spec, target="transformers") == real


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(256, 256)
        self.pooler = nn.Linear(256, 32)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.pooler(self.body(x)[:, 0]))
        return y


@pytest.mark.parametrize("batch", ["tensor", "tuple", "mapping"])
def test_an_example_finds_layers_whose_input_a_kernel_cannot_read(batch: str) -> None:
    model, x = Pooling().train(), torch.randn(4, 3, 256)
    mean = model.norm.running_mean.clone()  # type: ignore[union-attr]
    example = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}[batch]
    spec = QuantSpec(weights="int4")
    assert rows(inspect(model, spec))["pooler"].weights == "int4"
    report = rows(inspect(model, spec, example_inputs=example))
    assert report["body"].weights == "int4"
    assert report["pooler"].weights is None
    assert "raises on a CPU when the input is not contiguous" in report["pooler"].reason
    assert qat.prepare(model, spec, example_inputs=example).layers == ("body",)
    assert torch.equal(model.norm.running_mean, mean)  # type: ignore[arg-type]
    assert model.training


@pytest.mark.parametrize(
    ("spec", "target", "error", "message"),
    [
        (QuantSpec(exclude="blocks.0.to_k"), "quanto", SpecError, "exclude: pattern .* did you mean .*to_q"),
        (
            QuantSpec(exclude="*"),
            "quanto",
            SpecError,
            "no layer .* would be quantized; reasons: .*excluded.*change the spec",
        ),
        (QuantSpec(), "onnx", TargetError, "target: must be one of .* got 'onnx'"),
        (QuantSpec(activations="int8"), "diffusers", TargetError, "use None, or target 'quanto'"),
        (
            QuantSpec(),
            "diffusers",
            TargetError,
            "loads models of diffusers, got a Net: pass the pipeline's transformer",
        ),
        (QuantSpec(quantize_outputs=False), "quanto", TargetError, "leave it out"),
    ],
    ids=["pattern", "nothing left", "unknown target", "activations for diffusers", "no diffusers", "float outputs"],
)
def test_a_spec_that_does_not_fit_is_refused(
    spec: QuantSpec, target: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        inspect(Net(), spec, target=target)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(SpecError, match=r"the model has no nn.Linear"):
        inspect(nn.Sequential(nn.Conv3d(1, 1, 1)), QuantSpec())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(SpecError, match=r"model: must be an nn\.Module, .*got None: load the model first"):
        inspect(None, QuantSpec())


def test_a_layer_that_a_plain_list_holds_too_stays_float() -> None:
    model = Net()
    model.plan = {"first": [model.blocks[0].to_q], "other": nn.Linear(2, 2)}
    reasons = {row.name: row.reason for row in inspect(model, F32).layers if row.weights is None}
    assert reasons["blocks.0.to_q"] == "also held in plan, a plain container, in which loaders replace nothing"


def test_a_prepared_or_frozen_model_is_refused() -> None:
    model = Net()
    qat.prepare(model, F32)
    with pytest.raises(StateError, match=r"'blocks.0.to_q' is prepared or frozen already: start from a float model"):
        inspect(model, F32)
    qat.freeze(model, allow_unreached=True)
    with pytest.raises(StateError, match="start from a float model"):
        inspect(model, F32)


def test_inspecting_changes_nothing() -> None:
    model = TiedNet()
    before = dict(model.named_modules()), {name: id(p) for name, p in model.named_parameters()}
    inspect(model, QuantSpec(include="*"))
    assert (dict(model.named_modules()), {name: id(p) for name, p in model.named_parameters()}) == before
    assert not any(isinstance(module, QLinear) for module in model.modules())


ODD_SHAPES = [(1, 8), (3, 5), (1, 256), (3, 256), (5, 192), (7, 200), (16, 256), (33, 160)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHT_TYPES)
def test_the_bytes_are_those_of_the_frozen_state(weights: str, dtype: str) -> None:
    model = nn.ModuleDict({f"{out}x{n}": nn.Linear(n, out) for out, n in ODD_SHAPES})
    report = qat.prepare(model, QuantSpec.model_validate({"weights": weights, "dtype": dtype})).inspection
    qat.freeze(model, allow_unreached=True)
    state = model.state_dict()
    for row in report.layers:
        stored = sum(t.numel() * t.element_size() for key, t in state.items() if key.startswith(f"{row.name}.weight"))
        assert row.bytes_after == stored, row
        out_features, in_features = row.shape
        assert row.bytes_before == out_features * in_features * DTYPES[dtype].itemsize
    assert report.bytes_after == sum(row.bytes_after for row in report.layers)


def test_totals() -> None:
    report = inspect(Net(), QuantSpec(exclude="proj_out"))
    assert report.parameters == 5 * (64 * 64 + 64)
    assert report.quantized_parameters == 4 * 64 * 64
    assert report.quantized_share == pytest.approx(4 * 64 / (5 * 65))
    assert report.linear_share == pytest.approx(0.8)


def test_a_report_survives_json() -> None:
    overrides: dict[str, object] = {"proj_out": LayerSpec(weights="int8"), "*.to_q": "float"}
    spec = QuantSpec.model_validate({"weights": "int4", "overrides": overrides})
    report = inspect(of_transformers(Net()), spec, target="transformers")
    data = json.loads(json.dumps(report.to_json()))
    assert QuantSpec.model_validate(data["spec"]) == spec
    assert tuple(LayerInspection(**row | {"shape": tuple(row["shape"])}) for row in data["layers"]) == report.layers
    assert (data["target"], data["quantized_share"]) == ("transformers", report.quantized_share)


def test_a_report_prints_as_a_table() -> None:
    spec = QuantSpec(weights="int4", activations="int8", exclude="*.to_q", dtype="float32")
    lines = inspect(Net(width=256), spec).table().splitlines()
    assert lines[0].split() == ["layer", "shape", "weights", "group", "MiB", "reason"]
    assert len(lines) == 1 + 5 + 1
    table = {line.split()[0]: line for line in lines[1:6]}
    assert "256x256" in table["proj_out"]
    assert "int4+int8" in table["proj_out"]
    assert " 128 " in table["proj_out"]
    assert "0.25 -> 0.04" in table["proj_out"]  # half a byte each, and 8 bytes a group of 128
    assert table["blocks.0.to_q"].endswith("excluded by '*.to_q'")
    assert "parameters quantized for target 'quanto'" in lines[-1]


def test_layers_that_differ_only_by_numbers_are_one_line() -> None:
    report = inspect(
        Net(width=256), QuantSpec(weights="int4", overrides={"blocks.1.proj_out": "int8"}, dtype="float32")
    )
    rows = {line.split("  ")[0]: line.split() for line in str(report).splitlines()[1:-1]}
    assert list(rows) == ["blocks.*.to_q", "blocks.0.proj_out", "blocks.1.proj_out", "proj_out"]
    assert rows["blocks.*.to_q"][1:] == ["x2", "256x256", "int4", "128", "0.50", "->", "0.07"]  # MiB of both
    assert rows["blocks.0.proj_out"][1] == "256x256"
    assert len(report.table().splitlines()) == 1 + 5 + 1


def test_numbers_within_reasons_do_not_keep_lines_apart() -> None:
    def row(name: str, reason: str) -> LayerInspection:
        return LayerInspection(name, "Linear", (8, 8), None, None, None, reason, 0, 0)

    reasons = [f"belongs to the adapter top.layers.{n}.q: merge it" for n in (0, 1)]
    layers = [row(f"top.layers.{n}.q.lora_{ab}", reasons[n]) for n in (0, 1) for ab in "AB"]
    layers += [row("first.5.x", "error 0.5"), row("first.6.x", "error 0.6")]
    report = InspectReport("quanto", F32, tuple(layers), 1)
    lines = [line.split("  ") for line in str(report).splitlines()[1:-1]]
    assert [line[0] for line in lines] == ["top.layers.*.q.lora_A", "top.layers.*.q.lora_B", "first.5.x", "first.6.x"]
    told = ["belongs to the adapter top.layers.*.q: merge it"] * 2 + ["error 0.5", "error 0.6"]
    assert [line[-1] for line in lines] == told
