"""Rules that make a configuration of transformers tiny: by the names of its attributes, nested ones too.

Equal numbers become equal ones where they may be one width, so that parts still fit each other. ``rules`` says how much
is shrunk: ``all``; ``depth`` leaves widths alone, for networks whose widths hang together in ways that no name tells;
``none`` is the default configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["shrunk"]

WIDTH, FEED_FORWARD, HEADS, HEAD_DIM, VOCABULARY, SPECIAL, IMAGE = 128, 192, 4, 32, 128, 64, 64

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")
_EXACT: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "model_dim", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("projection_dim", "embedding_size", "encoder_hidden_size", "text_hidden_size"), WIDTH),
    **dict.fromkeys(("decoder_hidden_size", "attention_hidden_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("upsample_groups", "q_lora_rank", "kv_lora_rank"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "d_head"), HEAD_DIM),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    "qk_head_dim": 2 * HEAD_DIM,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "image_size": IMAGE,
    "resolution": IMAGE,
    "base_channels": 32,
    "upsample_initial_channel": 32,
    "mamba_d_state": 16,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
}
"""Set whatever the default is, where the default is a number."""
_WIDTHS = (
    (r"(intermediate|ffn|inner|d_ff|mlp|feed_?forward|linear_units)", FEED_FORWARD),
    (r"(size|dim|dims|channels|width|embd|filters|units|rank|hidden|inner|channel)$", WIDTH),
)
_LARGEST: tuple[tuple[str, int], ...] = (
    (r"(_token_ids?|_index|_id|feat_extract_layers|feature_layer)$", 10**9),
    (r"vocab_size", VOCABULARY),
    (r"(^|_)(num_|n_)?(hidden_)?(layers|blocks)$|^n_layer$|(^|_)depth$|_layers$|^layers$", 2),
    (r"heads$|_head$", HEADS),
    (r"head_dim|dim_head|head_size$", HEAD_DIM),
    (r"per_tok(en)?$|top_?k_experts|moe_topk|moe_k$|expert_top_k|^top_k$", 2),
    (r"experts$", 4),
    (r"(max_.*positions?|n_positions|max_.*position_embeddings|n_ctx|max_seq_len)", 128),
    (r"sliding_window", 8),
    (r"num_queries|query_tokens|num_latents|n_latents", 8),
    (r"patch_size$", 16),
    (r"^(n|num)_filters$", 8),
    (r"num_frames", 4),
    (r"(position_embedding|image|patch|window|kernel|stride|chunk|crop|codebook|batch|buffer|sample)", 10**9),
)
"""The largest number for what a name matches; the first that matches counts, before `_WIDTHS`."""


_MISSING: dict[str, int] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
"""Where the default is None, in a configuration of attention."""


def shrunk(kind: Any, sizes: Mapping[str, Any], rules: str = "all") -> Any:
    """A tiny configuration of class ``kind``; ``sizes`` go before the rules."""
    default = kind()
    specials = {name: SPECIAL + n for n, name in enumerate(sorted(_special_names(default)))}
    return kind(**_arguments(default, sizes, _Rules(rules, specials)))


@dataclass(frozen=True)
class _Rules:
    amount: str
    specials: Mapping[str, int]
    """Numbers of the special tokens, by name."""


def _is_config(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _special_names(config: Any) -> set[str]:
    """Names of tokens whose number is not below `SPECIAL`, nested ones included."""
    names: set[str] = set()
    for name, value in vars(config).items():
        if _is_config(value):
            names |= _special_names(value)
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int) and value >= SPECIAL:
            names.add(_token(name))
    return names


def _token(name: str) -> str:
    return re.sub(r"_(id|index)$", "", name)


def _arguments(config: Any, sizes: Mapping[str, Any], rules: _Rules) -> dict[str, Any]:
    """What the configuration's class is called with."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = _Layers.of(values, getattr(config, "out_indices", None))
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name in sizes and not (_is_config(value) and _overrides(sizes[name])):
            arguments[name] = _made(sizes[name])
        elif _is_config(value) and value.model_type == "timm_backbone":
            stages = [f"stage{number}" for number in value.out_indices or [4]]
            arguments[name] = _made({"config": "ResNetConfig", "out_features": stages})
        elif _is_config(value):
            own = {**_peculiar(value), **_arguments(value, sizes.get(name, {}), rules)}
            arguments[name] = type(value)(**own)
        elif rules.amount != "none":
            new = _small(name, value, values, layers, rules)
            if new is not value:
                arguments[name] = new
    if layers.taken and rules.amount != "none":
        arguments["out_indices"] = layers.taken
    return arguments | {name: _made(value) for name, value in sizes.items() if name not in values}


