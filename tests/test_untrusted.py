"""What is asked of a directory before a loader runs. Random damage: `test_scripts_mutate_exports`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

import qat.untrusted
from qat.errors import LoadError, QatError, VerifyError
from qat.exporting import export
from qat.files.manifest import MANIFEST_NAME, read_manifest
from qat.loading import load
from qat.untrusted import build_described, check_files
from qat.verification import verify
from tests.exports import IDS, forge_files, frozen_flux, frozen_llama, unsealed

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    export(frozen_llama("transformers", weights="int8", activations="int8"), folder)
    return folder


@pytest.fixture
def exported(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


def change(directory: Path, name: str, key: str, value: Any) -> None:
    """Set one field of a JSON file, behind hashes that fit again."""
    fields = unsealed(directory) if name == MANIFEST_NAME else json.loads((directory / name).read_text())
    *path, last = key.split("/")
    reduce(lambda part, step: part[step], path, fields)[last] = value
    (directory / name).write_text(json.dumps(fields))
    if name != MANIFEST_NAME:
        forge_files(directory)


def refused(directory: Path, **arguments: Any) -> str:
    """What both verbs say."""
    texts = []
    for verb in (verify, load):
        with pytest.raises(QatError) as caught:
            verb(directory, **arguments)  # type: ignore[operator]
        texts.append(str(caught.value))
        assert directory.name in texts[-1]
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("environment/threads", 0, "environment.threads"),
        ("environment/threads", 1 << 20, "environment.threads"),
        ("environment/threads", "many", "environment.threads"),
        ("weights_stem", "../outside", "weights_stem"),
        ("weights_stem", "other", "no loader's files begin with 'other'"),
        ("target", "nobody", "must be one of"),
        ("target", "diffusers", "diffusers has none"),
        ("target", "gguf", "choose one"),
        ("frozen/target", "nobody", "must be one of"),
        ("dtype", "float32", "dtype is float32, and that of frozen.spec bfloat16"),
        ("model_class", 3, "model_class"),
        ("files/model.safetensors/bytes", -1, "bytes"),
        ("tensors/model.norm.weight/file", "../x", "none of its files"),
        ("tensors/model.norm.weight/dtype", "F7", "has the dtype 'F7'"),
        ("tensors/model.norm.weight/shape", [1 << 70], "shape"),
        ("tied", {"lm_head.weight": "nowhere"}, "lm_head.weight is tied to 'nowhere'"),
        (f"frozen/layers/{LAYER}/shape", [0, 4], "has the shape"),
        (f"frozen/layers/{LAYER}/weights", "int5", "choose one"),
        (f"frozen/layers/{LAYER}/activations", "float8", "has activations of float8"),
        ("frozen/spec/activations", None, "has activations of int8, the spec None"),
        ("example", {"inputs": {}, "outputs": []}, "no file qat_evidence"),
    ],
)
def test_a_manifest_that_contradicts_itself(exported: Path, key: str, value: Any, says: str) -> None:
    change(exported, MANIFEST_NAME, key, value)
    text = refused(exported)
    assert says in text
    assert text.count(MANIFEST_NAME) >= 2


def test_a_manifest_that_was_edited_is_refused_as_it_stands(exported: Path) -> None:
    path = exported / MANIFEST_NAME
    path.write_text(path.read_text().replace('"attn_implementation": "sdpa"', '"attn_implementation": "eager"'))
    assert "was changed after the export" in refused(exported)


@pytest.mark.parametrize("target", ["quanto", "transformers"])
def test_outputs_that_a_loader_computes_otherwise(tmp_path: Path, target: str) -> None:
    """`verify` reads how outputs are computed from config.json, and `load` from the manifest."""
    export(frozen_llama(target, weights="int8", activations="int8"), tmp_path / "out")
    outputs = unsealed(tmp_path / "out")["frozen"]["spec"]["quantize_outputs"]
    change(tmp_path / "out", MANIFEST_NAME, "frozen/spec/quantize_outputs", not outputs)
    text = refused(tmp_path / "out")
    assert ("quantize_outputs=False" if target == "quanto" else "quantization_config is not what freezing left") in text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("architectures", ["LlamaModel"], "describes a model of ['LlamaModel']"),
        ("architectures", None, "describes a model of None"),
        ("quantization_config/qat/quantize_outputs", True, "quantization_config is not what freezing left"),
        ("quantization_config/qat/modules/lm_head", {"weights": "int8"}, "quantization_config is not"),
        ("quantization_config", None, "quantization_config is not"),
        ("configuration_files", ["config.../../x.json"], "configuration_files names"),
        ("num_hidden_layers", 1 << 60, "num_hidden_layers is"),
        ("num_hidden_layers", 900, "larger than its files"),
        ("vocab_size", 1 << 24, "larger than its files"),
        ("vocab_size", 97, "model.embed_tokens.weight has shape [96, 256] in the files and [97, 256]"),
        ("num_hidden_layers", 2, "which the files have not"),
        ("attention_bias", True, "has a bias in the model"),
        ("hidden_size", "wide", "does not build a LlamaForCausalLM"),
        ("rope_parameters", {"rope_type": "none"}, "does not build a LlamaForCausalLM"),
    ],
)
def test_a_configuration_of_another_model(exported: Path, key: str, value: Any, says: str) -> None:
    change(exported, "config.json", key, value)
    assert says in refused(exported)


def test_a_configuration_of_nothing_builds_no_model_of_seven_billion(exported: Path) -> None:
    (exported / "config.json").unlink()
    assert "config.json is missing" in refused(exported)
    (exported / "config.json").write_text("{}")
    forge_files(exported)
    assert "config.json describes a model of [None]" in refused(exported)
    (exported / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    forge_files(exported)
    assert "larger than its files" in refused(exported)
    with pytest.raises(LoadError, match="larger than its files"):
        build_described(exported, read_manifest(exported))


def test_a_configuration_changed_at_equal_size_is_refused_without_being_asked(exported: Path) -> None:
    path = exported / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    assert "config.json has another content" in refused(exported)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", MANIFEST_NAME])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero")], ids=["fifo", "dir", "0"])
def test_special_files(exported: Path, name: str, make: Callable[[Path], None]) -> None:
    (exported / name).unlink()
    make(exported / name)
    assert f"{name} is " in refused(exported)


def test_an_equal_file_outside_is_not_read(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "stolen").write_bytes((exported / "model.safetensors").read_bytes())
    fields = unsealed(exported)
    for tensor in fields["tensors"].values():
        tensor["file"] = "../stolen"
    fields["files"]["../stolen"] = fields["files"].pop("model.safetensors")
    (exported / MANIFEST_NAME).write_text(json.dumps(fields))
    (exported / "model.safetensors").unlink()
    assert "'../stolen' is no plain name" in refused(exported)


def test_an_index_beside_a_single_file(exported: Path) -> None:
    index = "model.safetensors.index.json"
    weights = dict.fromkeys(unsealed(exported)["tensors"], "../stolen")
    (exported / index).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    assert f"{index} is not one of the exported files" in refused(exported)
    fields = unsealed(exported)
    fields["files"][index] = {"bytes": 0, "sha256": ""}
    (exported / MANIFEST_NAME).write_text(json.dumps(fields))
    forge_files(exported)
    assert f"{index} places tensors in other files" in refused(exported)


def test_large_files_are_hashed_by_choice(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((exported / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (exported / "model.safetensors").write_bytes(data)
    manifest = read_manifest(exported)
    assert check_files(exported, manifest, hashes=False) != []
    monkeypatch.setattr(qat.untrusted, "SMALL", 10_000)
    assert check_files(exported, manifest, hashes=False) == []
    load(exported)
    with pytest.raises(LoadError, match="another content"):
        load(exported, verify_hashes=True)


@pytest.mark.parametrize("target", ["diffusers", "gguf-diffusers"])
def test_a_failed_load_of_diffusers_leaves_torchs_default_dtype(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "int8" if target == "diffusers" else "q8_0"
    export(frozen_flux(target, weights=weights), tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        torch.set_default_dtype(torch.bfloat16)
        raise RuntimeError("broken")

    kind = "from_pretrained" if target == "diffusers" else "from_single_file"
    monkeypatch.setattr(f"diffusers.FluxTransformer2DModel.{kind}", fail)
    with pytest.raises(VerifyError, match="broken"):
        verify(tmp_path / "out")
    assert torch.get_default_dtype() is torch.float32


def test_a_layer_that_the_loader_would_leave_float(tmp_path: Path) -> None:
    export(frozen_flux(weights="int8", exclude=("*proj_out",)), tmp_path / "out")
    change(tmp_path / "out", "config.json", "quantization_config/modules_to_not_convert", ["proj_out", "to_q"])
    assert "quantization_config is not what freezing left" in refused(tmp_path / "out")


def test_a_loaded_directory_is_still_what_it_was(exported: Path) -> None:
    assert verify(exported).ok
    with torch.no_grad():
        assert load(exported)(IDS).logits.shape == (2, 12, 96)
