"""What language models write: beginnings of held-out text, and how each model goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.files.whole import whole_file

__all__ = ["write_samples"]

COUNT, PROMPT, LENGTH = 3, 32, 40  # samples, and tokens of each


@torch.no_grad()
def write_samples(tokenizer: Any, examples: Any, path: Path, models: Mapping[str, nn.Module]) -> None:
    """Write JSON: for each sample the beginning, and by the model's name what it goes on with, without any chance.

    Args:
        tokenizer: of the models.
        examples: blocks of tokens, each with ``input_ids``, of which the first few begin.
        path: the file.
        models: by name; causal language models of transformers, left on their devices.
    """
    found: list[dict[str, str]] = []
    for number in range(min(COUNT, len(examples))):
        prompt = torch.as_tensor(examples[number]["input_ids"])[:PROMPT]
        sample = {"prompt": tokenizer.decode(prompt)}
        for name, model in models.items():
            any_model: Any = model.eval()
            ids = prompt[None].to(any_model.device)
            given = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": tokenizer.eos_token_id or 0}
            made = any_model.generate(ids, attention_mask=torch.ones_like(ids), **given)
            sample[name] = tokenizer.decode(made[0, prompt.numel() :])
        found.append(sample)
    with whole_file(path) as made_file:
        made_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
