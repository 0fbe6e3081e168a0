"""GGUF files that were damaged, or changed behind forged hashes: `qat.verify` and `qat.load` find it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import qat
from tests.exports import forge_files
from tests.gguf_files import flipped, forge, rewritten
from tests.gguf_models import exported
from tests.helpers import tiny_model


@pytest.mark.parametrize(
    ("tensor", "byte", "finds"),
    [
        ("blk.0.ffn_up.weight", 5, "model.layers.0.mlp.up_proj: codes, weight differ"),
        ("blk.1.attn_k.weight", 0, "model.layers.1.self_attn.k_proj: scale, weight differ"),
        ("blk.1.attn_q.weight", 2, "model.layers.1.self_attn.q_proj: shift, weight differ"),
        ("output_norm.weight", 2, "model.norm.weight differs from what was exported"),
        ("token_embd.weight", 0, "model.embed_tokens.weight differs from what was exported"),
    ],
)
def test_a_changed_byte_is_found_behind_forged_hashes(tmp_path: Path, tensor: str, byte: int, finds: str) -> None:
    exported(tmp_path)
    content = flipped(tmp_path, tensor, byte)
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(qat.VerifyError, match=r"model.gguf has another content \(sha256\)"):
        qat.verify(tmp_path)
    forge(tmp_path, content)
    with pytest.raises(qat.VerifyError, match=finds):
        qat.verify(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_found_behind_forged_hashes(tmp_path: Path, share: float) -> None:
    exported(tmp_path)
    content = (tmp_path / "model.gguf").read_bytes()
    forge(tmp_path, content[: int(share * len(content))])
    with pytest.raises(qat.VerifyError, match=r"model\.gguf in .* is not a whole GGUF file"):
        qat.verify(tmp_path)
    with pytest.raises(qat.LoadError, match="is not a whole GGUF file"):
        qat.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "finds"),
    [
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_up.weighs", r"blk.0.ffn_up.weighs is unexpected"),
        (b"general.architecture", b"general.architecturf", r"does not say where its tensors lie"),
        (b"llama.attention.head_count_kv", b"llama.attention.head_count_kw", r"does not say where its tensors lie"),
    ],
    ids=["tensor", "architecture", "heads"],
)
def test_other_metadata_is_found_behind_forged_hashes(tmp_path: Path, old: bytes, new: bytes, finds: str) -> None:
    exported(tmp_path)
    forge(tmp_path, (tmp_path / "model.gguf").read_bytes().replace(old, new))
    with pytest.raises(qat.VerifyError, match=finds):
        qat.verify(tmp_path)


def test_each_field_of_the_metadata_is_that_of_the_configuration(tmp_path: Path) -> None:
    """Nothing that transformers loads depends on it, and all that llama.cpp computes does."""
    exported(tmp_path, tiny_model("llama", rope_theta=5000.0))
    rewritten(tmp_path, lambda fields: None)
    assert "metadata" in {check.name for check in qat.verify(tmp_path).checks}
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    kept = {key: (field.contents(), field.types[0], None) for key, field in fields.items() if key[:5] != "GGUF."}
    for name in ("general.architecture", "llama.block_count", "llama.attention.head_count"):
        del kept[name]  # by which tensors are found
    assert len(kept) == 15
    for name, (value, kind, _) in kept.items():
        other = "other" if kind == gguf.GGUFValueType.STRING else value + 2
        rewritten(tmp_path, lambda fields: fields.update(kept | {name: (other, kind, None)}))  # noqa: B023
        with pytest.raises(qat.VerifyError, match=rf"{name} of model.gguf is|where its tensors lie"):
            qat.verify(tmp_path)
    rewritten(tmp_path, lambda fields: fields.update(kept))
    assert qat.verify(tmp_path).ok


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda fields: fields.pop("llama.rope.freq_base"), "freq_base of model.gguf is missing, and .* say 10000.0"),
        (
            lambda fields: fields.update({"llama.rope.scaling.factor": (2.0, gguf.GGUFValueType.FLOAT32, None)}),
            "factor of model.gguf is 2.0, and .* say missing",
        ),
        (
            lambda fields: fields.update({"llama.rope.freq_base": (10000.0, gguf.GGUFValueType.FLOAT64, None)}),
            "freq_base of model.gguf is 10000.0, and",
        ),
    ],
    ids=["missing", "more", "type"],
)
def test_missing_and_more_metadata_is_found(tmp_path: Path, change: Any, match: str) -> None:
    exported(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(qat.VerifyError, match=match):
        qat.verify(tmp_path)


def edit_metadata(directory: Path, key: str, value: Any) -> None:
    """Write another value over one of the metadata, with the file's hash in the manifest."""
    reader = gguf.GGUFReader(directory / "model.gguf", "r+")
    field = reader.fields[key]
    part = field.parts[field.data[-1]]
    part[:] = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
    reader.data.flush()
    forge(directory, (directory / "model.gguf").read_bytes())


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.head_count_kv"])
@pytest.mark.parametrize("value", [0, 3, 8, 2**32 - 1])
def test_a_count_that_fits_no_tensor_is_refused(tmp_path: Path, key: str, value: int) -> None:
    exported(tmp_path)
    edit_metadata(tmp_path, f"llama.{key}", value)
    with pytest.raises(qat.VerifyError):
        qat.verify(tmp_path)
    if key != "block_count" or value in (0, 2**32 - 1):
        with pytest.raises(qat.LoadError, match=r"does not say where its tensors lie"):
            qat.load(tmp_path)


