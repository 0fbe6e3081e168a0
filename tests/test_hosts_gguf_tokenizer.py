"""The tokenizer that a GGUF file holds: what transformers reads of it gives the tokens of the one that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import qat
from qat.hosts import gguf_tokenizer
from tests.helpers import tiny_model

TEXTS = ["the cat sat on the mat", "a cat,  a hat", "that's 1234 cats!\n", "über <s> sat", "<think> on"]
ROWS = 320


def byte_level(split: Any = None) -> Any:
    backend = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = plain
    if split is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), plain])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    made.add_tokens(["<think>"])
    return made


def sentencepiece() -> Any:
    """BPE that falls back to bytes, as Llama's tokenizer is converted."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    merges = [tuple(merge) for merge in model["merges"]]
    merged = ["".join(merge) for merge in merges]
    singles = [text for text in model["vocab"] if text not in merged]
    vocab = {text: number for number, text in enumerate([*first, *merged, *singles])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def exported(directory: Path, tokenizer: Any, rows: int = ROWS) -> dict[str, Any]:
    """The metadata of an export with a tokenizer."""
    model = tiny_model("llama", vocab_size=rows)
    qat.prepare(model, qat.QuantSpec(weights="q8_0"), target="gguf", algorithm=qat.StraightThrough())
    qat.freeze(model, allow_unreached=True)
    qat.export(model, directory, processor=tokenizer)
    fields = gguf.GGUFReader(directory / "model.gguf").fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def read_alone(directory: Path) -> Any:
    for path in directory.iterdir():
        if path.name != "model.gguf":
            path.unlink()
    return AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")


def test_byte_level(tmp_path: Path) -> None:
    tokenizer = byte_level()
    found = exported(tmp_path, tokenizer)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (len(tokens), len(kinds), tokens[-1], kinds[-1]) == (ROWS, ROWS, f"[PAD{ROWS - 1}]", gguf.TokenType.UNUSED)
    assert kinds[tokens.index("<s>")] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    again = read_alone(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    found = exported(tmp_path, tokenizer)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_space_prefix"] is True
    tokens, kinds, scores = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    assert kinds[tokens.index("<0x41>")] == gguf.TokenType.BYTE
    merged = [text.replace(" ", "") for text in found["tokenizer.ggml.merges"]]
    assert sorted(merged, key=lambda text: -scores[tokens.index(text)]) == merged
    again = read_alone(tmp_path)
    for text in TEXTS[:3]:
        ids = [number for number in again(text)["input_ids"] if number != again.bos_token_id]
        assert ids == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (gguf_tokenizer._LLAMA3, "llama-bpe"),
        (gguf_tokenizer._LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "qwen2"),
        (r"\s+", None),
    ],
    ids=["llama 3", "qwen 2", "unknown"],
)
def test_llama_cpp_knows_a_split_by_its_name_and_warns_without_one(
    tmp_path: Path, split: str, name: str | None
) -> None:
    assert exported(tmp_path, byte_level(split)).get("tokenizer.ggml.pre") == name


def test_the_names_are_those_by_which_transformers_splits() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for split, name in gguf_tokenizer._SPLITS.items():
        assert GGUF_PRE_TOKENIZER_SPLITS[name] == split


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(
        qat.ExportError, match="its tokenizer is a WordLevel, and GGUF files are written with BPE alone"
    ):
        exported(tmp_path / "out", PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qat.ExportError, match="and the model's table 64 rows: give the tokenizer"):
        exported(tmp_path / "out", byte_level(), rows=64)
