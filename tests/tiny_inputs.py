"""Inputs for a tiny model of transformers, from the names in its forward's signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import nn

__all__ = ["candidates", "tensor_of"]

TOKENS = 60  # special tokens lie above


def tensor_of(name: str, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The input ``name``: a shape of random numbers, or ``{value: nested lists}``, the same every time.

    Names that end in ``ids`` or ``codes`` are tokens; masks are ones.
    """
    if isinstance(kind, Mapping):
        value = torch.tensor(kind["value"]) if isinstance(kind["value"], list) else kind["value"]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    generator = torch.Generator().manual_seed(1)
    if name.endswith(("ids", "codes", "labels")):
        return torch.randint(3, TOKENS, tuple(kind), generator=generator)
    if "mask" in name:
        return torch.ones(tuple(kind), dtype=torch.long)
    return torch.randn(tuple(kind), generator=generator).to(dtype)


def _attributes(config: Any, *names: str) -> list[int]:
    """The numbers that these attributes have, in a configuration or in those nested in it."""
    found = []
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            found += _attributes(value, *names)
    return list(dict.fromkeys(found))


_FEATURES = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")


def _shapes(name: str, config: Any) -> list[Any]:
    """Shapes that an input of this name may have, the likeliest first."""
    image = (_attributes(config, "image_size", "vision_image_size") or [64])[0]
    channels = (_attributes(config, "num_channels", "in_channels", "in_chans", "num_input_channels") or [3])[0]
    patch = (_attributes(config, "patch_size") or [16])[0]
    temporal = (_attributes(config, "temporal_patch_size") or [1])[0]
    frames = [2 * n for n in _attributes(config, "max_source_positions") if n < 1000] + [64]
    widths = _attributes(config, *_FEATURES, "mel_dim", "hidden_size") or [80]
    pairs = [(2, *pair) for n in frames for width in widths for pair in ((width, n), (n, width))]
    known: dict[str, list[Any]] = {
        "input_ids": [(2, 8), (2, 8, 4), (2, 4, 8)],
        "decoder_input_ids": [(2, 5), (2, 5, 4), (8, 5)],
        "pixel_values": [
            (2, channels, image, image),
            (2, 2, channels, image, image),
            (2, channels, 64, 256),
            (2 * 16, channels * temporal * patch * patch),
            (2, 16, channels * patch * patch),
            (32, channels, patch, patch),
            (2, 4, channels, image, image),
        ],
        "pixel_values_videos": [(2, 4, channels, image, image)],
        "input_values": [(2, 3200), (2, 1, 3200), *((2, n, width) for n in (64, 128, 1024) for width in widths)],
        "input_features": pairs,
        "bbox": [{"value": [[[1, 2, 3, 4]] * 8] * 2}],
        "image_grid_thw": [{"value": [[1, 4, 4]] * 2}],
        "grid_thw": [{"value": [[1, 4, 4]] * 2}],
        "spatial_shapes": [{"value": [[4, 4]] * 2}],
        "pixel_attention_mask": [(2, 16)],
        "audio_codes": [(2, 4, 16), (2, 8, 16)],
        "past_values": [(2, 32), (2, 64, 4), (2, 32, 4)],
        "inputs": [(2, 128, 64)],
        "hidden_states": [*pairs, (32, channels * temporal * patch * patch)],
        "inputs_embeds": [(2, 8, width) for width in _attributes(config, "hidden_size")],
    }
    return known.get(name, [(2, 8)] if name.endswith(("ids", "mask")) else [])


_GRIDS = ("image_grid_thw", "grid_thw", "spatial_shapes", "pixel_attention_mask")


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Sets of inputs, the likeliest first; images with as many image tokens as the model makes of them."""
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", "input_ids")
    main = [name for name in ([main] if isinstance(main, str) else main) if name in parameters]
    grids = [name for name in _GRIDS if name in parameters]
    images = ["pixel_values"] if "pixel_values" in parameters else []
    sequences = [name for name in ("decoder_input_ids",) if name in parameters]
    base = [*main, *needed]
    for extra in ([*images, *grids], images, [*grids], []):
        for words in (["input_ids"], []):
            names = dict.fromkeys(
                name for name in (*base, *extra, *words, *sequences) if name in parameters or name in needed
            )
            for made in product(*(_shapes(name, config) for name in names)):
                chosen = dict(zip(names, made, strict=True))
                if "pixel_values" in chosen and "input_ids" in chosen:
                    with_images = _with_image_tokens(model, chosen)
                    if with_images:
                        yield with_images
                yield chosen


def _with_image_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs with as many image tokens in ``input_ids`` as the model makes features of these images."""
    token = next(iter(_attributes(model.config, "image_token_id", "image_token_index")), None)
    make: Any = getattr(model, "get_image_features", None)
    if token is None or make is None:
        return None
    accepted = inspect.signature(make).parameters
    try:
        with torch.no_grad():
            features = make(
                **{n: tensor_of(n, kind) for n, kind in inputs.items() if n != "input_ids" and n in accepted}
            )
        features = getattr(features, "pooler_output", features)
        tensors = [features] if isinstance(features, torch.Tensor) else list(features)
        count = sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
    except Exception:
        return None
    ids = tensor_of("input_ids", (2, 8)).tolist()
    rows = [[3, *[token] * (count // 2), *row] for row in ids]
    made = {**inputs, "input_ids": {"value": rows}}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        made["mm_token_type_ids"] = {"value": [[int(item == token) for item in row] for row in rows]}
    return made
