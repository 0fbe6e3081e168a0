"""What diffusers keeps in float32, never replaces, or cannot load at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qat.formats import QUANTO
from qat.hosts import MODULE, get_target, host_of
from qat.hosts.diffusers import DIFFUSERS
from tests.helpers import DTYPES, of_diffusers


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
    assert DIFFUSERS.layer_fault(Keeper(), name, QUANTO.qtypes[weights], DTYPES[dtype]) == message


def test_a_class_may_name_one_module_only() -> None:
    class One(nn.Module):
        _keep_in_fp32_modules = "norm"

    assert DIFFUSERS.kept_in_float32(One(), "blocks.0.norm.weight", torch.bfloat16)
    assert not DIFFUSERS.kept_in_float32(One(), "blocks.0.n.weight", torch.bfloat16)


def test_models_are_told_by_their_class() -> None:
    from diffusers import FluxTransformer2DModel

    class Mine(FluxTransformer2DModel):  # type: ignore[misc]
        pass

    assert host_of(Mine) is DIFFUSERS
    assert host_of(of_diffusers(nn.Linear(2, 2))) is DIFFUSERS
    assert host_of(nn.Linear(2, 2)) is MODULE
    assert DIFFUSERS.model_faults(of_diffusers(Keeper())) == []
    assert "got a Keeper" in DIFFUSERS.model_faults(Keeper())[0]


def test_target_quanto_keeps_what_a_class_of_diffusers_computes_with_in_float32() -> None:
    quanto, name = get_target("quanto"), "time_embedder.linear_1"
    kept = quanto.rules(of_diffusers(Keeper()), torch.bfloat16)
    assert kept.layer_fault(name, QUANTO.qtypes["int8"]) == "kept in float32 by the class of the model that holds it"
    assert kept.tensor_dtype(f"{name}.weight") is torch.float32
    assert quanto.rules(of_diffusers(Keeper()), torch.float32).layer_fault(name, QUANTO.qtypes["float8"]) is None
    assert quanto.rules(Keeper(), torch.bfloat16).tensor_dtype(name) is torch.bfloat16


@pytest.mark.parametrize("depth", [1, 2], ids=["inside a module", "two modules deep"])
def test_the_rules_of_a_class_hold_inside_other_modules(depth: int) -> None:
    model: nn.Module = of_diffusers(Keeper())
    for _ in range(depth):
        model = nn.ModuleDict({"inner": model})
    prefix = "inner." * depth
    rules = get_target("quanto").rules(model, torch.bfloat16)
    assert rules.tensor_dtype(f"{prefix}time_embedder.linear_1.weight") is torch.float32
    assert rules.tensor_dtype(f"{prefix}blocks.0.to_q.weight") is torch.bfloat16
    assert rules.tensor_dtype("time_embedder.linear_1.weight") is torch.bfloat16  # beside the model, not in it
    assert rules.sensitive_part(f"{prefix}proj_out") == "outside the blocks"
    assert rules.sensitive_part("proj_out") is None