def _peculiar(config: Any) -> dict[str, Any]:
    """What a nested configuration has that its class's default has not; the stages whose maps it gives are kept too."""
    plain = vars(type(config)())
    own = {n: v for n, v in vars(config).items() if not n.startswith("_") and not (n in plain and plain[n] == v)}
    staged = isinstance(getattr(config, "depths", None), list | tuple) or "stage" in str(
        getattr(config, "out_features", "")
    )
    if staged and getattr(config, "_out_indices", None) is not None:
        own["out_indices"] = list(config.out_indices)
    return own


def _overrides(value: Any) -> bool:
    return isinstance(value, Mapping) and "config" not in value


def _made(value: Any) -> Any:
    """``{config: BertConfig, ...}`` in the table is a configuration of that class, shrunk."""
    if isinstance(value, Mapping) and "config" in value:
        import transformers

        sizes = {name: item for name, item in value.items() if name not in ("config", "rules")}
        return shrunk(getattr(transformers, value["config"]), sizes, value.get("rules", "all"))
    return value


@dataclass(frozen=True)
class _Layers:
    depth: int
    """Of the default configuration; 0 where stages have depths of their own."""
    kept: list[int]
    taken: list[int] | None
    """Where a backbone gives its feature maps."""

    @classmethod
    def of(cls, values: Mapping[str, Any], outputs: Any) -> _Layers:
        """The first layer of each kind, as lists with an entry for each layer tell them apart; two at least."""
        staged = any(isinstance(values.get(name), list | tuple) for name in ("depths", "hidden_sizes", "embed_dims"))
        depth = 0 if staged else next((values[name] for name in _DEPTHS if _count(values.get(name))), 0)
        last = max(2, len(outputs or []))
        taken = list(range(last - len(outputs) + 1, last + 1)) if outputs and depth else None
        lists = [v for n, v in values.items() if _by_layer(n, v, depth)]
        kinds = [str(kind) for kind in zip(*lists, strict=True)] or [""] * depth
        first = sorted({kind: n for n, kind in reversed(list(enumerate(kinds)))}.values())[:4]
        more = last - len(first)
        first += [n for n in range(len(kinds)) if n not in first][: max(0, more)]
        return cls(depth, sorted(first), taken)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _by_layer(name: str, value: Any, depth: int) -> bool:
    return isinstance(value, list | tuple) and depth > 2 and len(value) == depth and "token" not in name


def _small(name: str, value: Any, values: Mapping[str, Any], layers: _Layers, rules: _Rules) -> Any:
    """A small value in the place of ``value``, or ``value`` itself."""
    if isinstance(value, bool):
        return False if name == "apply_spec_augment" else value
    if isinstance(value, float):
        return 0.0 if re.search(r"dropout|drop_path|layerdrop|mask_time_prob|_pdrop|drop_rate", name) else value
    if _by_layer(name, value, layers.depth):
        return type(value)(value[n] for n in layers.kept)
    if isinstance(value, list | tuple):
        return _small_list(name, value, len(layers.kept) or 2, rules)
    if isinstance(value, Mapping):
        return _small_mapping(name, value, values) if rules.amount == "all" else value
    if value is None and rules.amount == "all":
        return _MISSING.get(name) if "num_attention_heads" in values else None
    if not isinstance(value, int):
        return value
    if re.search(r"token_(id|index)$", name):
        fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        return value if value < SPECIAL else fixed.get(name, rules.specials.get(_token(name), 3))
    if name in _DEPTHS:
        return len(layers.kept) if layers.depth else value
    return _number(name, value, values, rules)


