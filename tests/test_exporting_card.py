"""The model card: its code runs, it says why layers are float, and people may edit it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qat
from qat.exporting import export
from qat.hosts.targets import TARGETS
from qat.verification import verify
from tests.exports import flux_inputs, frozen, frozen_flux, frozen_layers, frozen_llama, small_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*[qQ]uanto.*deprecated:FutureWarning")


def read(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(frozen_layers((16, 32), (1, 16), overrides={"1": "float"}), tmp_path / "out")
    return tmp_path / "out"


def code_of(card: str) -> str:
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    return str(code)


@pytest.mark.parametrize(
    ("library", "options"),
    [
        ("diffusers", {}),
        ("diffusers", {"float_grid": True}),
        ("transformers", {}),
        ("transformers", {"float_grid": True}),
        ("quanto", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "grid" if value else "packed",
)
def test_the_code_of_the_card_loads_the_model(tmp_path: Path, library: str, options: dict[str, Any]) -> None:
    make = frozen_flux if library == "diffusers" else frozen_llama
    export(make(library, weights="int8", dtype="float32"), tmp_path / "out", **options)
    card = read(tmp_path / "out")
    names: dict[str, Any] = {"directory": str(tmp_path / "out")}
    exec(code_of(card), names)
    assert any(hasattr(module, "weight_qtype") for module in names["model"].modules())
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == {"quanto": "optimum-quanto"}.get(library, library)
    assert set(front["tags"]) == {"qat", "quanto", "int8"}
    assert "served in **float32**" in card
    bound = "Stock diffusers below 1.0 " in card and "From 1.0 on, first `import qat.integrations.diffusers`" in card
    assert bound is (library == "diffusers")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_block_of_python_on_a_card_is_valid(tmp_path: Path, target: str) -> None:
    flux, weights = "diffusers" in target, "q8_0" if "gguf" in target else "int8"
    export((frozen_flux if flux else frozen_llama)(target, weights=weights), tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", read(tmp_path / "out"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_a_module_without_configuration_needs_the_float_model(exported: Path) -> None:
    assert "qat.load(directory, model=float_model)" in code_of(read(exported))


def test_the_card_claims_no_training_that_it_does_not_know_of(exported: Path) -> None:
    card = read(exported)  # of a model that was prepared and frozen
    assert "They were frozen from a model with fake quantization (`qat`" in card
    assert "trained" not in card


def test_the_serving_dtype_is_asked_for(tmp_path: Path) -> None:
    export(frozen_flux(weights="int4"), tmp_path / "out")
    card = read(tmp_path / "out")
    assert "from_pretrained(directory, dtype=torch.bfloat16)" in card
    assert "without one diffusers loads float32" in card


def test_layers_left_float_have_their_reasons_and_blocks_are_one_line(tmp_path: Path) -> None:
    model = frozen(small_llama(num_hidden_layers=3), weights="int4", overrides={"*.down_proj": "float"})
    export(model, tmp_path / "out")
    card = read(tmp_path / "out")
    assert "| `model.layers.*.mlp.down_proj` (3) | override '*.down_proj': float |" in card
    assert "| `lm_head` | tied to another weight" in card
    export(frozen_flux(weights="int8"), tmp_path / "flux")
    assert "None: every linear layer is quantized." in read(tmp_path / "flux")


def test_an_edited_card_still_verifies(tmp_path: Path) -> None:
    export(frozen_flux(weights="int2"), tmp_path / "out", example_inputs=flux_inputs("bfloat16"))
    (tmp_path / "out" / "README.md").write_text("my own words")
    assert verify(tmp_path / "out").ok
    (tmp_path / "out" / "README.md").unlink()
    assert torch.is_tensor(next(iter(qat.load(tmp_path / "out", verify_hashes=True).parameters())))
