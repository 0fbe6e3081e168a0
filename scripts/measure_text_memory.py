"""Measure what it takes to turn one text file into blocks of tokens: seconds, and the most memory of the process.

    python -m scripts.measure_text_memory 5 50 500 [--tokenizer words] [--folder /tmp]

Each size, in megabytes, is a run of its own: a process that does nothing else. The text is the source of Python's
standard library, again and again, in one file. The tokenizer is that of `recipes/reference`, or with ``words`` one that
looks words up in a dict, for sizes at which the other would take hours.

The most memory is what the kernel counts as resident (VmHWM). It includes pages of mapped files, of which the kernel
keeps as many as there is room for, and takes them back at need. So the process's own memory (RssAnon, every 20 ms)
has a column too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from recipes.data.text import TextData, load_blocks, standard_library_documents

REFERENCE = Path(__file__).parents[1] / "recipes" / "reference"


def write(path: Path, size: int) -> None:
    """Write a text of about so many bytes."""
    texts = [document["text"] for document in standard_library_documents("train")]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for text in texts:
                written += len(text.encode())
                file.write(text)
                if written >= size:
                    return


class WordTokenizer:
    """One token for each of the 50,000 most frequent words of the text, and one for all others."""

    eos_token_id, sep_token_id, bos_token_id = 0, None, None

    def __init__(self) -> None:
        counts: Counter[str] = Counter()
        for document in standard_library_documents("train"):
            counts.update(document["text"].split())
        self._tokens = {word: number for number, (word, _) in enumerate(counts.most_common(50_000), 2)}

    def get_vocab(self) -> dict[str, int]:
        """The words, and their tokens."""
        return self._tokens

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """Split and look up."""
        return {"input_ids": [[self._tokens.get(word, 1) for word in text.split()] for text in texts]}


def measure(path: Path, kind: str) -> None:
    """Make the blocks, and print a row of the table."""
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained
    tokenizer: Any = WordTokenizer() if kind == "words" else load(REFERENCE, trust_remote_code=False)
    before, start, done, own = resident("VmHWM"), time.perf_counter(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.02):
            own[0] = max(own[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    train, evaluation = load_blocks(TextData(source=str(path), cache_dir=path.parent / "cache"), tokenizer)
    done.set()
    watcher.join()
    made, seconds = resident("VmHWM"), time.perf_counter() - start
    size = path.stat().st_size / 1e6
    print(
        f"| {size:,.0f} MB | {kind} | {len(train) + len(evaluation):,} | {seconds:,.0f} s | {before:,.0f} MB | "
        f"{made:,.0f} MB | {own[0]:,.0f} MB |"
    )


def resident(what: str) -> float:
    """What the kernel says of this process's memory, in megabytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", nargs="*", type=int, default=[5, 50])
    parser.add_argument("--tokenizer", choices=["reference", "words"], default="reference")
    parser.add_argument("--folder", help="where text and blocks are written; it needs three times the size")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file is not None:
        measure(arguments.file, arguments.tokenizer)
        return
    print("| text | tokenizer | blocks | time | memory before | most memory | of its own |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            file = Path(folder) / "text.txt"
            write(file, size * 10**6)
            command = [sys.executable, "-m", "scripts.measure_text_memory", "--file", str(file)]
            subprocess.run([*command, "--tokenizer", arguments.tokenizer], check=True)


if __name__ == "__main__":
    main()
