"""Directories of compressed-tensors that were damaged, or changed behind forged hashes: they are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from tests.compressed_exports import MIXED, SPECS, exported, logits
from tests.exports import altered, forge_hashes, rewrite, stored_tensors


@pytest.mark.parametrize(
    ("kind", "key", "step"),
    [
        ("int4_g32", "weight_packed", 16),
        ("int4_g32", "weight_scale", 0.5),
        ("int4_g32_zp", "weight_packed", 1),
        ("int4_g32_zp", "weight_zero_point", 16),
        ("int8 W8A8", "weight", 1),
        ("int8 W8A8", "input_scale", 0.25),
    ],
)
def test_a_changed_number_is_found_behind_forged_hashes(kind: str, key: str, step: float, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS[kind])
    rewrite(directory / "model.safetensors", altered(f"model.layers.0.self_attn.q_proj.{key}", step))
    with pytest.raises(qat.VerifyError, match=r"model\.safetensors has another content"):
        qat.verify(directory)
    forge_hashes(directory)
    with pytest.raises(qat.VerifyError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        qat.verify(directory)


@pytest.mark.parametrize("kind", ["int4_g32", "int4_g32_zp", "int8 W8A8"])
def test_a_truncated_or_incomplete_directory_is_found(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS[kind])
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=r"has \d+ bytes instead of"):
            verb(directory)
    path.write_bytes(whole)
    rewrite(path, lambda tensors: {key: value for key, value in tensors.items() if ".q_proj.weight_scale" not in key})
    forge_hashes(directory)
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=r"q_proj\.weight_scale is missing"):
            verb(directory)


def test_a_changed_configuration_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    exported(directory, 0, **MIXED)
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"]["config_groups"]["group_3"]["weights"]["group_size"] = 64
    (directory / "config.json").write_text(json.dumps(fields))
    forge_hashes(directory, tensors=False)
    with pytest.raises(qat.VerifyError, match=r"config\.json"):
        qat.verify(directory)


def forge_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json, with its hash in the manifest."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    forge_hashes(directory, tensors=False)


@pytest.mark.parametrize("field", ["weights", "input_activations"])
@pytest.mark.parametrize(
    "change", [{"symmetric": False}, {"num_bits": 3}, {"dynamic": True}, None], ids=lambda change: str(change)
)
@pytest.mark.parametrize("kind", ["int8", "int8 W8A8", "int4_g32"])
def test_a_scheme_of_no_type_is_an_error_of_ours(kind: str, change: Any, field: str, tmp_path: Path) -> None:
    """The loader's own arithmetic fails on layers that such a scheme made."""
    directory = tmp_path / "out"
    exported(directory, 0, **SPECS[kind])

    def edit(fields: dict[str, Any]) -> None:
        (group,) = fields["quantization_config"]["config_groups"].values()
        group[field] = None if change is None else group["weights"] | change

    forge_config(directory, edit)
    if change is not None or field == "weights" or kind == "int8 W8A8":
        with pytest.raises(qat.VerifyError):
            qat.verify(directory)
    try:
        model = qat.load(directory)  # by the types of the manifest
    except qat.LoadError:
        return
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored_value(directory))


def stored_value(directory: Path) -> torch.Tensor:
    """The weight of a layer as a directory's tensors have it, by the package alone."""
    tensors, name = stored_tensors(directory), "model.layers.0.mlp.up_proj"
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].to(scale.dtype) * scale
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    bits = 32 * tensors[f"{name}.weight_packed"].shape[1] // shape[1]
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], bits, shape)
    size = shape[1] // scale.shape[1]
    return codes.to(scale.dtype) * scale.repeat_interleave(size, 1)


def test_a_stored_shape_that_is_wrong_is_found(tmp_path: Path) -> None:
    directory, key = tmp_path / "out", "model.layers.0.self_attn.q_proj.weight_shape"
    exported(directory, 0, **SPECS["int4_g32"])
    rewrite(directory / "model.safetensors", lambda tensors: tensors | {key: torch.zeros_like(tensors[key])})
    forge_hashes(directory)
    with pytest.raises(qat.VerifyError, match="what was loaded cannot be compared: RuntimeError"):
        qat.verify(directory)


def test_a_tie_that_the_configuration_breaks_is_found(tmp_path: Path) -> None:
    """The stock loader leaves a head random that no file holds. `qat.load` ties what the manifest ties."""
    directory = tmp_path / "out"
    model, _ = exported(directory, 0, **SPECS["int8"])
    forge_config(directory, lambda fields: fields.update(tie_word_embeddings=False))
    assert torch.equal(logits(qat.load(directory)), logits(model))
    with pytest.raises(qat.VerifyError, match=r"lm_head\.weight"):
        qat.verify(directory)


def test_a_load_that_loses_activations_is_found(tmp_path: Path) -> None:
    exported(tmp_path / "out", 0, **SPECS["int8 W8A8"])
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    fields["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(fields))
    forge_hashes(tmp_path / "out", tensors=False)
    with pytest.raises(qat.VerifyError, match="quantization_config is not what freezing left"):
        qat.verify(tmp_path / "out")
