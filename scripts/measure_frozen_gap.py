"""How far a frozen model's outputs are from the fake-quantized ones, and why that is not zero.

Tiny random models, two training steps, calibration where activations are quantized; the largest difference of the
outputs over their standard deviation, and how many inputs arrive quantized. The table is docs/numerics.md's::

    python -m scripts.measure_frozen_gap
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import qat

CASES = (("int8", None), ("int4", None), ("int8", "int8"), ("float8", "float8"))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 64
    return LlamaForCausalLM(config)


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=64, hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_hidden_layers=2)
    config.num_attention_heads, config.max_position_embeddings, config.dropout = 4, 64, 0.0
    return OPTForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    config.num_attention_heads, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 4, 0.0, 0.0
    return BertForMaskedLM(config)


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output: Any = model(input_ids=tokens).logits
    plain: torch.Tensor = output.dequantize() if hasattr(output, "dequantize") else output
    return plain.float()


def gap(make: Callable[[], nn.Module], weights: str, activations: str | None, dtype: str) -> tuple[float, int]:
    """The largest difference over the standard deviation, and the number of inputs that arrive quantized."""
    torch.manual_seed(0)
    model, tokens = make(), torch.randint(0, 64, (4, 16))
    spec = qat.QuantSpec.model_validate({"weights": weights, "activations": activations, "dtype": dtype})
    batches = [{"input_ids": tokens}]
    qat.prepare(model, spec, example_inputs=batches[0])
    qat.calibrate(model, batches)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
    for _ in range(2):
        run: Any = model(input_ids=tokens, labels=tokens)
        run.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    report = qat.calibrate(model, batches)
    before = logits(model, tokens)
    qat.freeze(model)
    return float((logits(model, tokens) - before).abs().max() / before.std()), len(report.arriving)


def main() -> None:
    print("| model | types | inputs that arrive quantized | float32 | bfloat16 |\n|---|---|---|---|---|")
    for make in (llama, opt, bert):
        for weights, activations in CASES:
            (wide, arriving), (narrow, _) = (gap(make, weights, activations, d) for d in ("float32", "bfloat16"))
            types = weights if activations is None else f"{weights} + {activations}"
            print(f"| {make.__name__} | {types} | {arriving} | {wide:.1e} | {narrow:.3f} |")


if __name__ == "__main__":
    main()
