"""What each loader can express, and the stock faults that the rules come from, measured again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from optimum.quanto import freeze, qtypes, quantize
from optimum.quanto.tensor import WeightQBitsTensor
from torch import nn

from qat.errors import TargetError
from qat.formats import QUANTO
from qat.hosts import TARGETS, get_target
from qat.hosts.base import matches_path_part
from qat.spec import LayerSpec, QuantSpec
from tests.helpers import DTYPES

QUANTO_NAMES = {"int8": "qint8", "float8": "qfloat8_e4m3fn", "int4": "qint4", "int2": "qint2"}
ACTIVATIONS_IN_ONE_LAYER = {"a": LayerSpec(weights="int8", activations="int8")}


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    for name in ("onnx", ["onnx"], None):
        with pytest.raises(
            TargetError, match=r"target: must be one of .*'diffusers', .*'quanto', 'transformers'.*, got"
        ):
            get_target(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_knows_its_name_and_has_no_fault_in_the_default_spec(name: str) -> None:
    target = get_target(name)
    assert target.name == name
    assert target.host.spec_faults(QuantSpec()) == []
    assert target.host.spec_faults(QuantSpec(overrides={"lm_head": "float"})) == []


@pytest.mark.parametrize("name", ["quanto", "transformers"])
def test_targets_with_a_type_for_each_module_express_mixtures(name: str) -> None:
    spec = QuantSpec(weights="int4", activations="int8", overrides={"a": "int2", "b": LayerSpec(weights="float8")})
    assert get_target(name).host.spec_faults(spec) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec(activations="int8"), "activations='int8': .*use None, or target 'quanto'"),
        (QuantSpec(overrides=ACTIVATIONS_IN_ONE_LAYER), "activations='int8': .*use None, or target 'quanto'"),
        (QuantSpec(weights="int4", overrides={"a": "int8"}), r"\('int4' here\), got also \['int8'\]: use 'float'"),
    ],
    ids=["activations", "activations of one layer", "two weight types"],
)
def test_diffusers_refuses_what_its_config_cannot_say(spec: QuantSpec, message: str) -> None:
    (fault,) = get_target("diffusers").host.spec_faults(spec)
    with pytest.raises(TargetError, match=message):
        raise TargetError(fault)


def test_float_outputs_are_refused_where_the_loader_quantizes_them() -> None:
    spec = QuantSpec(activations="int8", quantize_outputs=False)
    (fault,) = get_target("quanto").host.spec_faults(spec)
    assert "quantize_outputs=False" in fault
    assert (
        "stock requantize quantizes every output: leave it out; models of transformers can have float outputs" in fault
    )
    assert "all other modules cannot" in fault
    assert get_target("transformers").host.spec_faults(spec) == []  # its plug-in is ours


class _Keeper(nn.Module):
    _keep_in_fp32_modules = ("wo", "time_embedder")
    _keep_in_fp32_modules_strict = ("router",)


@pytest.mark.parametrize(
    ("target", "dtype", "kept"),
    [
        ("quanto", "float16", set()),
        ("quanto", "bfloat16", set()),
        ("transformers", "float32", set()),
        ("transformers", "bfloat16", {"router"}),
        ("transformers", "float16", {"wo", "time_embedder", "router"}),
        ("diffusers", "float32", set()),
        ("diffusers", "bfloat16", {"wo", "time_embedder"}),
        ("diffusers", "float16", {"wo", "time_embedder"}),
    ],
    ids=lambda value: " ".join(sorted(value)) or "none" if isinstance(value, set) else value,
)
def test_what_a_loader_keeps_in_float32(target: str, dtype: str, kept: set[str]) -> None:
    chosen, model, served = get_target(target), _Keeper(), DTYPES[dtype]
    rules = chosen.rules(model, served)
    for part in ("wo", "time_embedder", "router", "other"):
        name = f"block.0.{part}.linear_1.weight"
        assert chosen.host.kept_in_float32(model, name, served) is (part in kept)
        assert rules.tensor_dtype(name) is (torch.float32 if part in kept else served)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_own_plan_keeps_the_same(dtype: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    plan = model._get_dtype_plan(DTYPES[dtype])
    host = get_target("transformers").host
    for name, _ in model.named_parameters():
        theirs = matches_path_part(name, {key for key, planned in plan.items() if planned is torch.float32})
        assert host.kept_in_float32(model, name, DTYPES[dtype]) is (theirs and dtype != "float32"), name


@pytest.mark.parametrize(
    ("name", "matches"),
    [("a.wo", True), ("wo.weight", True), ("a.wo.b", True), ("a.two.b", False), ("a.wo2.b", False), ("a.x_wo", False)],
    ids=str,
)
def test_path_parts_have_boundaries(name: str, matches: bool) -> None:
    assert matches_path_part(name, {"wo"}) is matches


@pytest.mark.parametrize(
    ("weights", "dtype", "shape", "hazard"),
    [
        ("int8", "bfloat16", (8, 20), True),
        ("int8", "bfloat16", (8, 30), False),
        ("int8", "bfloat16", (8, 32), False),
        ("int8", "float32", (8, 20), False),
        ("int8", "float16", (8, 20), False),
        ("float8", "bfloat16", (8, 20), False),
        ("int4", "bfloat16", (24, 256), True),
        ("int4", "bfloat16", (32, 256), False),
        ("int4", "bfloat16", (24, 192), False),
        ("int4", "bfloat16", (24, 128), False),
        ("int4", "float32", (24, 256), False),
        ("int2", "bfloat16", (24, 256), False),
    ],
    ids=str,
)
def test_kernel_hazards(weights: str, dtype: str, shape: tuple[int, int], hazard: bool) -> None:
    reason = QUANTO.layer_hazard(QUANTO.types(weights, None, DTYPES[dtype]), shape)
    assert (reason is not None) is hazard
    if reason is not None:
        assert reason.startswith("kernel: ")


@pytest.mark.parametrize(
    ("weights", "dtype", "view", "hazard"),
    [
        ("int4", "bfloat16", "pooled", True),
        ("int4", "bfloat16", "whole", False),
        ("int4", "float32", "pooled", False),
        ("int8", "bfloat16", "pooled", False),
        ("int8", "bfloat16", "turned", True),
        ("int8", "float32", "turned", False),
        ("int8", "bfloat16", "whole", False),
        ("float8", "bfloat16", "turned", False),
    ],
    ids=str,
)
def test_input_hazards_are_what_stock_kernels_refuse(weights: str, dtype: str, view: str, hazard: bool) -> None:
    hidden = torch.randn(4, 3, 256).to(DTYPES[dtype])
    x = {"pooled": hidden[:, 0], "whole": hidden, "turned": torch.randn(256, 8).to(hidden.dtype).t()}[view]
    model = nn.Sequential(nn.Linear(256, 32)).to(hidden.dtype)
    quantize(model, weights=QUANTO_NAMES[weights])
    freeze(model)
    reason = QUANTO.input_hazard(QUANTO.types(weights, None, DTYPES[dtype]), x)
    assert (reason is not None) is hazard
    with torch.no_grad():
        if hazard:
            with pytest.raises(RuntimeError, match="contiguous"):
                model(x)
        else:
            assert model(x).isfinite().all()


_INT8_PROBE = """
import torch
from optimum.quanto import freeze, qint8, quantize
torch.manual_seed(0)
for in_features in (48, 30, 20):
    for tokens in (1, 2, 4, 8):
        model = torch.nn.Sequential(torch.nn.Linear(in_features, 32, bias=False)).bfloat16().requires_grad_(False)
        x = torch.randn(tokens, in_features).bfloat16()
        quantize(model, weights=qint8)
        freeze(model)
        expected = x.float() @ model[0].weight.dequantize().float().T
        worst = (model(x).float() - expected).abs().max() / expected.abs().max()
        if not worst < 0.1:
            raise SystemExit("garbage")
    print(in_features, flush=True)
