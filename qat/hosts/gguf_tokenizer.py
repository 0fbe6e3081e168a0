"""The tokenizer in a GGUF file: what llama.cpp needs of the ``tokenizer.json`` beside it.

Two kinds are known: byte-level BPE, which llama.cpp calls ``gpt2``, and BPE that falls back to bytes, as converted from
SentencePiece, which it calls ``llama``. It splits text by rules that it knows by names; where the split of a tokenizer
has none here, the name is left out, and llama.cpp warns.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qat.errors import ExportError
from qat.hosts.gguf import require_package

__all__ = ["write_tokenizer"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def write_tokenizer(writer: Any, directory: Path, rows: int) -> None:
    """Write the tokenizer of a directory, if it has one; ``rows`` are those of the model's table.

    Raises:
        ExportError: it is of another kind, or has more tokens than the table has rows.
    """
    gguf, path = require_package(ExportError), directory / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("none")
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    model, kinds = fields["model"], gguf.TokenType
    if model["type"] != "BPE":
        raise ExportError(
            f"processor: its tokenizer is a {model['type']}, and GGUF files are written with BPE alone: leave it out, "
            "and save the tokenizer yourself"
        )
    vocabulary = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(vocabulary, kinds.NORMAL)
    for added in fields.get("added_tokens") or ():
        vocabulary[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    if max(vocabulary) >= rows:
        raise ExportError(
            f"processor: its tokenizer has tokens up to {max(vocabulary)}, and the model's table {rows} rows: give the "
            "tokenizer that the model was trained with"
        )
    if sentencepiece := bool(model.get("byte_fallback")):
        for number in range(256):
            if (at := model["vocab"].get(f"<0x{number:02X}>")) is not None:
                types[at] = kinds.BYTE
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix('"prepend' in json.dumps([fields.get("normalizer"), fields.get("pre_tokenizer")]))
    else:
        writer.add_tokenizer_model("gpt2")
        if (name := _split_name(fields.get("pre_tokenizer") or {})) is not None:
            writer.add_tokenizer_pre(name)
    writer.add_token_list([vocabulary.get(number, f"[PAD{number}]") for number in range(rows)])
    if sentencepiece:
        writer.add_token_scores(_scores(model, rows))
    writer.add_token_types([types.get(number, kinds.UNUSED) for number in range(rows)])
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names token kinds of transformers that GGUF has no key for
    try:
        gguf.SpecialVocab(directory, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)
    finally:
        logger.setLevel(level)


def _split_name(split: dict[str, Any]) -> str | None:
    """What llama.cpp calls the rule by which a byte-level tokenizer splits text; None: unknown here."""
    steps = split.get("pretokenizers", [split])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2" if steps[0].get("use_regex", True) else None
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "starcoder"
    return _SPLITS.get(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else None


def _scores(model: dict[str, Any], rows: int) -> list[float]:
    """The earlier a token is merged, the higher its score: SentencePiece merges the pair with the highest one."""
    scores = [0.0] * rows
    order: dict[str, int] = {}
    for merge in model["merges"]:
        text = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        order.setdefault(text, len(order))
    for text, number in model["vocab"].items():
        scores[number] = -float(order.get(text, len(order)))
    return scores
