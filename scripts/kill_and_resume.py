"""Kill a recipe at random moments, start it again with the same command, and compare with a run without a break.

    python -m scripts.kill_and_resume causal_lm --kills 50 [--seed 0] [--folder /tmp/kills]

Each run is a process that is forked after the imports, which most kills would meet otherwise. Half of the kills come at
a random moment of the whole recipe, half at one after its first checkpoint. Models are small. The recipe is whole, but
its verification runs in the same process. All files of the export must be equal, byte for byte, and the table of
results too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import qat

RECIPES = Path(__file__).parents[1] / "recipes"
FIT = ["--optimization.steps", "60", "--optimization.batch-size", "4", "--optimization.warmup-steps", "1"]
FIT += [
    "--no-report",
    "--trainer.accelerator",
    "cpu",
    "--trainer.checkpoint-every",
    "4",
    "--optimization.average",
    "0.5",
]
OPTIONS: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "causal_lm": (
        ["reference", "AutoModelForCausalLM"],
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "attention_dropout": 0.1},
        ["--data.source", "../data/text", "--data.block-size", "16", "--data.evaluation-blocks", "8"],
    ),
    "sequence_classification": (
        ["reference_encoder", "AutoModelForSequenceClassification"],
        {"num_hidden_layers": 1, "hidden_dropout_prob": 0.1},
        ["--data.source", "../data/labels.csv", "--data.max-length", "16", "--new-head"],
    ),
    "image_classification": (
        ["reference_vit", "AutoModelForImageClassification"],
        {"num_hidden_layers": 1, "hidden_dropout_prob": 0.1},
        ["--data.source", "../data/classes", "--new-head"],
    ),
    "text_to_image": (
        ["reference_flux", "FluxTransformer2DModel"],
        {"num_single_layers": 1, "num_attention_heads": 2},
        ["--data.source", "../data/images", "--sampler-steps", "2", "--data.size", "16"],
    ),
}


def make_data(folder: Path) -> None:
    """Texts, labelled texts, and images of noise with captions and in folders by class."""
    draw, words = (
        np.random.default_rng(0),
        ["def", "class", "return", "if", "else", "for", "in", "import", "self", "x", "y", "z"],
    )
    lines = [" ".join(draw.choice(words, 24)) for _ in range(200)]
    for name in ("text", "images", "classes/a", "classes/b"):
        (folder / name).mkdir(parents=True)
    (folder / "text" / "text.txt").write_text("\n".join(lines))
    (folder / "labels.csv").write_text("\n".join(["text,label", *(f"{x},{'ab'[i % 2]}" for i, x in enumerate(lines))]))
    for number in range(20):
        image = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
        image.save(folder / "images" / f"{number:02}.png")
        (folder / "images" / f"{number:02}.txt").write_text(lines[number][:20])
        image.convert("L").resize((8, 8)).save(folder / "classes" / "ab"[number % 2] / f"{number}.png")


def make_model(source: str, kind: str, sizes: dict[str, Any], folder: Path) -> None:
    """A smaller model of the kind of a reference model, with its tokenizer or processor, or in its pipeline."""
    shutil.copytree(RECIPES / source, folder)
    torch.manual_seed(0)
    if kind.startswith("Auto"):
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.update(sizes)
        getattr(transformers, kind).from_config(config, trust_remote_code=False).float().save_pretrained(folder)
    else:
        import diffusers

        shutil.rmtree(folder / "transformer")
        described = json.loads((RECIPES / source / "transformer" / "config.json").read_text())
        getattr(diffusers, kind).from_config({**described, **sizes}).save_pretrained(folder / "transformer")


def start(recipe: Any, arguments: list[str], folder: Path) -> int:
    """Fork a process that runs the recipe in a folder, and return its id."""
    folder.mkdir(exist_ok=True)
    if child := os.fork():
        os.setpgid(child, child)  # here too, for a kill that comes before the child does it
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        recipe.main(arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def runs(child: int) -> bool:
    """Whether a process has not ended."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(child: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files_of(folder: Path) -> dict[str, bytes]:
    """What a run must leave: the files of its export, and its results."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    return files | {"results": (folder / "out-results.json").read_bytes()}


def main() -> int:
    """Run, and print a line for each kill and one of JSON for all; the number of runs that ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=OPTIONS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/kills"))
    given, more = parser.parse_known_args()
    root = given.folder.absolute() / given.recipe
    shutil.rmtree(root, ignore_errors=True)
    (source, kind), sizes, own = OPTIONS[given.recipe]
    make_data(root / "data")
    make_model(source, kind, sizes, root / "model")
    arguments = ["--model", "../model", "--output", "out", *own, *FIT, *more]
    recipe = importlib.import_module(f"recipes.{given.recipe}")
    for name in ("common.experiment", "common.comparison", "common.run"):  # what a recipe imports when it runs
        importlib.import_module(f"recipes.{name}")
    verify: Any = qat.verify
    vars(qat)["verify"] = lambda directory, **_: verify(directory)
    wanted: dict[str, bytes] = {}
    took, before = 0.0, wanted
    for number in range(2):  # the second has warm caches, and shows that runs repeat
        begun = time.monotonic()
        if code := end(start(recipe, arguments, root / f"whole{number}")):
            raise SystemExit(f"the whole run ended with {code}: {root / f'whole{number}' / 'log.txt'}")
        took, before = time.monotonic() - begun, wanted
        wanted = files_of(root / f"whole{number}")
    if wanted != before:
        raise SystemExit(f"two whole runs differ in {[name for name in wanted if wanted[name] != before.get(name)]}")
    draw, faults, resumed, ended = random.Random(given.seed), 0, 0, 0
    for number in range(given.kills):
        folder, moment = root / f"kill{number}", draw.uniform(0, took / (1 + 2 * (number % 2)))
        child = start(recipe, arguments, folder)
        while number % 2 and runs(child) and not any((folder / "out-checkpoints").glob("step-*.json")):
            time.sleep(0.01)
        time.sleep(moment)
        os.killpg(child, signal.SIGKILL)
        if end(child) == 0:
            ended += 1
        elif code := end(start(recipe, arguments, folder)):
            faults += 1
            print(f"kill {number} at {moment:.2f} s: started again it ended with {code}: {folder / 'log.txt'}")
            continue
        log, found = (folder / "log.txt").read_text(), files_of(folder)
        step = log.rpartition("going on from step ")[2].split(" ")[0] if "going on from step" in log else "none"
        resumed += step != "none"
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        faults += bool(other)
        since = "the first checkpoint" if number % 2 else "the start"
        print(f"kill {number}, {moment:.2f} s after {since}: went on from step {step}: {other or 'equal'}", flush=True)
        if not other:
            shutil.rmtree(folder)
    print(json.dumps({
        "recipe": given.recipe, "arguments": more, "kills": given.kills, "seed": given.seed, "ended_before": ended,
        "went_on_from_a_checkpoint": resumed, "other_ends": faults, "files": len(wanted), "seconds": round(took, 2),
    }))  # fmt: skip
    return faults


if __name__ == "__main__":
    sys.exit(bool(main()))