"""


@pytest.mark.slow
def test_stock_int8_still_fails_in_bfloat16_on_some_row_lengths() -> None:
    # 48 (divisible by 16) and 30 (not by 4) work; 20 crashes, or gives NaN or garbage. When this test fails, torch is
    # mended, and `QUANTO.layer_hazard` can let such layers pass.
    command = [sys.executable, "-W", "ignore", "-c", _INT8_PROBE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["48", "30"]
    assert done.returncode != 0


@pytest.mark.parametrize(("out_features", "works"), [(16, True), (24, False), (40, False), (48, True)], ids=str)
def test_stock_int4_still_needs_16_rows_in_bfloat16(out_features: int, works: bool) -> None:
    rows = out_features * 2
    codes = torch.randint(0, 16, (rows, 128), dtype=torch.uint8)
    scale, shift = torch.rand(rows, 1).bfloat16(), torch.rand(rows, 1).bfloat16()
    parts = (qtypes["qint4"], 0, 128, (out_features, 256), (256, 1), codes, scale, shift)
    if works:
        assert type(WeightQBitsTensor.create(*parts)).__name__ == "TinyGemmWeightQBitsTensor"
    else:
        with pytest.raises(RuntimeError, match="expect N to be dividable by 16"):
            WeightQBitsTensor.create(*parts)
