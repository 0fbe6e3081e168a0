from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from qat.hosts import get_target
from qat.hosts.sensitivity import sensitive_part
from tests.helpers import of_diffusers


def parts(name: str, **config: Any) -> dict[str, str | None]:
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {path: sensitive_part(model, path) for path in linear}


def test_in_flux_the_blocks_are_not_sensitive_but_for_their_modulation() -> None:
    found = parts("FluxTransformer2DModel", num_layers=1, num_single_layers=1)
    assert {path for path, part in found.items() if part == "outside the blocks"} == {
        *(f"time_text_embed.{which}_embedder.linear_{i}" for which in ("timestep", "text") for i in (1, 2)),
        "context_embedder",
        "x_embedder",
        "proj_out",
    }
    assert {path for path, part in found.items() if part == "modulation"} == {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "norm_out.linear",
    }


@pytest.mark.parametrize(
    ("name", "config", "sensitive", "free"),
    [
        (
            "SD3Transformer2DModel",
            {"num_layers": 2},
            "transformer_blocks.0.norm1.linear",
            "transformer_blocks.0.attn.to_q",
        ),
        ("PixArtTransformer2DModel", {"num_layers": 1}, "adaln_single.linear", "transformer_blocks.0.ff.net.2"),
        ("WanTransformer3DModel", {"num_layers": 1}, "condition_embedder.time_proj", "blocks.0.ffn.net.2"),
        (
            "QwenImageTransformer2DModel",
            {"num_layers": 1},
            "transformer_blocks.0.img_mod.1",
            "transformer_blocks.0.attn.to_q",
        ),
        (
            "Kandinsky5Transformer3DModel",
            {"num_visual_blocks": 1},
            "visual_transformer_blocks.0.visual_modulation.out_layer",
            "visual_transformer_blocks.0.feed_forward.in_layer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("Model") else "",
)
def test_other_architectures(name: str, config: dict[str, Any], sensitive: str, free: str) -> None:
    found = parts(name, **config)
    assert found[sensitive] is not None
    assert found[free] is None
    assert Counter(part is None for part in found.values())[True] > 5


def test_a_list_of_projections_is_no_list_of_blocks() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16, "text_encoder_dim": 8}
    found = parts("BriaFiboTransformer2DModel", num_layers=1, num_single_layers=1, in_channels=4, **sizes)
    projections = {path: part for path, part in found.items() if path.startswith("caption_projection.")}
    assert projections == dict.fromkeys(projections, "outside the blocks")
    assert len(projections) == 2
    assert found["transformer_blocks.0.attn.to_q"] is None
    assert found["single_transformer_blocks.0.proj_mlp"] is None


def test_models_of_other_libraries_have_none() -> None:
    model = nn.ModuleDict({"proj_out": nn.Linear(2, 2)})
    quanto = get_target("quanto")
    assert quanto.rules(model, torch.bfloat16).sensitive_part("proj_out") is None
    assert quanto.rules(of_diffusers(model), torch.bfloat16).sensitive_part("proj_out") == "outside the blocks"
