"""The model card: its code runs, it says why layers are float, and people may edit it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import qat
from qat.exporting import export
from qat.hosts.targets import TARGETS
from qat.verification import verify
from tests.exports import flux_inputs, frozen, frozen_flux, frozen_layers, frozen_llama, small_llama
from tests.pipelines import make as make_pipeline

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
def test_every_block_of_python_on_a_card_runs(tmp_path: Path, target: str, pipeline: Path) -> None:
    """Alone, but for the block that puts the model of the one before into a pipeline."""
    flux, weights = "diffusers" in target, "q8_0" if "gguf" in target else "int8"
    model = (frozen_flux if flux else frozen_llama)(target, weights=weights)
    export(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == (None if flux else "text-generation")
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert blocks
    before: dict[str, Any] = {}
    for block in blocks:
        given = {"directory": str(tmp_path / "out"), "base_model": str(pipeline)}
        names: dict[str, Any] = (before if "transformer=model" in block else {}) | given
        exec(block, names)
        before = names
        assert type(names["model"]) is type(model)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline("flux").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("HERE/models--black-forest-labs--FLUX.1-dev/snapshots/3de/transformer", "black-forest-labs/FLUX.1-dev"),
        ("HERE", None),
        ("", None),
    ],
    ids=["hub", "cache", "directory", "nowhere"],
)
def test_metadata_name_the_source_where_it_has_a_name(source: str, base: str | None, tmp_path: Path) -> None:
    model: Any = frozen_llama("transformers")
    where = Path(source.replace("HERE", str(tmp_path / "source")))
    if source.startswith("HERE"):
        where.mkdir(parents=True)
        (where / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Its own\n")
    model.config._name_or_path = str(where) if source else ""
    export(model, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == base
    assert data.to_dict().get("base_model_relation") == ("quantized" if base else None)
    assert data.license == ("mit" if source.startswith("HERE") else None)
    assert str(tmp_path) not in read(tmp_path / "out")


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "\0", "no metadata"])
def test_a_strange_card_of_the_source_is_left_alone(card: str, tmp_path: Path) -> None:
    model: Any = frozen_llama("transformers")
    (tmp_path / "README.md").write_text(card)
    model.config._name_or_path = str(tmp_path)
    export(model, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None


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
