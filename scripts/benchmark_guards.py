"""What the numerical guards cost, and what they find in healthy runs; docs/results/guards.md has the results.

    python -m scripts.benchmark_guards cost [--device cuda] [--models reference 100m]
    python -m scripts.benchmark_guards healthy

``cost`` times optimizer steps, the question before each of them, and a look at all layers. ``healthy`` trains the
reference model on this repository's text with many types and algorithms, and prints the largest of each statistic.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qat
from qat.training.guards import Guard, NumericalGuards

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "recipes" / "reference"
SHAPES: dict[str, dict[str, Any]] = {
    "100m": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 8192},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32768},
}
ALGORITHMS: dict[str, qat.Algorithm] = {
    "straight_through": qat.StraightThrough(),
    "learned": qat.LearnedAffine(),
    "automatic": qat.Automatic(start="clip"),
    "dual_lsq": qat.DualLSQ(),
    "clipping": qat.LearnedClipping(),
}


def build(name: str, device: str) -> Any:
    if name == "reference":
        model: Any = LlamaForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32, trust_remote_code=False)
        return model.to(device)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=12 if name == "100m" else 16, **SHAPES[name]))


class Run:
    """A prepared model in training."""

    def __init__(self, model: Any, batches: Iterator[Tensor], settings: NumericalGuards, lr: float = 1e-4) -> None:
        self.model, self.batches, self.steps = model.train(), batches, 0
        groups = qat.parameter_groups(model, lr=lr)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=next(model.parameters()).is_cuda)
        self.guard = Guard(settings, model, lambda: self.steps)

    def step(self, guarded: bool = True, clock: Callable[[], float] = time.perf_counter) -> float:
        """One step; returns the seconds of the question before it, where the clock is that of a CPU."""
        x = next(self.batches)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = self.model(input_ids=x, labels=x).loss
        if guarded:
            self.guard.note_loss(loss)
        loss.backward()
        begin = clock()
        if guarded:
            self.guard.before_optimizer(self.parameters)
        took = clock() - begin
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return took


def prepared(model: nn.Module, types: str, algorithm: qat.Algorithm, batches: Iterator[Tensor]) -> nn.Module:
    weights, _, activations = types.partition("_")
    given = {"weights": weights, "activations": activations or None}
    qat.prepare(model, qat.QuantSpec.model_validate(given), algorithm=algorithm, target="transformers")
    if activations:
        qat.calibrate(model, [{"input_ids": next(batches)} for _ in range(4)])
    return model


def random_batches(vocabulary: int, device: str, rows: int, length: int) -> Iterator[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    while True:
        yield torch.randint(vocabulary, (rows, length), generator=generator, device=device)


def cost(name: str, types: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and of the guards; on a GPU of whole blocks of steps, with and without them."""
    model, cuda = build(name, options.device), options.device == "cuda"
    batches = random_batches(model.config.vocab_size, options.device, options.rows, options.length)
    run = Run(prepared(model, types, qat.LearnedAffine(start="minmax"), batches), batches, NumericalGuards())
    clock = time.perf_counter if cuda else time.process_time

    def timed(action: Callable[[], Any]) -> float:
        if cuda:
            torch.cuda.synchronize()
        begin = clock()
        action()
        if cuda:
            torch.cuda.synchronize()
        return clock() - begin

    run.guard.begin()
    run.step(), run.step()
    found: dict[bool, list[float]] = {True: [], False: []}
    asked, looks, watched = [], [], []
    for _ in range(options.rounds):
        for guarded in (True, False):
            for _ in range(2 if cuda else 0):
                run.step(guarded)
            block = [0.0] * options.steps

            def steps(block: list[float] = block, guarded: bool = guarded) -> None:
                block[:] = [run.step(guarded, clock) for _ in block]

            found[guarded].append(timed(steps) / options.steps)
            asked += block if guarded else []
        run.steps = 99
        run.guard.before_step()
        watched.append(timed(run.step))
        looks.append(timed(run.guard.after_step))
    step = statistics.median(found[False])
    asking = statistics.median(found[True]) - step if cuda else statistics.median(asked)
    look = statistics.median(looks) + max(0.0, statistics.median(watched) - statistics.median(found[True]))
    return {
        "model": name,
        "types": types,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "step": step,
        "question": asking,
        "look": look,
        "share": (asking + look / 100) / step,
    }


def text_batches(rows: int = 4, length: int = 128) -> Iterator[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE, trust_remote_code=False)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // (rows * length) * rows * length].view(-1, rows, length)
    return itertools.cycle(blocks)


def healthy(types: str, algorithm: str, steps: int) -> dict[str, Any]:
    """The largest (of use the smallest, of drift the lowest) that any layer shows at any look."""
    batches = text_batches()
    model = prepared(build("reference", "cpu"), types, ALGORITHMS[algorithm], batches)
    run = Run(model, batches, NumericalGuards(every=steps // 2, log=True), lr=3e-4)
    run.guard.begin()
    worst: dict[str, float] = {}
    for _ in range(steps):
        run.guard.before_step()
        run.step()
        for name, value in run.guard.after_step().items():
            kind = name.rpartition("/")[2]
            part = "activation" if "/input/" in name or "/output/" in name else "weight"
            choose = min if kind in ("code_use", "drift") else max
            worst[f"{part} {kind}"] = choose(worst.get(f"{part} {kind}", value), value)
    return {"types": types, "algorithm": algorithm, "told": len(run.guard.state_dict()["told"]), **worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["cost", "healthy"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=["reference", *SHAPES], default=["reference", "100m"])
    parser.add_argument("--types", nargs="+", default=["int4", "int8_int8"], help="as int8, or int8_int8 for both")
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--rows", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block, or of a healthy run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.what == "cost":
        for name, types in itertools.product(options.models, options.types):
            print(json.dumps(cost(name, types, options)), flush=True)
        return
    for types, algorithm in itertools.product(options.types, options.algorithms):
        print(json.dumps(healthy(types, algorithm, options.steps)), flush=True)


if __name__ == "__main__":
    main()
