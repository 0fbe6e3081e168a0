"""The comparison with llama.cpp: its own measures, and what it takes from programs, of which fakes stand here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import compare_llama_cpp
from tests.helpers import tiny_model


def program(folder: Path, name: str, *lines: str) -> Path:
    """A program that runs some lines of Python; ``option`` gives what follows an argument."""
    path = folder / name
    head = (f"#!{sys.executable}", "import struct, sys", "def option(name): return sys.argv[sys.argv.index(name) + 1]")
    path.write_text("\n".join((*head, *lines)) + "\n")
    path.chmod(0o755)
    return path


class Tokenizer:
    """A token for each letter."""

    eos_token_id = 0

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    def decode(self, numbers: torch.Tensor, **options: Any) -> str:
        return "".join(chr(number) for number in numbers.tolist() if number)


class Model:
    """It goes on with the same text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat((input_ids, torch.tensor([[ord(letter) for letter in self.text]])), dim=1)


def test_perplexity_is_that_of_the_second_half_of_each_window() -> None:
    model: Any = tiny_model("llama")
    tokens = torch.randint(0, 64, (3, compare_llama_cpp.WINDOW), generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for row in tokens:
            values = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            losses += [-values[at, row[at + 1]] for at in range(128, 255)]
    wanted = float(torch.stack(losses).mean().exp())
    assert compare_llama_cpp.our_perplexity(model, tokens) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("print('two lines\\nof text\\n')", 5),
        ("print('two lines\\nof text [end of text]\\n\\n')", 5),
        ("print('two lines\\n')", 0),
        ("print('two lines\\nof text and more\\n')", 0),
    ],
    ids=["equal", "end of text", "shorter", "longer"],
)
def test_texts_are_equal_as_a_whole(tmp_path: Path, said: str, wanted: int) -> None:
    program(tmp_path, "llama-completion", "print('a log', file=sys.stderr)", said)
    model, file = Model("two lines\nof text"), tmp_path / "model.gguf"
    assert compare_llama_cpp.equal_texts(tmp_path, file, model, Tokenizer()) == f"{wanted} of 5"


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    """llama.cpp prints none with its log off; no comparison may take that for equal."""
    program(tmp_path, "llama-completion", "assert '--log-disable' not in sys.argv", "print('\\n')")
    with pytest.raises(RuntimeError, match=r"llama-completion printed no text after .*, and ours is 'more'"):
        compare_llama_cpp.equal_texts(tmp_path, tmp_path / "model.gguf", Model("more"), Tokenizer())


def test_perplexity_and_tokens_are_those_of_the_program(tmp_path: Path) -> None:
    write = "open(option('--save-all-logits'), 'wb').write(b'_logits_' + struct.pack('3i4i', 2, 64, 2, 5, 6, 7, 8))"
    program(tmp_path, "llama-perplexity", write, "print('Final estimate: PPL = 8.5694 +/- 0.1', file=sys.stderr)")
    value, tokens = compare_llama_cpp.perplexity(tmp_path, tmp_path / "model.gguf", tmp_path / "text.txt")
    assert value == 8.5694
    assert tokens.tolist() == [[5, 6], [7, 8]]
    program(tmp_path, "llama-perplexity", write, "print('nan')")
    with pytest.raises(RuntimeError, match="llama-perplexity printed no final estimate: nan"):
        compare_llama_cpp.perplexity(tmp_path, tmp_path / "model.gguf", tmp_path / "text.txt")


def test_tokens_are_those_of_the_bytes_of_a_text(tmp_path: Path) -> None:
    program(tmp_path, "llama-tokenize", "print(list(open(option('-f'), 'rb').read()))")
    assert compare_llama_cpp.their_tokens(tmp_path, tmp_path / "model.gguf", "a\r\nü") == list("a\r\nü".encode())


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    made = program(tmp_path, "llama-quantize", "sys.exit('no such type')")
    with pytest.raises(RuntimeError, match=r"llama-quantize failed \(1\): no such type"):
        compare_llama_cpp.run(made, "q9_0")
