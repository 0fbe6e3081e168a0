"""The tokenizer that a GGUF file holds: what transformers reads of it gives the tokens of the one that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import qat
from qat.files.manifest import read_manifest
from qat.hosts import gguf_tokenizer
from qat.hosts.gguf_tokenizer import general_name, tokenizer_notes
from tests.gguf_models import TEXTS, byte_level, changed, metaspace, sentencepiece
from tests.helpers import tiny_model

ROWS = 320


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
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert tokenizer_notes(tmp_path) == []
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


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("name", gguf_tokenizer.SPLITS)
def test_llama_cpp_knows_a_split_by_its_name(tmp_path: Path, name: str, ignore_merges: bool) -> None:
    tokenizer = byte_level(gguf_tokenizer.SPLITS[name], ignore_merges)
    if name == "qwen2" and ignore_merges:
        with pytest.raises(qat.ExportError, match=r"ignore_merges=True, and llama.cpp would make other tokens"):
            exported(tmp_path / "out", tokenizer)
    else:
        wanted = name if name == "qwen2" else "llama-bpe" if ignore_merges else "dbrx"
        assert exported(tmp_path, tokenizer)["tokenizer.ggml.pre"] == wanted


def test_digits_are_split_as_in_starcoder(tmp_path: Path) -> None:
    tokenizer = byte_level()
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert exported(tmp_path, tokenizer)["tokenizer.ggml.pre"] == "starcoder"


def test_the_names_are_those_by_which_transformers_splits() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name, split in gguf_tokenizer.SPLITS.items():
        assert GGUF_PRE_TOKENIZER_SPLITS[name] == split


def around(*tokens: str) -> dict[str, Any]:
    ids = {token: {"id": token, "ids": [number], "tokens": [token]} for number, token in ((1, "<s>"), (2, "</s>"))}
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}} if token == "A" else {"SpecialToken": {"id": token, "type_id": 0}}
        for token in tokens
    ]
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": ids}


@pytest.mark.parametrize(
    ("tokenizer", "finds"),
    [
        (byte_level, {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}),
        (byte_level, {"pre_tokenizer": {"type": "Whitespace"}}),
        (byte_level, {"pre_tokenizer": None}),
        (byte_level, {"normalizer": {"type": "Lowercase"}}),
        (byte_level, {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}),
        (byte_level, {"dropout": 0.5}),
        (byte_level, {"end_of_word_suffix": "</w>"}),
        (byte_level, {"post_processor": {"type": "RobertaProcessing", "sep": ("<s>", 0), "cls": ("<s>", 0)}}),
        (sentencepiece, {"normalizer": None}),
        (sentencepiece, {"normalizer": None, "pre_tokenizer": {**metaspace("first"), "split": True}}),
        (sentencepiece, {"normalizer": None, "pre_tokenizer": {**metaspace("first"), "replacement": "_"}}),
        (sentencepiece, {"normalizer": {"type": "NFKC"}}),
        (sentencepiece, {"pre_tokenizer": metaspace("always")}),
        (sentencepiece, {"ignore_merges": True}),
        (sentencepiece, {"post_processor": around("</s>", "A")}),
        (sentencepiece, {"post_processor": around("<s>", "<s>", "A")}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_what_llama_cpp_does_not_know_is_refused(tmp_path: Path, tokenizer: Any, finds: dict[str, Any]) -> None:
    if "post_processor" in finds and finds["post_processor"]["type"] == "RobertaProcessing":
        finds["post_processor"] |= {"trim_offsets": True, "add_prefix_space": False}
    made = changed(tokenizer(), **finds)
    match = (
        r"its tokenizer has .*, and llama.cpp would make other tokens: leave it out, and save the tokenizer yourself"
    )
    with pytest.raises(qat.ExportError, match=match):
        exported(tmp_path / "out", made)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parts", "space", "note"),
    [
        ({"normalizer": None, "pre_tokenizer": metaspace("never")}, False, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, False, None),
        ({}, True, None),
        ({"normalizer": None, "pre_tokenizer": metaspace("always")}, True, "text that begins with a space, as"),
        ({"normalizer": None, "pre_tokenizer": metaspace("first")}, True, "a space and after special tokens, as"),
    ],
    ids=["never", "normalizer without one", "normalizer", "always", "first"],
)
def test_the_space_before_a_text(tmp_path: Path, parts: Any, space: bool, note: str | None) -> None:
    found = exported(tmp_path, changed(sentencepiece(), **parts))
    assert found["tokenizer.ggml.add_space_prefix"] is space
    notes = [told for told in read_manifest(tmp_path).notes if "puts a space before text" in told]
    assert [note in told for told in notes] == [True] * (note is not None)
    assert all(told in (tmp_path / "README.md").read_text() for told in notes)


@pytest.mark.parametrize(
    ("tokens", "bos", "eos"), [(("A",), False, False), (("<s>", "A"), True, False), (("<s>", "A", "</s>"), True, True)]
)
def test_tokens_around_a_text(tmp_path: Path, tokens: tuple[str, ...], bos: bool, eos: bool) -> None:
    found = exported(tmp_path, changed(sentencepiece(), post_processor=around(*tokens)))
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (bos, eos)


def test_what_llama_cpp_makes_otherwise_of_some_texts_is_noted(tmp_path: Path) -> None:
    exported(tmp_path / "nfc", changed(byte_level(), normalizer={"type": "NFC"}))
    assert any("does not normalize text to NFC" in note for note in read_manifest(tmp_path / "nfc").notes)
    assert "does not normalize text to NFC" in (tmp_path / "nfc" / "README.md").read_text()
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<end>", rstrip=True)])
    exported(tmp_path / "strip", tokenizer)
    assert any("take beside them: <mask>, <end>" in note for note in read_manifest(tmp_path / "strip").notes)
    exported(tmp_path / "none", None)
    assert any("holds no tokenizer" in note for note in read_manifest(tmp_path / "none").notes)


@pytest.mark.parametrize("whole", [True, False])
def test_merges_that_are_not_all_are_noted(tmp_path: Path, whole: bool) -> None:
    """llama.cpp's SentencePiece merges any two tokens that give a token."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), *([("a", "bc")] if whole else [])]
    backend = Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, merges, byte_fallback=True))
    backend.normalizer = sentencepiece().backend_tokenizer.normalizer
    exported(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    assert any("merges whatever gives a token" in note for note in read_manifest(tmp_path).notes) != whole


def test_llama_cpp_finds_phi_3s_spaces_by_the_name_of_the_model(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("<|endoftext|>"), AddedToken("<|user|>", rstrip=True)])
    exported(tmp_path / "one", tokenizer, rows=330)
    assert general_name("Phi3ForCausalLM", tmp_path / "one") == "PhiForCausalLM"  # whose "</s>" takes none
    path = tmp_path / "one" / "tokenizer.json"
    fields = json.loads(path.read_text())
    for added in fields["added_tokens"]:
        added["rstrip"] = added["content"] in ("</s>", "<|user|>")
    path.write_text(json.dumps(fields))
    assert general_name("Phi3ForCausalLM", tmp_path / "one") == "phi-3"
    assert not any("take beside them" in note for note in tokenizer_notes(tmp_path / "one"))


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(qat.ExportError, match="its tokenizer is a WordLevel, not BPE, and"):
        exported(tmp_path / "out", PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qat.ExportError, match="and the model's table 64 rows: give the tokenizer"):
        exported(tmp_path / "out", byte_level(), rows=64)
