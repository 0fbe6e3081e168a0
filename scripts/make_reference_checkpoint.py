"""Train the reference language model that the default recipe starts from.

A Llama-architecture model of 5.8 million parameters with a byte-level BPE tokenizer of 4,096 tokens, trained on
the source text of a Python standard library (its test suite included, the recipe's evaluation files held out),
until the evaluation loss is flat: the cosine schedule ends at zero and the best evaluation is kept. One GPU,
some minutes::

    python -m scripts.make_reference_checkpoint out_folder --library /usr/lib/python3.11
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.data.text import standard_library_documents

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=1024
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoded in tokenizer(texts, verbose=False)["input_ids"]:
        ids += [*encoded, end]
    return torch.tensor(ids, dtype=torch.long)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def evaluate(model: torch.nn.Module, blocks: torch.Tensor, batch: int = 64) -> float:
    model.eval()
    total = 0.0
    for chunk in torch.split(blocks, batch):
        with torch.autocast(chunk.device.type, torch.bfloat16):
            total += model(input_ids=chunk, labels=chunk).loss.float().item() * len(chunk)
    model.train()
    return total / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--library", type=Path, default=None, help="standard library to read (default: this one's)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [d["text"] for d in standard_library_documents("train", root=arguments.library, include_tests=True)]
    held_out = [d["text"] for d in standard_library_documents("evaluation", root=arguments.library)]
    tokenizer = train_tokenizer(texts, vocabulary=4096)
    train = token_stream(tokenizer, texts).to(device)
    evaluation = token_stream(tokenizer, held_out)
    evaluation = evaluation[: len(evaluation) // arguments.block * arguments.block].view(-1, arguments.block).to(device)
    print(f"{len(texts)} files, {len(train):,} training tokens, {evaluation.numel():,} evaluation tokens", flush=True)

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=arguments.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]
    decayed = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    compiled = torch.compile(model) if device.type == "cuda" else model
    generator = torch.Generator().manual_seed(arguments.seed)
    offsets = torch.arange(arguments.block, device=device)
    best, best_state, curve, start = math.inf, None, [], time.time()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        first = torch.randint(0, len(train) - arguments.block, (arguments.batch, 1), generator=generator).to(device)
        batch = train[first + offsets]
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0 or step + 1 == arguments.steps:
            score = evaluate(model, evaluation)
            curve.append({"step": step + 1, "train": round(loss.item(), 4), "evaluation": round(score, 4)})
            print(curve[-1], f"{time.time() - start:.0f} s", flush=True)
            if score < best:
                best = score
                best_state = {k: v.detach().to(torch.bfloat16).cpu().clone() for k, v in model.state_dict().items()}

    assert best_state is not None
    final = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    final.load_state_dict(best_state)
    final.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    record = {
        "seed": arguments.seed,
        "steps": arguments.steps,
        "tokens_per_step": arguments.batch * arguments.block,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "training_files": len(texts),
        "training_tokens": len(train),
        "evaluation_tokens": evaluation.numel(),
        "best_evaluation_loss": round(best, 4),
        "bfloat16_evaluation_loss": round(evaluate(final.to(device), evaluation), 4),
        "curve": curve,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}))


if __name__ == "__main__":
    main()
