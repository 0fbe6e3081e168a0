"""Tensors that no file holds, as each loader makes them, and no model built where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qat.hosts import Host, get_target, host_of
from qat.hosts.construction import constructed_tensors, differs, unstored_tensors
from tests.helpers import same_bits, tiny_model

DIFFUSERS, QUANTO = get_target("diffusers"), get_target("quanto")


def wan() -> Any:
    """Rotary tables are buffers."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=16,
    )


def qwen() -> Any:
    """Rotary tables are plain attributes, and complex."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


@pytest.mark.parametrize("make", [wan, qwen])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_builds_under_the_serving_dtype(make: Any, dtype: torch.dtype) -> None:
    model = make()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        expected = {found.name: found.tensor for found in unstored_tensors(type(model).from_config(model.config))}
    finally:
        torch.set_default_dtype(default)
    for target in (DIFFUSERS, QUANTO):
        made = constructed_tensors(model, target, dtype)
        assert made
        assert made.keys() == expected.keys()
        assert not [name for name in made if differs(made[name], expected[name])]
    assert torch.get_default_dtype() is default


def test_a_model_without_such_tensors_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    bert = tiny_model("bert")  # its position_ids are integers
    monkeypatch.setattr(type(host_of(bert)), "build", lambda *_, **__: pytest.fail("was built"))
    assert bert.embeddings._non_persistent_buffers_set  # type: ignore[union-attr]
    assert constructed_tensors(bert, QUANTO, torch.bfloat16) == {}
    assert constructed_tensors(nn.Linear(2, 2), QUANTO, torch.bfloat16) == {}


@pytest.mark.parametrize("target", ["quanto", "transformers"])
def test_a_transformers_model_is_built_only_as_often_as_its_loader_makes_a_difference(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, dtypes = tiny_model("llama"), []
    host = type(host_of(llama))
    build = host.build

    def counted(self: Host, cls: Any, config: Any, dtype: torch.dtype, *, empty: bool) -> nn.Module:
        dtypes.append(dtype)
        return build(self, cls, config, dtype, empty=empty)

    monkeypatch.setattr(host, "build", counted)
    made = constructed_tensors(llama, get_target(target), torch.float32)
    assert dtypes == [torch.float32]
    assert same_bits(made["model.rotary_emb.inv_freq"], llama.get_buffer("model.rotary_emb.inv_freq"))
    constructed_tensors(llama, get_target(target), torch.bfloat16)
    assert dtypes[1:] == [torch.bfloat16] + [torch.float32] * (target == "transformers")


def test_an_empty_build_has_no_parameters_in_memory_but_buffers() -> None:
    model = wan()
    empty = host_of(model).build(type(model), model.config, torch.bfloat16, empty=True)
    assert all(parameter.is_meta and parameter.dtype is torch.bfloat16 for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
