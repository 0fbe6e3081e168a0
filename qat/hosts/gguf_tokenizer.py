"""The tokenizer in a GGUF file: what llama.cpp needs of the ``tokenizer.json`` beside it.

Two kinds are known: byte-level BPE, which llama.cpp calls ``gpt2``, and BPE that falls back to bytes, as converted from
SentencePiece, which it calls ``llama``. llama.cpp has the steps before BPE in its own code, and finds them by names.
What has no name there is refused. Where it differs for some texts alone, the export has a note.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from qat.errors import ExportError, listed
from qat.hosts.gguf import require_package

__all__ = ["SPLITS", "general_name", "tokenizer_notes", "write_tokenizer"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": _LLAMA3, "dbrx": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}
_IGNORES_MERGES = "llama-bpe"  # the name of them by which llama.cpp takes a word that is a token as it is
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Steps before byte-level BPE, by llama.cpp's names of them; of a step, the fields that decide.
_BYTE_LEVEL: list[tuple[str, list[dict[str, Any]]]] = [
    ("gpt-2", [_BYTES]),
    ("starcoder", [{"type": "Digits", "individual_digits": True}, _BYTES]),
]
for _name, _split in SPLITS.items():
    _isolated = {"type": "Split", "pattern": {"Regex": _split}, "behavior": "Isolated", "invert": False}
    _BYTE_LEVEL.append((_name, [_isolated, {**_BYTES, "use_regex": False}]))
_SPACE = "\u2581"  # which stands for a space in tokens of SentencePiece
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
# The same of SentencePiece's BPE, by how a space comes first.
_PIECES: list[tuple[str, list[dict[str, Any]]]] = [
    ("never", [_REPLACE]),
    ("each", [{"type": "Prepend", "prepend": _SPACE}, _REPLACE]),
    *((scheme, [{**_METASPACE, "prepend_scheme": scheme}]) for scheme in ("never", "first", "always")),
]
_LEFT = {"<unk>", "<s>", "<|endoftext|>"}
_NO_TOKENIZER = "the GGUF file holds no tokenizer, so llama.cpp takes and gives numbers of tokens alone"


def write_tokenizer(writer: Any, directory: Path, rows: int) -> None:
    """Write the tokenizer of a directory, if it has one; ``rows`` are those of the model's table.

    Raises:
        ExportError: llama.cpp would make other tokens, or it has more tokens than the table has rows.
    """
    gguf, fields = require_package(ExportError), _read(directory)
    if fields is None:
        writer.add_tokenizer_model("none")
        return
    model, kinds = fields["model"], gguf.TokenType
    steps = _steps(fields)
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
        writer.add_add_space_prefix(steps != "never")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(steps)
    writer.add_token_list([vocabulary.get(number, f"[PAD{number}]") for number in range(rows)])
    if sentencepiece:
        writer.add_token_scores(_scores(model, rows))
    writer.add_token_types([types.get(number, kinds.UNUSED) for number in range(rows)])
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names token kinds of transformers that GGUF has no key for
    try:
        special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=rows)
        special.add_special_token |= _added_around(fields, special.special_token_ids)
        special.add_to_gguf(writer, quiet=True)
    finally:
        logger.setLevel(level)


def tokenizer_notes(directory: Path) -> list[str]:
    """For which texts llama.cpp makes other tokens of them than the tokenizer of a directory."""
    fields = _read(directory)
    if fields is None:
        return [_NO_TOKENIZER]
    steps, notes = _steps(fields), []
    if fields.get("normalizer") and not fields["model"].get("byte_fallback"):
        notes.append("llama.cpp does not normalize text to NFC, as the tokenizer does: give it text in NFC")
    if steps in ("first", "always"):
        where = " and after special tokens" if steps == "first" else ""
        notes.append(f"llama.cpp puts a space before text that begins with a space{where}, as the tokenizer does not")
    if fields["model"].get("byte_fallback") and not _all_merges(fields["model"]):
        notes.append("llama.cpp merges whatever gives a token, and the tokenizer by its list of merges alone")
    added = fields.get("added_tokens") or ()
    loose = [a["content"] for a in added if a["lstrip"] or a["single_word"] or (a["rstrip"] and not _strips(fields))]
    if loose:
        notes.append(f"llama.cpp does not know what tokens need or take beside them: {listed(loose, 4)}")
    return notes


def general_name(name: str, directory: Path) -> str:
    """What a file is called: by "phi-3" in it, llama.cpp learns that special tokens take the spaces behind them."""
    fields = _read(directory)
    return "phi-3" if fields is not None and _strips(fields) else name.replace("Phi3", "Phi")


def _read(directory: Path) -> dict[str, Any] | None:
    path = directory / "tokenizer.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _strips(fields: dict[str, Any]) -> bool:
    """Whether added tokens take the spaces behind them, but those that do not so in Phi-3's tokenizer."""
    added = fields.get("added_tokens") or ()
    known = _LEFT | {"</s>"} <= {token["content"] for token in added}
    return known and all(token["rstrip"] == (token["content"] not in _LEFT) for token in added)


