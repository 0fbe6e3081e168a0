"""What diffusers keeps in float32, never replaces, or cannot load at all."""

from __future__ import annotations

import pytest
from torch import nn

from qat.targets import get_target
from qat.targets.diffusers import is_diffusers_model
from tests.helpers import of_diffusers

ROOM = get_target("diffusers")


class Keeper(nn.Module):
    _keep_in_fp32_modules = ("time_embedder", "proj_in")


@pytest.mark.parametrize(
    ("name", "weights", "dtype", "message"),
    [
        ("blocks.0.to_q", "float8", "bfloat16", None),
        ("time_embedder.linear_1", "int8", "bfloat16", "kept in float32 by the loader"),
        ("time_embedder.linear_1", "int8", "float32", None),
        ("time_embedder.linear_1", "float8", "float32", "kept in float32 by the loader"),
        ("proj_in", "int8", "float32", "the loader never quantizes layers called 'proj_in' in a Keeper"),
        ("proj_in.linear", "int8", "float32", None),
    ],
)
def test_layers_that_the_loader_cannot_hold(name: str, weights: str, dtype: str, message: str | None) -> None:
    assert ROOM.layer_fault(Keeper(), name, weights, dtype) == message


def test_a_class_may_name_one_module_only() -> None:
    class One(nn.Module):
        _keep_in_fp32_modules = "norm"

    assert ROOM.kept_in_float32(One(), "blocks.0.norm.weight", "bfloat16")
    assert not ROOM.kept_in_float32(One(), "blocks.0.n.weight", "bfloat16")


def test_models_are_told_by_their_class() -> None:
    from diffusers import FluxTransformer2DModel

    class Mine(FluxTransformer2DModel):  # type: ignore[misc]
        pass

    assert is_diffusers_model(Mine)
    assert is_diffusers_model(of_diffusers(nn.Linear(2, 2)))
    assert not is_diffusers_model(nn.Linear(2, 2))
    assert ROOM.model_faults(of_diffusers(Keeper())) == []
    assert "got a Keeper" in ROOM.model_faults(Keeper())[0]


def test_target_quanto_keeps_what_a_class_of_diffusers_computes_with_in_float32() -> None:
    quanto, name = get_target("quanto"), "time_embedder.linear_1"
    assert quanto.layer_fault(of_diffusers(Keeper()), name, "int8", "bfloat16") == "kept in float32 by the loader"
    assert quanto.layer_fault(of_diffusers(Keeper()), name, "float8", "float32") is None
    assert not quanto.kept_in_float32(Keeper(), name, "bfloat16")
