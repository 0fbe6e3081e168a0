r"""Train the reference classifiers that the recipes for images and for texts start from.

`vit` is a vision transformer for scikit-learn's handwritten digits. `encoder` is a BERT that tells families of modules
of Python's standard library apart, with a tokenizer of its own. Both are trained from scratch on a CPU until the loss
on held-out examples is flat: the cosine schedule ends at zero, and the best evaluation is kept::

    OMP_NUM_THREADS=1 python -m scripts.make_reference_classifiers vit out_folder
    OMP_NUM_THREADS=1 python -m scripts.make_reference_classifiers encoder out_folder --batch 32 --steps 1200 \
        --dropout 0.2 --hidden-words 0.3 --label-smoothing 0.1 --tokenizer recipes/reference_encoder

A new tokenizer orders word pieces of equal count by chance. So only a run with the tokenizer of an earlier run, given
by `--tokenizer`, repeats that run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from recipes.data.labelled_images import ImageBatch, LabelledImageData, load_labelled_images
from recipes.data.labelled_text import LabelledTextData, TextBatch, load_labelled_texts
from recipes.tasks import Classification, evaluate

Batch = dict[str, Tensor]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: nn.Module,
    draw: Callable[[torch.Generator], Batch],
    evaluation: Sequence[Batch],
    classes: int,
    settings: argparse.Namespace,
) -> dict[str, Any]:
    """Train in place and leave the weights of the best evaluation, rounded to bfloat16; return the record."""
    task, generator = Classification(classes=classes), torch.Generator().manual_seed(settings.seed)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    best, best_state, curve, start = math.inf, None, [], time.time()
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.learning_rate)
        batch = draw(generator)
        logits = model(**task.inputs(batch)).logits
        loss: Any = functional.cross_entropy(logits, batch["labels"], label_smoothing=settings.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            scores = evaluate(task, model, evaluation)
            curve.append({"step": step + 1, "train": loss.item(), **scores})
            curve[-1] = {name: round(value, 4) for name, value in curve[-1].items()}
            print(curve[-1], f"{time.time() - start:.0f} s", flush=True)
            if scores["loss"] < best:
                best, best_state = scores["loss"], {k: v.detach().clone() for k, v in model.state_dict().items()}
    assert best_state is not None
    model.load_state_dict({k: v.to(torch.bfloat16).to(v.dtype) for k, v in best_state.items()})
    names = ("seed", "steps", "batch", "learning_rate", "weight_decay", "label_smoothing", "dropout", "hidden_words")
    record = {name: getattr(settings, name) for name in names}
    scores = {name: round(value, 4) for name, value in evaluate(task, model, evaluation).items()}
    return {**record, "bfloat16_weights": scores, "curve": curve}


def batches(examples: Batch, size: int = 100) -> list[Batch]:
    count = len(examples["labels"])
    return [{k: v[i : i + size] for k, v in examples.items()} for i in range(0, count, size)]


def shifted(pixels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to so many pixels; what appears at the edges is black, as around the digits."""
    size = pixels.shape[-1]
    padded = functional.pad(pixels, [most] * 4, value=-1.0)
    rows, columns = torch.randint(0, 2 * most + 1, (2, len(pixels)), generator=generator)
    return torch.stack([p[:, r : r + size, c : c + size] for p, r, c in zip(padded, rows, columns, strict=True)])


def make_vit(settings: argparse.Namespace) -> None:
    found = load_labelled_images(LabelledImageData())
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    collate = ImageBatch(processor)
    training, evaluation = (collate(list(part)) for part in (found.train, found.evaluation))
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=settings.dropout,
        id2label=dict(enumerate(found.classes)),
        label2id={name: index for index, name in enumerate(found.classes)},
    )
    model = ViTForImageClassification(config)

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(0, len(training["labels"]), (settings.batch,), generator=generator)
        pixels = shifted(training["pixel_values"][chosen], 1, generator)
        return {"pixel_values": pixels, "labels": training["labels"][chosen]}

    record = train(model, draw, batches(evaluation), len(found.classes), settings)
    sizes = {"training_images": len(found.train), "evaluation_images": len(found.evaluation)}
    save(model, processor, {**sizes, **record}, settings.output)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Word pieces of words and single marks; white space is of no meaning, capitals are."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=128, **{f"{name}_token": mark for name, mark in special.items()}
    )


def make_encoder(settings: argparse.Namespace) -> None:
    data = LabelledTextData(evaluation_texts=10**6)
    found = load_labelled_texts(data)
    if settings.tokenizer is None:
        tokenizer = train_tokenizer(found.train["text"][:], vocabulary=2048)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.tokenizer, trust_remote_code=False)
    collate = TextBatch(tokenizer, data.max_length)
    rows, held_out = list(found.train), list(found.evaluation)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        type_vocab_size=1,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(found.classes)),
        label2id={name: index for index, name in enumerate(found.classes)},
    )
    model = BertForSequenceClassification(config)

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(0, len(rows), (settings.batch,), generator=generator)
        batch = collate([rows[index] for index in chosen.tolist()])
        # Hidden words keep the model from knowing single files by heart.
        hidden = torch.rand(batch["input_ids"].shape, generator=generator) < settings.hidden_words
        special = batch["input_ids"] < len(tokenizer.all_special_ids)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden & ~special, int(tokenizer.mask_token_id))
        return batch

    evaluation = [collate(held_out[i : i + 100]) for i in range(0, len(held_out), 100)]
    record = train(model, draw, evaluation, len(found.classes), settings)
    save(model, tokenizer, {"training_texts": len(rows), "evaluation_texts": len(held_out), **record}, settings.output)


def save(model: Any, processor: Any, record: dict[str, Any], output: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["vit", "encoder"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--tokenizer", type=Path, help="for the encoder (default: a new one)")
    parser.add_argument("--hidden-words", type=float, default=0.0, help="share of words, for the encoder")
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(argv)
    torch.manual_seed(settings.seed)
    {"vit": make_vit, "encoder": make_encoder}[settings.kind](settings)


if __name__ == "__main__":
    main()
