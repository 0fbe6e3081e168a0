"""Tiny random diffusion transformers through the whole line, to what stock diffusers loads in a process without `qat`.

`scripts.diffusers_matrix` compares: every code, scale, shift, dequantized weight, other parameter and buffer, and every
output, bit for bit. Its larger table, with every class of `tests.diffusion_architectures`, is in
docs/results/diffusers.md.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from scripts._diffusers_table import DTYPES, WEIGHTS, Outcome, Table, document
from scripts.diffusers_matrix import CASES, WAYS, make, names_of, run_case, run_plug_in
from scripts.json_workers import Worker
from tests.diffusion_architectures import ARCHITECTURES, LEFT_OUT, exported_transformers
from tests.exports import rewrite

TESTED = (
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
    "SanaTransformer2DModel",
    "QwenImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "AuraFlowTransformer2DModel",
    "OmniGenTransformer2DModel",  # rewrites a buffer that no file holds whenever it runs
    "WanTransformer3DModel",  # keeps layers in float32
    "Kandinsky5Transformer3DModel",  # so does this, and most others share their last names
    "HunyuanVideoTransformer3DModel",
    "CogVideoXTransformer3DModel",
)
# Rounding in the stock kernels: sums in another order, and in bfloat16 each sum's rounding to 8 bits.
GAPS = {"float32": 1e-5, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def stock() -> Iterator[Worker]:
    with Worker("scripts.stock_diffusers") as worker:
        yield worker


def assert_equal(outcome: Outcome) -> None:
    assert outcome.result == "equal", f"{outcome.detail}\n{outcome.traceback}"


@pytest.mark.loads("diffusers", "stock diffusers", weights=WEIGHTS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # Kandinsky's own norms
@pytest.mark.parametrize("name", TESTED)
def test_stock_diffusers_loads_what_was_frozen(name: str, stock: Worker, tmp_path: Path) -> None:
    """Every type in one of both dtypes, by turns; the script takes all."""
    for number, weights in enumerate(WEIGHTS):
        dtype = DTYPES[(number + TESTED.index(name)) % 2]
        outcome = run_case(name, weights, dtype, tmp_path, make, stock.ask)
        assert_equal(outcome)
        assert outcome.linear_share > (0.15 if name.startswith("Kandinsky") else 0.8), outcome
        assert all(outcome.left_float.values()), outcome
        assert outcome.kernel_gap is not None
        assert outcome.kernel_gap < GAPS[dtype], outcome
        assert (outcome.fake_gap is None) == (dtype != "float32")
        assert outcome.fake_gap is None or outcome.fake_gap < GAPS[dtype], outcome


# Modulation and the last layer start with zeros; a scale of 0 would make float8's codes NaN.
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_start_with_zeros_load_too(weights: str, dtype: str, stock: Worker, tmp_path: Path) -> None:
    def zeros(request: Mapping[str, Any]) -> Mapping[str, Any]:
        return make(dict(request) | {"zeros": True})

    model = ARCHITECTURES["ErnieImageTransformer2DModel"].build(zeros=True)
    assert not model.get_parameter("final_linear.weight").any()
    assert_equal(run_case("ErnieImageTransformer2DModel", weights, dtype, tmp_path, zeros, stock.ask))


def test_a_gguf_file_loads_by_stock_code(stock: Worker, tmp_path: Path) -> None:
    assert_equal(
        run_case("SD3Transformer2DModel", "q4_1", "bfloat16", tmp_path, make, stock.ask, target="gguf-diffusers")
    )


def test_the_plug_in_gives_the_outputs_of_stock_code(stock: Worker, tmp_path: Path) -> None:
    """Also where torch.matmul sums in another order when a weight has no gradient."""
    with Worker("scripts.stock_diffusers", "--plug-in") as plug_in:
        at = "BriaFibo2Transformer2DModel", "int4", "float32", tmp_path, make, stock.ask, plug_in.ask
        outcomes = list(run_plug_in(*at))
    assert [outcome.case.partition(",")[0] for outcome in outcomes] == [way for way in WAYS if "directory" in way]
    for outcome in outcomes:
        assert_equal(outcome)


def test_the_page_is_made_from_the_rows() -> None:
    results = Path(__file__).parents[1] / "docs" / "results"
    found = json.loads((results / "diffusers.json").read_text(encoding="utf-8"))["cases"]
    tables = {case: Table.read(part) for case, part in found.items()}
    assert {case: list(table.rows) for case, table in tables.items()} == {case: names_of(case) for case in CASES}
    assert document(tables) == (results / "diffusers.md").read_text(encoding="utf-8")


def test_every_exported_transformer_is_tried_or_left_out_with_a_reason() -> None:
    exported = set(exported_transformers())
    assert len(exported) > 60
    assert exported >= {name for name in dir(diffusers) if "Transformer" in name}
    assert exported == ARCHITECTURES.keys() | LEFT_OUT.keys()
    assert not ARCHITECTURES.keys() & LEFT_OUT.keys()
    assert all(LEFT_OUT.values())


def test_models_and_inputs_are_the_same_every_time() -> None:
    architecture = ARCHITECTURES["NucleusMoEImageTransformer2DModel"]  # whose experts are made uninitialised
    one, other = architecture.build().state_dict(), architecture.build().state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    example = architecture.example(torch.bfloat16)
    assert example["hidden_states"].dtype == torch.bfloat16
    assert torch.equal(example["hidden_states"], architecture.example(torch.bfloat16)["hidden_states"])


def test_one_changed_code_is_a_failure(stock: Worker, tmp_path: Path) -> None:
    def altered(request: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = make(request)
        rewrite(Path(request["directory"]) / "diffusion_pytorch_model.safetensors", change)
        return answer

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["proj_out_2.weight._data"][0, 0] ^= 1
        return tensors

    outcome = run_case("DiTTransformer2DModel", "int8", "float32", tmp_path, altered, stock.ask)
    assert outcome.result == "FAILED"
    assert "proj_out_2.weight, codes" in outcome.traceback
    assert "output" in outcome.traceback
    assert "proj_out_1" not in outcome.traceback


def test_a_process_that_dies_is_the_fault_of_its_case_alone(stock: Worker, tmp_path: Path) -> None:
    def killing(request: Mapping[str, Any]) -> Mapping[str, Any]:
        assert stock.pid is not None
        os.kill(stock.pid, signal.SIGKILL)
        return stock.ask(request)

    stock.ask({})  # so that there is a process
    outcome = run_case("DiTTransformer2DModel", "int8", "float32", tmp_path, make, killing)
    assert (outcome.result, outcome.detail) == ("FAILED", "stock load: the process ended with -9")
    assert_equal(run_case("DiTTransformer2DModel", "int8", "float32", tmp_path, make, stock.ask))


def test_what_a_load_raises_is_an_answer(stock: Worker, tmp_path: Path) -> None:
    answer = stock.ask({"name": "DiTTransformer2DModel", "directory": str(tmp_path), "dtype": "float32"})
    assert answer["error"].startswith("OSError")
    assert "Traceback" in answer["traceback"]