def _number(name: str, value: int, values: Mapping[str, Any], rules: _Rules) -> int:
    if rules.amount == "all":
        if name == "embed_dim" and isinstance(values.get("depths"), list | tuple):
            return 32  # doubled from stage to stage
        if re.search(r"key_value_heads|kv_heads", name):
            heads = values.get("num_attention_heads") or 0
            return min(value, HEADS if isinstance(heads, int) and value >= heads else 2)
        if name == "window_size" and isinstance(values.get("depths"), list | tuple):
            return 2  # no larger than what the last stage has left of the image
        if name == "encoder_hidden_size" and "downsampling_ratios" in values:
            return 8  # doubled from stage to stage
        if name in _EXACT:
            return _EXACT[name]
    table = _LARGEST + _WIDTHS if rules.amount == "all" else [row for row in _LARGEST if "head" not in row[0]]
    return min(value, next((largest for pattern, largest in table if re.search(pattern, name)), value))


def _small_list(name: str, value: Sequence[Any], layers: int, rules: _Rules) -> Any:
    """Depths become ones, widths and heads smaller, indices those of the layers left."""
    if not value or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    kind: Any = type(value)
    if name == "image_size":
        return kind([IMAGE] * len(value))
    if re.search(r"depths|num_blocks|blocks_per_stage|^layers$|num_block_repeats|numb_of_layers", name):
        return kind(min(item, 1) for item in value)
    if re.search(r"index|indices|_layer$|global_attn", name) and "token" not in name and max(value) >= layers:
        return kind(sorted({min(item, layers - 1) if item >= 0 else item for item in value}))
    if rules.amount != "all":
        return value
    if re.search(r"heads", name):
        ranks = [sorted(set(value)).index(item) for item in value]
        return kind(min(2**rank, 8) for rank in ranks)
    if re.search(r"kernel|image|patch|window|stride|feature_sizes", name):
        return value
    if re.search(r"(hidden_sizes|dims?|channels|widths|embed|channel_list)(_per_stage)?$", name):
        return kind(_small_width(item) for item in value)
    return value


def _small_width(width: int) -> int:
    """The power of two from 32 to 256 that halves it; 96 becomes 32 and stays a quarter of what 384 becomes."""
    return width if width < 32 else min(256, max(32, 2 ** (width.bit_length() - 2)))


def _small_mapping(name: str, value: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Rotary sections shrink with the head; the rest stays."""
    if not name.startswith("rope"):
        return value
    made = {
        key: _small_mapping(name, item, values) if isinstance(item, Mapping) else item for key, item in value.items()
    }
    if "mrope_section" in value or ("rope_type" in value and "mrope_section" in (values.get(_UNCHECKED) or ())):
        partial = value.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
        made["mrope_section"] = _sections(value.get("mrope_section"), values, partial)
    return made


_UNCHECKED = "ignore_keys_at_rope_validation"
"""The attribute that names ``mrope_section`` where a model reads it, be it set or not."""


def _sections(sections: Sequence[int] | None, values: Mapping[str, Any], partial: float) -> list[int]:
    """As many sections, with the sum that a head of `HEAD_DIM` needs in the place of the default's."""
    if sections is None:
        total = int(HEAD_DIM * partial) // 2
        return [total - 2 * (total // 3), total // 3, total // 3]
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    total = max(len(sections), sum(sections) * HEAD_DIM // head)
    made = [max(1, item * total // sum(sections)) for item in sections]
    made[0] += total - sum(made)
    return made
