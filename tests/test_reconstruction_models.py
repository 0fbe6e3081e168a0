"""Reconstruction of models of transformers and diffusers: masks, rotary tables, caches and two streams go along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qat
from tests.helpers import tiny_model, tokens

INT2 = qat.QuantSpec(weights="int2", dtype="float32")


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_models_of_transformers(name: str) -> None:
    model = tiny_model(name, **({"num_layers": 2, "num_decoder_layers": 2} if name == "t5" else {}))
    qat.prepare(model, INT2, algorithm=qat.LearnedAffine())
    ids = [tokens(seed=seed) for seed in range(3)]
    data = [{"input_ids": x, **({"decoder_input_ids": x} if name == "t5" else {})} for x in ids]
    caching = model.config.use_cache
    report = qat.reconstruct(model, data, steps=10, lr=1e-3)
    assert all(block.after < block.before for block in report.blocks.values())
    assert len(report.blocks) == (4 if name == "t5" else 2)
    assert model.config.use_cache == caching


def test_each_call_of_a_loop_is_recorded_and_a_cache_is_as_it_was_then() -> None:
    """A block that ran with a cache gives the same again, although the cache has grown since."""
    model = tiny_model("llama")
    qat.prepare(model, qat.QuantSpec(weights="int8", dtype="float32"))

    def generate(of: Any, ids: Tensor) -> None:
        of.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True)

    report = qat.reconstruct(model, [tokens()], forward=generate, inputs="float", steps=1, lr=1e-9)
    assert [block.calls for block in report.blocks.values()] == [3, 3]
    assert all(block.before < 1e-3 for block in report.blocks.values())


def test_a_diffusion_transformer_with_two_streams() -> None:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    qat.prepare(model, INT2, algorithm=qat.LearnedAffine(), target="diffusers")
    data = [
        {
            "hidden_states": torch.randn(1, 8, 16),
            "encoder_hidden_states": torch.randn(1, 4, 32),
            "pooled_projections": torch.randn(1, 16),
            "timestep": torch.rand(1),
            "img_ids": torch.zeros(8, 3),
            "txt_ids": torch.zeros(4, 3),
            "guidance": None,
        }
        for _ in range(2)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = qat.reconstruct(model, data, steps=10, lr=1e-3)
    assert len(report.blocks) == 4
    assert all(block.after < block.before for block in report.blocks.values())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("transformer_blocks.0.ff_context" in name for name in moved)  # of the first of the two outputs
    assert any("transformer_blocks.1.ff.net" in name for name in moved)
