from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from recipes.common.samples import write_samples
from tests.exports import small_llama

ROOT = Path(__file__).parents[1]


def test_samples_are_what_the_models_write(tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "recipes" / "reference")
    model = small_llama(vocab_size=len(tokenizer)).eval()
    ids = tokenizer("def main(): return 1 if x else 2", return_tensors="pt")["input_ids"][0]
    for _ in range(2):
        write_samples(tokenizer, [{"input_ids": ids}], tmp_path / "samples.json", {"a": model, "b": model})
        (found,) = json.loads((tmp_path / "samples.json").read_text())
        assert list(found) == ["prompt", "a", "b"]
        assert tokenizer.decode(ids[:32]) == found["prompt"]
        assert found["a"] == found["b"] != ""
    best = model(ids[None, :32]).logits[0, -1].argmax()
    assert found["a"].startswith(tokenizer.decode(best[None]))
    assert torch.is_grad_enabled()
