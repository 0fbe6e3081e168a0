"""Float models to start from."""

from __future__ import annotations

from typing import Any

import torch

import qat

__all__ = ["load_language_model"]


def load_language_model(source: str) -> tuple[Any, Any]:
    """Load a causal language model with float32 master weights, and its tokenizer.

    Args:
        source: a local directory or a hub name.

    Raises:
        LoadError: either cannot be loaded, or weights are missing or have other shapes than the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = load(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        raise qat.LoadError(f"model: {source!r} cannot be loaded: {' '.join(str(error).split())}") from error
    unfilled = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if unfilled:
        raise qat.LoadError(f"model: the weights in {source!r} do not fill {unfilled[:5]}: give a complete checkpoint")
    return model, tokenizer