@pytest.mark.parametrize("old", [b"general.architecture", b"llama.attention.head_count"])
@pytest.mark.parametrize("kind", [6, 7], ids=["float", "bool"])
def test_metadata_of_another_kind_is_an_error_of_ours(tmp_path: Path, old: bytes, kind: int) -> None:
    exported(tmp_path)
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    at = content.index(struct.pack("<Q", len(old)) + old) + 8 + len(old)
    content[at : at + 4] = struct.pack("<I", kind)
    forge(tmp_path, bytes(content))
    with pytest.raises(qat.VerifyError):
        qat.verify(tmp_path)
    with pytest.raises(qat.LoadError):
        qat.load(tmp_path)


@pytest.mark.parametrize("names", [("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"), ("blk.0.attn_q.weight",) * 2])
def test_tensors_that_do_not_follow_each_other_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """Two of equal shape in each other's place, or one that lies where another one is: llama.cpp reads neither."""
    exported(tmp_path)
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    first, second = (next(t for t in reader.tensors if t.name == name).field.parts[-1] for name in names)
    kept = first.copy()
    first[:] = second if first is not second else 0
    second[:] = kept if first is not second else 0
    reader.data.flush()
    forge(tmp_path, (tmp_path / "model.gguf").read_bytes())
    for verb in (qat.load, qat.verify):
        with pytest.raises(qat.QatError, match=r"begins at byte \d+ instead of \d+"):
            verb(tmp_path)


def test_a_broken_tie_of_quantized_tables_is_found(tmp_path: Path) -> None:
    exported(
        tmp_path, tiny_model("llama", tie_word_embeddings=True), overrides={"*embed_tokens": "q8_0", "lm_head": "q8_0"}
    )
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": False}))
    forge_files(tmp_path)
    with pytest.raises(qat.VerifyError, match="lm_head"):
        qat.verify(tmp_path)


@pytest.mark.parametrize(
    ("place", "form", "value"),
    [
        (0, "<I", 0),
        (4, "<I", 9),
        (8, "<Q", 1 << 60),
        (16, "<Q", 1 << 60),
        (24, "<Q", (1 << 64) - 1),
        (24, "<Q", 1 << 40),
    ],
    ids=["magic", "version", "tensors", "fields", "longest name", "long name"],
)
def test_a_header_that_tells_of_more_than_the_file_has(tmp_path: Path, place: int, form: str, value: int) -> None:
    exported(tmp_path)
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    struct.pack_into(form, content, place, value)
    forge(tmp_path, bytes(content))
    for verb in (qat.verify, qat.load):
        with pytest.raises(qat.QatError, match=r"model\.gguf in .* is not a whole GGUF file"):
            verb(tmp_path)


@pytest.mark.parametrize("kind", [8, 9, 4, 77], ids=["texts", "arrays", "numbers", "unknown"])
def test_an_array_without_end(tmp_path: Path, kind: int) -> None:
    """The package gguf would read 2^40 elements of nothing from the end of the file."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, kind, 1 << 40)
    exported(tmp_path)
    forge(tmp_path, header)
    with pytest.raises(qat.VerifyError, match="is not a whole GGUF file"):
        qat.verify(tmp_path)
