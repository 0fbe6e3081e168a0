"""Models from a configuration alone: shipped with qat, in the hub's cache, in a directory, or given."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat.errors import LoadError, SpecError
from qat.hosts import configurations
from qat.hosts.configurations import build_on_meta, published
from qat.hosts.pretrained import load_float
from tests.exports import small_flux

INT8 = qat.QuantSpec(weights="int8")
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what the machine's user has in the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def in_cache(tmp_path: Path, name: str) -> Path:
    """The snapshot's directory of a model in the hub's cache."""
    model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return model / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name", published())
def test_a_shipped_configuration_has_its_published_size(name: str) -> None:
    model = build_on_meta(name)
    entry = published()[name]
    assert type(model).__name__ == (entry["config"].get("_class_name") or entry["config"]["architectures"][0])
    assert all(parameter.is_meta for parameter in model.parameters())
    if entry["parameters"] is not None:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(entry["parameters"], rel=0.005)


def test_shipped_configurations_are_many_and_nearly_all_have_a_size() -> None:
    sizes = {name: entry["parameters"] for name, entry in published().items()}
    assert len(sizes) >= 40
    unknown = {name for name, size in sizes.items() if size is None}
    assert unknown == {"google/flan-t5-base", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"}


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "deepseek-ai/DeepSeek-V3"])
def test_inspect_takes_a_name(name: str) -> None:
    report = qat.inspect(name, INT8, target="transformers")
    assert "model.layers.0.self_attn.o_proj" in {layer.name for layer in report.layers}
    assert len(str(report).splitlines()) < 25
    assert len(report.table().splitlines()) > 190


def test_inspect_takes_configurations_of_both_libraries() -> None:
    config = LlamaConfig(**TINY, architectures=["LlamaForCausalLM"])
    expected = qat.inspect(LlamaForCausalLM(config), INT8, target="transformers")
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY}
    assert qat.inspect(config, INT8, target="transformers") == expected
    assert qat.inspect(fields, INT8, target="transformers") == expected
    flux = small_flux()
    given = {"_class_name": "FluxTransformer2DModel", **flux.config}
    assert qat.inspect(given, INT8, target="diffusers") == qat.inspect(flux, INT8, target="diffusers")


def test_a_configuration_without_an_architecture_is_its_base_model() -> None:
    assert type(build_on_meta(LlamaConfig(**TINY))).__name__ == "LlamaModel"


@pytest.mark.parametrize("name", ["org/own", "Qwen/Qwen3-8B"], ids=["unknown name", "shipped name"])
def test_the_cache_comes_before_the_shipped_configurations(tmp_path: Path, name: str) -> None:
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(in_cache(tmp_path, name))
    assert build_on_meta(name).config.hidden_size == 32


def test_a_cache_with_a_tokenizer_alone_is_passed_by(tmp_path: Path) -> None:
    (in_cache(tmp_path, "Qwen/Qwen3-0.6B") / "tokenizer.json").write_text("{}")
    assert build_on_meta("Qwen/Qwen3-0.6B").config.hidden_size == 1024


def test_a_directory_comes_before_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LlamaConfig(**TINY).save_pretrained("Qwen/Qwen3-8B")
    assert type(build_on_meta("Qwen/Qwen3-8B")).__name__ == "LlamaModel"
    assert type(build_on_meta(Path("Qwen/Qwen3-8B"))).__name__ == "LlamaModel"


def test_the_hub_is_asked_for_a_name_that_is_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        assert all(pattern.endswith(".json") for pattern in allow_patterns)
        if local_files_only:
            raise FileNotFoundError(name)
        small_flux().save_config(tmp_path / "got" / "transformer")
        (tmp_path / "got" / "model_index.json").write_text("{}")
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert type(build_on_meta("org/pipeline")).__name__ == "FluxTransformer2DModel"
    assert asked == [("org/pipeline", True), ("org/pipeline", False)]


def test_a_pipeline_with_a_unet_is_its_unet(tmp_path: Path) -> None:
    fields = {"block_out_channels": [32, 64], "down_block_types": ["DownBlock2D"] * 2}
    fields |= {"up_block_types": ["UpBlock2D"] * 2, "layers_per_block": 1}
    model: Any = build_on_meta({"_class_name": "UNet2DConditionModel", **fields})
    model.save_config(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text("{}")
    assert type(build_on_meta(tmp_path)).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Qwen/Qwen3-8", "offline mode is enabled"),
        ("Qwen/Qwen3-8", " (did you mean 'Qwen/Qwen3-8B'?)"),
        ("gpt2", " (did you mean 'openai-community/gpt2'?)"),
        ("gpt2", "no name on the hub, which has the form 'owner/model'"),
        ("./models/a", "no name on the hub, which has the form 'owner/model'"),
        ("tests/../recipe", "no name on the hub, which has the form 'owner/model' (did you mean 'tests/../recipes'?)"),
        ("recipes/referense", " (did you mean 'recipes/reference'?)"),
        ("recipes/reference/config.json", "is no directory, but a file or the like"),
    ],
)
def test_a_name_that_cannot_be_read_has_both_remedies(name: str, why: str) -> None:
    with pytest.raises(LoadError, match=re.escape(why)) as caught:  # tests run offline: see conftest.py
        build_on_meta(name)
    told = str(caught.value)
    assert told.startswith(f"model: {name!r} is no directory")
    assert told.endswith(": correct the path, or the name")
    assert sum(shipped in told for shipped in published()) <= 1
    assert "\n" not in told


def test_the_hub_has_little_time_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def download(*_: str, local_files_only: bool, **__: object) -> str:
        if local_files_only:
            raise FileNotFoundError
        asked.wait(60)
        return "late"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(configurations, "PATIENCE", 0.05)
    for ask in (build_on_meta, load_float):
        with pytest.raises(LoadError, match=r"'org/own' is no directory here, and .*: no answer in 0\.05 s: "):
            ask("org/own")
    asked.set()


@pytest.mark.parametrize(
    "verb",
    [
        lambda name: qat.prepare(name, INT8),
        lambda name: qat.calibrate(name, [{}], spec=INT8),
        lambda name: qat.fold_outliers(name, [{}], spec=INT8),
        lambda name: qat.search(name, INT8, [{}], budget="int4"),
    ],
    ids=["prepare", "calibrate", "fold_outliers", "search"],
)
def test_verbs_that_change_or_run_a_model_take_no_name(verb: Any) -> None:
    with pytest.raises(SpecError, match=r"model: must be an nn\.Module, got 'Qwen/Qwen3-0\.6B': load the model first"):
        verb("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("source", [3, None, b"Qwen", LlamaConfig], ids=["number", "none", "bytes", "class"])
def test_what_is_neither_name_nor_configuration(source: Any) -> None:
    with pytest.raises(SpecError, match=r"model: must be an nn\.Module, a directory, a name on the hub, or a config"):
        qat.inspect(source, INT8)
