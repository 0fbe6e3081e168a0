from __future__ import annotations

import pytest
import torch
from torch import nn

from recipes.common import training


def test_training_keeps_no_cache_of_keys_and_values() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with training._without_cache(model):
        assert model(tokens).past_key_values is None
    assert model(tokens).past_key_values is not None
    with training._without_cache(nn.Linear(2, 2)):  # nothing to change
        pass


def test_a_model_is_no_longer_compiled_once_it_is_frozen() -> None:
    block = nn.Linear(2, 2)
    block.compile()
    model = nn.Sequential(block)
    training._uncompile(model)
    assert block._compiled_call_impl is None
    assert model(torch.zeros(1, 2)).shape == (1, 2)
