from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from recipes.data import DataError, files
from recipes.data.files import check_text, files_below, pieces, pieces_of, read_text, require_file
from recipes.data.text import standard_library_documents

REFERENCE = Path(__file__).parent.parent / "recipes" / "reference"
# How published tokenizers split text: Llama 3, which takes up to three digits at once, and Qwen, which takes one.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, Any] = {
    "gpt2": None,  # the pattern of the reference tokenizer itself
    "llama": pre_tokenizers.Split(Regex(LLAMA), "isolated"),
    "qwen": pre_tokenizers.Split(Regex(LLAMA.replace("{1,3}", "")), "isolated"),
    "white space": pre_tokenizers.WhitespaceSplit(),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "PIECE", 64)
    return 64


def lines(seed: int) -> str:
    """Lines of words, blank lines, indented lines, long ones and words beyond ASCII."""
    draw = random.Random(seed)
    words = ["word", "caf\u00e9", "\u4e2d\u6587", "x" * 90, "  ", "\n", "\n\n", "\n    ", ". ", "1,2"]
    return "".join(draw.choice(words) + draw.choice(["", " ", "\n"]) for _ in range(200))


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_whole_text(seed: int, short: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text := lines(seed), encoding="utf-8")
    found = list(pieces(tmp_path / "a.txt"))
    assert "".join(found) == text
    assert max(map(len, found)) <= short
    assert found == list(pieces_of(text))


def test_pieces_of_white_space_are_left_out(short: int) -> None:
    assert [piece.strip() for piece in pieces_of(" \n" * 500 + "a" + "\n" * 500)] == ["a"]
    assert list(pieces_of("")) == list(pieces_of(" ")) == []


def test_a_piece_ends_between_two_words_at_a_line_end_or_else_before_a_space(short: int) -> None:
    assert [len(piece) for piece in pieces_of(("a" * 40 + "\n") * 3)] == [41, 41, 41]
    assert list(pieces_of("b" * 40 + " " + "c" * 40)) == ["b" * 40, " " + "c" * 40]
    assert list(pieces_of("d" * 40 + "\n  " + "e" * 40)) == ["d" * 40 + "\n", "  " + "e" * 40]
    assert [len(piece) for piece in pieces_of("f" * 130)] == [64, 64, 2]


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_have_the_tokens_of_the_whole_text(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 4000)
    documents = (document["text"] for document in standard_library_documents("evaluation"))
    texts = list(itertools.islice((text[:12_000] for text in documents if len(text) > 12_000), 5))
    tokenizer: Any = AutoTokenizer.from_pretrained(REFERENCE, trust_remote_code=False)
    if (pattern := SPLITS[split]) is not None:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, level])
    for text in texts:
        found = list(pieces_of(text))
        assert len(found) > 2
        tokens = tokenizer([text, *found], add_special_tokens=False)["input_ids"]
        assert list(itertools.chain(*tokens[1:])) == tokens[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\nthr\0ee", r"a\.txt' holds NUL in line 3: .* remove it"),
        ("one\ncaf\u00e9".encode("latin-1"), r"a\.txt' is not UTF-8 \(.* in line 1 or later\): save it as UTF-8"),
    ],
    ids=["NUL", "Latin-1"],
)
@pytest.mark.parametrize("read", [check_text, read_text, lambda path: list(pieces(path))], ids=["check", "read", "cut"])
def test_what_is_no_text_is_an_error(
    read: Callable[[Path], object], content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.txt")


def test_text_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(tmp_path / "a.txt") == "a\nb"
    with pytest.raises(DataError, match=r"a\.txt' has 7 bytes, and at most 6 are read: shorten it"):
        read_text(tmp_path / "a.txt", 6)


def test_files_below_a_folder(tmp_path: Path) -> None:
    for name in ("b.txt", "a.TXT", "c.png", ".d.txt", "deep/e.txt", ".git/f.txt", "g.txt/h.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "i.txt").symlink_to("b.txt")
    found = [file.relative_to(tmp_path).as_posix() for file in files_below(tmp_path, {".txt"})]
    assert found == ["a.TXT", "b.txt", "deep/e.txt", "g.txt/h.txt", "i.txt"]
    os.mkfifo(tmp_path / "deep" / "j.txt")
    assert len(files_below(tmp_path / "deep", {".png"})) == 0
    with pytest.raises(DataError, match=r"j\.txt' is a named pipe, no file: give a regular file, or remove it"):
        files_below(tmp_path, {".txt"})


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("/dev/zero", "is a device"),
        ("/", "is a folder"),
        ("/nowhere", "does not exist"),
        ("/" + "x" * 300, "cannot be"),
    ],
)
def test_what_is_no_file_is_an_error(name: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        require_file(Path(name))
