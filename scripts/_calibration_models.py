"""The models of `benchmark_calibration`, each with batches to calibrate on and examples that are held out."""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RECIPES = Path(__file__).parents[1] / "recipes"
BATCH, BATCHES = 8, 8
BLOCK, HELD_OUT = 256, 32  # of the language model
LENGTH = 64  # of the encoder

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A float model, the examples that calibration may draw from, and those that are held out."""

    model: Any
    collate: Callable[[Sequence[int]], Batch]
    """Makes a batch of the examples with these numbers; those of classifiers hold ``labels`` too."""
    examples: int
    held_out: list[Batch]
    labels: Tensor
    """What the predictions of the held-out examples should be, flat."""
    language: bool
    """Whether the labels are the next tokens."""

    def batches(self, seed: int) -> list[Batch]:
        """A draw of batches to calibrate on."""
        order = torch.randperm(self.examples, generator=torch.Generator().manual_seed(seed + 1))
        found = [self.collate(part.tolist()) for part in torch.split(order[: BATCH * BATCHES], BATCH)]
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in found]

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Of the held-out examples, float32 ``(predictions, classes)``."""
        given = [{key: value for key, value in batch.items() if key != "labels"} for batch in self.held_out]
        found = [model(**batch).logits.float() for batch in given]
        return torch.cat([part.flatten(0, -2) for part in found])

    def loss(self, logits: Tensor) -> float:
        """In nats."""
        if self.language:
            blocks = logits.view(-1, BLOCK, logits.shape[-1])
            logits = blocks[:, :-1].flatten(0, 1)
        return float(nn.functional.cross_entropy(logits, self.labels))


def language_model(device: str) -> Case:
    """The reference language model on blocks of tokens of the standard library."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = RECIPES / "reference"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8", errors="ignore"), verbose=False)["input_ids"]
    whole = len(ids) // BLOCK
    blocks = torch.tensor(ids[: whole * BLOCK]).view(whole, BLOCK).to(device)
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(0))
    held_out, others = blocks[order[:HELD_OUT]], blocks[order[HELD_OUT:]]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return Case(
        model.to(device).eval(),
        lambda rows: {"input_ids": others[rows]},
        len(others),
        [{"input_ids": part} for part in torch.split(held_out, BATCH)],
        held_out[:, 1:].flatten(),
        True,
    )


def vision_transformer(device: str) -> Case:
    """The reference vision transformer on scikit-learn's digits; every fifth is held out."""
    from recipes.common.models import load_classifier
    from recipes.data.labelled_images import ImageBatch, LabelledImageData, load_labelled_images

    model, processor = load_classifier(str(RECIPES / "reference_vit"), "image")
    return _classifier(model, load_labelled_images(LabelledImageData()), ImageBatch(processor), device)


def encoder(device: str) -> Case:
    """The reference encoder on pieces of the standard library; files that it was trained on are not held out."""
    from recipes.common.models import load_classifier
    from recipes.data.labelled_text import LabelledTextData, TextBatch, load_labelled_texts

    model, tokenizer = load_classifier(str(RECIPES / "reference_encoder"), "sequence")
    return _classifier(model, load_labelled_texts(LabelledTextData()), TextBatch(tokenizer, LENGTH), device)


def _classifier(model: Any, found: Any, collate: Any, device: str) -> Case:
    def batch(rows: Any, numbers: Sequence[int]) -> Batch:
        made = collate([rows[number] for number in numbers])
        return {key: value.to(device) for key, value in made.items()}

    held_out = [
        range(start, min(start + BATCH, len(found.evaluation))) for start in range(0, len(found.evaluation), BATCH)
    ]
    return Case(
        model.to(device).eval(),
        lambda numbers: batch(found.train, numbers),
        len(found.train),
        [batch(found.evaluation, numbers) for numbers in held_out],
        torch.tensor(found.evaluation["label"]).to(device),
        False,
    )


@torch.no_grad()
def with_outliers(model: Any, factor: float = 30.0, channels: int = 4) -> Any:
    """The same function in float, with a few channels that are ``factor`` times as large, and what reads them smaller.

    Of a model with RMSNorm: of each norm and each gate. Of an encoder with LayerNorm after each block, whose outputs
    are also added: of each query (against the key) and of each value.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)

    def scale(part: Any, readers: Sequence[nn.Linear], rows: bool = False) -> None:
        index = torch.randperm(part.weight.shape[0], generator=generator)[:channels]
        for value in part.parameters():
            value[index] *= factor
        for reader in readers:
            for value in reader.parameters() if rows else [reader.weight]:
                value.data[index if rows else (slice(None), index)] /= factor

    if hasattr(model, "bert"):
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            scale(attention.query, [attention.key], rows=True)
            scale(attention.value, [layer.attention.output.dense])
        return model
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        scale(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        scale(mlp.up_proj, [mlp.down_proj])
    return model