def _refused(what: str) -> ExportError:
    return ExportError(
        f"processor: its tokenizer {what}, and llama.cpp would make other tokens: leave it out, and save the tokenizer "
        "yourself"
    )


def _steps(fields: dict[str, Any]) -> str:
    """What the steps before BPE are called; `ExportError` where llama.cpp does not know them."""
    model = fields["model"]
    if model["type"] != "BPE":
        raise _refused(f"is a {model['type']}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"has {key}={model[key]!r}")
    normalizers, splits = _flat(fields, "normalizer"), _flat(fields, "pre_tokenizer")
    if sentencepiece := bool(model.get("byte_fallback")):
        splits, normalizers = normalizers + splits, []
    if normalizers and [step["type"] for step in normalizers] != ["NFC"]:
        raise _refused(f"has normalizer={fields['normalizer']}")
    for name, known in _PIECES if sentencepiece else _BYTE_LEVEL:
        alike = len(known) == len(splits) and all(a.items() >= b.items() for a, b in zip(splits, known, strict=True))
        if alike and bool(model.get("ignore_merges")) == (name == _IGNORES_MERGES):
            return name
    told = (f"{key}={value}" for key in ("normalizer", "pre_tokenizer") if (value := fields.get(key)) is not None)
    raise _refused(f"has {', '.join(told)} and ignore_merges={model.get('ignore_merges')}")


def _flat(fields: dict[str, Any], key: str) -> list[dict[str, Any]]:
    step = fields.get(key)
    return [] if step is None else step.get("normalizers", step.get("pretokenizers", step.get("processors", [step])))


def _added_around(fields: dict[str, Any], numbers: dict[str, int]) -> dict[str, bool]:
    """Whether a text gets ``bos`` before it and ``eos`` behind it. llama.cpp has defaults where a file says nothing."""
    steps = [step for step in _flat(fields, "post_processor") if step["type"] != "ByteLevel"]
    if not steps:
        return {"bos": False, "eos": False}
    if len(steps) == 1 and steps[0]["type"] == "TemplateProcessing":
        ids = {name: kept["ids"] for name, kept in steps[0]["special_tokens"].items()}
        around = [ids[part["SpecialToken"]["id"]] if "SpecialToken" in part else None for part in steps[0]["single"]]
        before, behind = around[: around.index(None)], around[around.index(None) + 1 :]
        if before in ([], [[numbers.get("bos")]]) and behind in ([], [[numbers.get("eos")]]):
            return {"bos": bool(before), "eos": bool(behind)}
    raise _refused(f"has post_processor={fields['post_processor']}")


def _all_merges(model: dict[str, Any]) -> bool:
    """Whether each two tokens that give a token are in the list of merges, as SentencePiece merges them."""
    vocab, merges = model["vocab"], {_pair(merge) for merge in model["merges"]}
    cuts = ((text[:at], text[at:]) for text in vocab for at in range(1, len(text)) if text[:3] != "<0x")
    return all(cut in merges for cut in cuts if cut[0] in vocab and cut[1] in vocab)


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _scores(model: dict[str, Any], rows: int) -> list[float]:
    """The earlier a token is merged, the higher its score: SentencePiece merges the pair with the highest one."""
    scores = [0.0] * rows
    order: dict[str, int] = {}
    for merge in model["merges"]:
        order.setdefault("".join(_pair(merge)), len(order))
    for text, number in model["vocab"].items():
        scores[number] = -float(order.get(text, len(order)))
    return scores
