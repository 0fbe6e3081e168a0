"""Damage small exports of every target at random, and see what `qat.verify` and `qat.load` make of each.

A mutation changes one copy: bits, lengths, headers, fields of JSON, names, links, special files, extra and missing
files. In half of them the manifest is written anew afterwards, with hashes and sizes that fit, as an attacker would.
Each is judged in a forked process, with a limit of time and of memory. Files that stand outside the directory are
watched by the kernel (inotify), so that no read of them goes unseen. Prints a table::

    python -m scripts.mutate_exports --count 10000 --seed 0 [--only quanto-int8]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import qat
from qat.tensors import digest, inner_tensors
from qat.verification.outputs import compute_outputs
from scripts.mutations import MUTATIONS, reseal
from tests.exports import IDS, flux_inputs, frozen, small_flux, small_llama

_SECONDS = 60.0
_ADDRESSES = 8 << 30  # bytes that a process may map beyond what it begins with
_SLACK = 32 << 20  # bytes by which two loads of one directory differ


def _layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 10))


_TEXT = functools.partial(small_llama, intermediate_size=64), {"input_ids": IDS}
_PICTURES = small_flux, flux_inputs("float32")
_ROWS = _layers, (torch.randn(3, 128, generator=torch.Generator().manual_seed(0)),)
_SHARDS = {"max_shard_size": "60KB"}
_ACTIVE = {"weights": "int8", "activations": "int8"}
_MIXED = {"weights": "int4", "overrides": {"*.down_proj": "float8"}}


class Recipe(NamedTuple):
    """How a small export is made."""

    target: str
    model: tuple[Callable[[], Any], Any]
    spec: Mapping[str, Any]
    options: Mapping[str, Any] = {}


RECIPES: dict[str, Recipe] = {
    "quanto-int8": Recipe("quanto", _TEXT, {"weights": "int8"}),
    "quanto-float8-active": Recipe("quanto", _TEXT, {"weights": "float8", "activations": "float8"}),
    "quanto-int4-shards": Recipe("quanto", _TEXT, {"weights": "int4"}, _SHARDS),
    "quanto-int2": Recipe("quanto", _TEXT, {"weights": "int2"}),
    "plain-int8": Recipe("quanto", _ROWS, {"weights": "int8"}),
    "transformers-int8-active": Recipe("transformers", _TEXT, _ACTIVE),
    "transformers-int4-shards": Recipe("transformers", _TEXT, {"weights": "int4", "dtype": "bfloat16"}, _SHARDS),
    "transformers-mixed": Recipe("transformers", _TEXT, _MIXED),
    "transformers-grid": Recipe("transformers", _TEXT, {"weights": "int8"}, {"float_grid": True}),
    "diffusers-int8": Recipe("diffusers", _PICTURES, {"weights": "int8"}),
    "diffusers-int4-shards": Recipe("diffusers", _PICTURES, {"weights": "int4"}, {"max_shard_size": "300KB"}),
    "compressed-int8-active": Recipe("compressed-tensors", _TEXT, _ACTIVE),
    "compressed-float8": Recipe("compressed-tensors", _TEXT, {"weights": "float8"}),
    "compressed-int4": Recipe("compressed-tensors", _TEXT, {"weights": "int4_g32"}),
    "gguf-q8_0": Recipe("gguf", _TEXT, {"weights": "q8_0"}),
    "gguf-q4_1": Recipe("gguf", _TEXT, {"weights": "q4_1"}),
    "gguf-diffusers-q4_0": Recipe("gguf-diffusers", _PICTURES, {"weights": "q4_0"}),
}


class Case(NamedTuple):
    """A whole export, what a load of it gives, and the memory that this takes."""

    name: str
    directory: Path
    recipe: Recipe
    state: str
    peak: int


class Result(NamedTuple):
    """What came of one mutation."""

    case: str
    mutation: str
    forged: bool
    outcome: str
    detail: str


OUTCOMES = ("caught", "equal", "left to verify", "silent", "crash", "hang", "foreign", "outside", "memory")
GOOD = OUTCOMES[:3]


def _arguments(recipe: Recipe) -> dict[str, Any]:
    return {"model": _layers()} if recipe.model is _ROWS else {}


def _state(recipe: Recipe, model: nn.Module) -> str:
    """A digest of all that a loaded model holds and computes."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    parts = [f"{name} {part.dtype} {digest(part)}" for name, tensor in named for part in inner_tensors(tensor)]
    try:
        outputs = compute_outputs(model, recipe.model[1])
    except Exception as error:  # another model's, behind a manifest that declares it
        return f"does not run: {error}"
    return "\n".join([type(model).__name__, *sorted(parts), *(f"{key} {digest(outputs[key])}" for key in outputs)])


