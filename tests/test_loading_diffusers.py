"""`qat.load` of exports of diffusers models, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import qat
from qat.errors import LoadError
from qat.exporting import export
from qat.files.evidence import frozen_record
from qat.tensors import inner_tensors, model_device
from qat.verification.outputs import compute_outputs
from tests.exports import DTYPES, TYPES, flux_inputs, frozen_flux


@pytest.mark.loads("diffusers", "qat.load", weights=TYPES, equal="outputs")
@pytest.mark.loads("quanto", "qat.load", weights=TYPES, equal="outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("target", ["diffusers", "quanto"])
def test_a_loaded_model_is_the_frozen_one(tmp_path: Path, target: str, weights: str, dtype: str) -> None:
    model = frozen_flux(target, weights=weights, dtype=dtype)
    export(model, tmp_path / "out")
    loaded = qat.load(tmp_path / "out")
    assert loaded.device == torch.device("cpu")  # stock diffusers says meta, and a pipeline believes it
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert frozen_record(loaded) == frozen_record(model)
    name = "transformer_blocks.0.attn.to_q"
    assert type(loaded.get_submodule(name).weight.data) is type(model.get_submodule(name).weight.data)
    left, right = (compute_outputs(m, flux_inputs(dtype))["sample"] for m in (loaded, model))
    assert torch.equal(left, right)


def test_a_loaded_model_can_be_exported_again(tmp_path: Path) -> None:
    export(frozen_flux(weights="int8"), tmp_path / "one")
    export(qat.load(tmp_path / "one"), tmp_path / "two")
    one, two = ((tmp_path / folder / "config.json").read_text() for folder in ("one", "two"))
    assert json.loads(one) == json.loads(two)
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_device_is_that_of_the_data() -> None:
    model = frozen_flux(weights="int4")
    weight = next(model.parameters())
    assert model_device(model) == torch.device("cpu")
    assert [part.device.type for part in inner_tensors(weight)] == ["cpu"] * 3


def test_a_missing_file_and_a_stray_one_are_told(tmp_path: Path) -> None:
    export(frozen_flux(weights="int8"), tmp_path / "out", max_shard_size="200KB")
    shard = sorted((tmp_path / "out").glob("diffusion*.safetensors"))[0]
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(LoadError, match=r"diffusion_pytorch_model.safetensors is not one of the exp"):
        qat.load(tmp_path / "out")
    shard.unlink()
    with pytest.raises(LoadError, match=f"{shard.name} is missing"):
        qat.load(tmp_path / "out")