def _answers(directory: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """What `qat.verify` and `qat.load` say, and the memory that both took."""
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for verb in (qat.verify, qat.load):
        try:
            found: Any = verb(directory, **_arguments(recipe))
            yield {"verb": verb.__name__, "said": "passed", "state": verb is qat.load and _state(recipe, found)}
        except qat.QatError as error:
            yield {"verb": verb.__name__, "said": "caught", "text": str(error)}
        except BaseException as error:
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
            yield {"verb": verb.__name__, "said": "foreign", "text": text}
    yield {"peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024}


def in_child(directory: Path, recipe: Recipe, seconds: float = _SECONDS) -> tuple[list[dict[str, Any]], str]:
    """The answers of a forked process, and how it ended: "", "hang" or "crash"."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + _ADDRESSES,) * 2)
        with contextlib.suppress(BaseException):
            for answer in _answers(directory, recipe):
                os.write(write, json.dumps(answer).encode() + b"\n")
        os._exit(0)
    os.close(write)
    said, end, deadline = b"", "", time.monotonic() + seconds
    while not end:
        if not select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            end = "hang"
        elif part := os.read(read, 1 << 16):
            said += part
        else:
            break
    os.close(read)
    status = os.waitpid(child, 0)[1]
    answers = [json.loads(line) for line in said.splitlines()]
    if not end and (status or not answers or "peak" not in answers[-1]):
        end = f"crash ({status})"
    return answers, end


class Watch:
    """Tells whether anything in a folder was opened, as the kernel saw it."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK)
        if self._libc.inotify_add_watch(self._handle, os.fsencode(folder), 0x21) < 0:  # IN_ACCESS | IN_OPEN
            raise OSError(ctypes.get_errno(), "inotify")

    def seen(self) -> bool:
        """Whether there was an event since the last question."""
        try:
            return bool(os.read(self._handle, 1 << 16))
        except BlockingIOError:
            return False


def make_cases(names: Sequence[str], folder: Path) -> Iterator[Case]:
    """Export each, and load it once in this process, so that all libraries are warm."""
    for name in names:
        recipe, directory = RECIPES[name], folder / name
        build, inputs = recipe.model
        model = frozen(build(), recipe.target, **{"dtype": "float32", **recipe.spec})
        qat.export(model, directory, example_inputs=inputs, **recipe.options)
        for answer in _answers(directory, recipe):
            if answer.get("said", "passed") != "passed":
                raise SystemExit(f"{name}: the export itself does not load: {answer}")
        answers, _ = in_child(directory, recipe)
        yield Case(name, directory, recipe, answers[1]["state"], answers[2]["peak"])


def judged(case: Case, directory: Path, watch: Watch, forged: bool) -> tuple[str, str]:
    """The outcome of one mutated directory, and what tells more of it."""
    watch.seen()
    answers, end = in_child(directory, case.recipe)
    verify, load = (*answers, {}, {})[:2]
    if end:
        return end.split()[0], f"{end} after {[answer.get('verb') for answer in answers]}"
    for answer in (verify, load):
        if answer["said"] == "foreign":
            return "foreign", f"{answer['verb']}: {answer['text']}"
    if watch.seen():
        return "outside", f"verify: {verify}, load: {load}"
    size = sum(path.stat().st_size for path in case.directory.iterdir())
    if (peak := answers[2]["peak"]) > case.peak + 2 * size + _SLACK:
        return "memory", f"{peak >> 20} MB, {case.peak >> 20} MB for the whole export of {size >> 10} kB: {answers[:2]}"
    same = load.get("state") == case.state
    if load["said"] == "passed" and not same:
        hidden = verify["said"] == "passed" or not forged
        return "silent" if hidden else "left to verify", f"verify {verify['said']}, load gives other numbers"
    if verify["said"] == "passed" and load["said"] == "passed":
        return "equal", ""
    return "caught", f"{verify.get('text', 'verify passed')}\n{load.get('text', 'load passed')}"


def mutate(cases: Sequence[Case], count: int, seed: int, folder: Path) -> Iterator[Result]:
    """Make so many mutations, and judge each."""
    outside, copy = folder / "outside", folder / "copy"
    outside.mkdir()
    watch, draw = Watch(outside), random.Random(seed)
    for number in range(count):
        case, name = cases[number % len(cases)], draw.choice(sorted(MUTATIONS))
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(case.directory, copy)
        for path in outside.iterdir():
            path.unlink()
        told = MUTATIONS[name](copy, draw, outside)
        forged = draw.random() < 0.5
        if forged:
            reseal(copy)
        outcome, detail = judged(case, copy, watch, forged)
        yield Result(case.name, f"{name}: {told}", forged, outcome, detail)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print what is not good, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    given = parser.parse_args(arguments)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begun, counts = time.monotonic(), collections.Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as name:
        cases = list(make_cases(given.only, Path(name)))
        for result in mutate(cases, given.count, given.seed, Path(name)):
            counts[result.mutation.partition(":")[0], result.outcome] += 1
            if result.outcome not in GOOD:
                print(
                    f"{result.outcome}: {result.case}, {result.mutation}, forged={result.forged}\n  {result.detail}",
                    flush=True,
                )
    kinds = sorted({kind for kind, _ in counts})
    rows = [[kind, *(counts[kind, outcome] for outcome in OUTCOMES)] for kind in kinds]
    rows.append(["all", *(sum(counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES)])
    lines = ["| mutation | " + " | ".join(OUTCOMES) + " |", "|---|" + "---:|" * len(OUTCOMES)]
    table = "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
    print(f"{table}\n\n{given.count} mutations of {len(cases)} exports in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
