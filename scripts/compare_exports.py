"""Exports of many tiny models before and after a change: are they the same, byte for byte?

A redesign may move code, but not numbers. `write` prepares, trains, freezes and exports small seeded models (types,
targets, dtypes, activations, mixed, sharded, learned ranges) and keeps a hash of every file, the manifest, the
configuration and the training losses. `compare` holds two such results against each other. The script uses the public
interface alone and imports nothing of this repository but `qat`, so it runs against any checkout::

    PYTHONPATH=path/to/old/checkout python scripts/compare_exports.py write before.json
    python -m scripts.compare_exports write after.json
    python -m scripts.compare_exports compare before.json after.json --allow environment.qat

`--allow` names a field of the manifest (or everything below it, or a pattern) that may differ. Model cards are for
people: a changed one is reported, and is no difference. Results depend on the machine, so write both on one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

__all__ = ["CASES", "Case", "Comparison", "compare", "write"]

CARD = "README.md"
MANIFEST = "qat_manifest.json"
READ = ("config.json", "quanto_qmap.json")
"""Files that are kept as they are beside their hashes, so that a difference has a name."""
MACHINE = ("cpu_capability", "platform", "python", "threads")
"""Fields of the manifest's environment that say where an export was made."""


@dataclass(frozen=True)
class Case:
    """One model, and what happens to it."""

    model: str
    """A key of `MODELS`."""
    weights: str
    target: str
    dtype: str = "float32"
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the spec."""
    algorithm: str = "StraightThrough"
    """A class of `qat`, with ``/`` and its start where it has one."""
    steps: int = 0
    """Training steps before freezing."""
    autocast: bool = False
    """Whether these run under autocast in bfloat16."""
    export: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the export."""
    label: str = ""
    """What sets the case apart from others, for its name."""

    @property
    def name(self) -> str:
        parts = (self.model, self.weights, self.dtype, self.target, self.algorithm, self.label)
        return " ".join(part for part in parts if part and part != "StraightThrough")


# Sizes of each model, and its inputs: whole numbers below a bound, noise, or zeros of a shape.
MODELS: dict[str, Any] = yaml.safe_load("""
shared:
  body: &body
    {vocab_size: 96, hidden_size: 256, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 4,
     max_position_embeddings: 32}
  vision: &vision
    {hidden_size: 256, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 4, image_size: 16}
  ids: &ids {input_ids: [ids, 96, 2, 12]}
  heads: &heads {num_attention_heads: 2, attention_head_dim: 32, num_layers: 1}
  latents: &latents {hidden_states: [noise, 2, 4, 8, 8], timestep: [ids, 1000, 2]}
sequential: {inputs: {"": [noise, 6, 256]}}
wide: {inputs: {"": [noise, 3, 1024]}}  # more than one block of a CPU kernel
llama:
  transformers: LlamaForCausalLM
  sizes: {<<: *body, num_key_value_heads: 2, tie_word_embeddings: true}
  inputs: *ids
bert: {transformers: BertForSequenceClassification, sizes: {<<: *body, num_labels: 4}, inputs: *ids}
opt: {transformers: OPTForCausalLM, sizes: {<<: *body, ffn_dim: 96, word_embed_proj_dim: 128}, inputs: *ids}
t5:
  transformers: T5ForConditionalGeneration
  sizes: {vocab_size: 96, d_model: 160, d_kv: 32, d_ff: 96, num_layers: 1, num_heads: 4}
  inputs: {<<: *ids, decoder_input_ids: [ids, 96, 2, 5]}
vit: {transformers: ViTModel, sizes: *vision, inputs: {pixel_values: [noise, 2, 3, 16, 16]}}
flux:
  diffusers: FluxTransformer2DModel
  sizes:
    {num_attention_heads: 4, attention_head_dim: 64, num_layers: 1, num_single_layers: 1, patch_size: 1,
     in_channels: 16, joint_attention_dim: 160, pooled_projection_dim: 32, axes_dims_rope: [16, 24, 24]}
  inputs:
    {hidden_states: [noise, 2, 16, 16], encoder_hidden_states: [noise, 2, 7, 160], pooled_projections: [noise, 2, 32],
     timestep: [noise, 2], img_ids: [zeros, 16, 3], txt_ids: [zeros, 7, 3]}
sd3:
  diffusers: SD3Transformer2DModel
  sizes:
    {<<: *heads, sample_size: 8, in_channels: 4, out_channels: 4, joint_attention_dim: 160, pos_embed_max_size: 8,
     caption_projection_dim: 64, pooled_projection_dim: 48}
  inputs: {<<: *latents, encoder_hidden_states: [noise, 2, 6, 160], pooled_projections: [noise, 2, 48]}
dit:
  diffusers: DiTTransformer2DModel
  sizes: {<<: *heads, sample_size: 8, in_channels: 4, out_channels: 8, num_embeds_ada_norm: 10}
  inputs: {<<: *latents, class_labels: [ids, 10, 2]}
""")


def build(name: str) -> Any:
    """A model with seeded weights, none of them all zero: some start so where noise leaves."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    kind = MODELS[name]
    if "transformers" in kind:
        model_class = getattr(importlib.import_module("transformers"), kind["transformers"])
        model = model_class(model_class.config_class(**kind["sizes"]))
    elif "diffusers" in kind:
        model = getattr(importlib.import_module("diffusers"), kind["diffusers"])(**kind["sizes"])
    elif name == "wide":
        model = nn.Sequential(nn.Linear(1024, 272))
    else:
        layers = (nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 160, bias=False), nn.LayerNorm(160), nn.Linear(160, 12))
        model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def cases() -> Iterator[Case]:
    types = ("int8", "float8", "int4", "int2")
    for weights in types:
        yield Case("sequential", weights, "quanto", "float32")
        yield Case("llama", weights, "quanto", "bfloat16")
        yield Case("llama", weights, "transformers", "float16")
        yield Case("flux", weights, "diffusers", "bfloat16")
    yield Case("sequential", "int4", "quanto", "bfloat16")
    yield Case("sequential", "int8", "quanto", "float16")
    yield Case("bert", "int8", "transformers", "bfloat16")
    yield Case("bert", "int4", "quanto")
    yield Case("vit", "float8", "transformers")
    yield Case("vit", "int2", "quanto", "bfloat16")
    yield Case("opt", "int4", "transformers", "bfloat16")
    yield Case("opt", "int8", "quanto")
    yield Case("t5", "int8", "quanto", "bfloat16")
    yield Case("t5", "int4", "transformers", "bfloat16")
    yield Case("t5", "int4", "transformers", "float16")  # its wo is held in float32
    yield Case("flux", "int4", "quanto")
    yield Case("flux", "int8", "diffusers", "float16")
    yield Case("sd3", "int4", "diffusers", "bfloat16")
    yield Case("sd3", "int8", "quanto")
    yield Case("dit", "int2", "diffusers")
    yield Case("dit", "float8", "quanto", "float16")
    for activations in ("int8", "float8"):
        active = {"activations": activations}
        yield Case("sequential", "int8", "quanto", "bfloat16", active, steps=2, label=f"activations {activations}")
        yield Case("llama", "int4", "transformers", "float32", active, label=f"activations {activations}")
        yield Case("opt", "float8", "quanto", "bfloat16", active, label=f"activations {activations}")  # its relu
    inputs_only = {"activations": "int8", "quantize_outputs": False}
    yield Case("bert", "int8", "transformers", "bfloat16", inputs_only, steps=2, label="inputs only")
    mixed = {"exclude": ("*.k_proj",), "overrides": {"*.down_proj": "int8", "*.q_proj": "float", "*.o_proj": "int2"}}
    yield Case("llama", "int4", "transformers", "bfloat16", mixed, label="mixed")
    part = {"overrides": {"*.v_proj": {"weights": "int8", "activations": "int8"}}}
    yield Case("llama", "int4", "quanto", "bfloat16", part, label="activations of one")
    head = {"include": ("*_proj", "lm_head")}
    yield Case("llama", "int8", "transformers", "bfloat16", head, label="tied head")
    yield Case("llama", "int4", "quanto", "float32", head, "LearnedAffine/clip", 2, label="tied head")
    for model, target in (("llama", "transformers"), ("llama", "quanto"), ("flux", "diffusers")):
        sharded = {"max_shard_size": "100KB"}
        yield Case(model, "int4", target, "bfloat16", export=sharded, label="sharded")
    for weights in types:
        yield Case("llama", weights, "transformers", export={"float_grid": True}, label="float grid")
    yield Case("flux", "int8", "diffusers", export={"float_grid": True}, label="float grid")
    for algorithm in ("StraightThrough", "LearnedAffine/minmax", "LearnedAffine/clip"):
        for weights in types:
            dtype = "bfloat16" if weights in ("int4", "int8") else "float16"
            yield Case("sequential", weights, "quanto", dtype, {}, algorithm, 3, label="trained")
            yield Case("wide", weights, "quanto", "bfloat16", {}, algorithm, 2, label="trained")
        yield Case("llama", "int2", "transformers", "bfloat16", {}, algorithm, 2, autocast=True, label="trained")
        yield Case("flux", "int4", "diffusers", "bfloat16", {}, algorithm, 2, label="trained")


CASES: dict[str, Case] = {case.name: case for case in cases()}


def example(model: str, seed: int, dtype: Any) -> Any:
    """Seeded inputs: a mapping, or a tuple for a model whose argument has no name."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def make(kind: str, *shape: int) -> Any:
        if kind == "ids":
            return torch.randint(0, shape[0], shape[1:], generator=generator)
        return torch.randn(shape, generator=generator).to(dtype) if kind == "noise" else torch.zeros(shape)

    made = {name: make(*recipe) for name, recipe in MODELS[model]["inputs"].items()}
    return (made[""],) if "" in made else made


def _freeze(model: Any) -> None:
    """Freeze; some cases never run before, which newer versions ask about."""
    import qat

    allowed: dict[str, Any] = (
        {"allow_unreached": True} if "allow_unreached" in inspect.signature(qat.freeze).parameters else {}
    )
    qat.freeze(model, **allowed)


def run(case: Case, directory: Path) -> dict[str, Any]:
    """Carry out one case; its export lies in ``directory`` then."""
    import torch

    import qat

    model = build(case.model)
    name, _, start = case.algorithm.partition("/")
    algorithm = getattr(qat, name)(**({"start": start} if start else {}))
    spec = qat.QuantSpec(weights=case.weights, dtype=case.dtype, **case.spec)  # type: ignore[arg-type]
    qat.prepare(model, spec, algorithm=algorithm, target=case.target)
    batches = [example(case.model, seed, torch.float32) for seed in (1, 2)]
    if spec.activation_type is not None:
        qat.calibrate(model, batches)
    losses = train(model, batches, case)
    if spec.activation_type is not None and case.steps:
        qat.calibrate(model, batches)
    _freeze(model)
    inputs = example(case.model, 3, spec.torch_dtype)
    qat.export(model, directory, example_inputs=inputs, **case.export)
    return {"losses": losses, **read(directory)}


def train(model: Any, batches: list[Any], case: Case) -> list[str]:
    """A few steps towards noise; the losses as exact hexadecimal numbers."""
    import torch

    import qat

    model.train()
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, scale_lr=1e-2, weight_decay=0.1))
    losses = []
    for step in range(case.steps):
        batch = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            output = model(*batch) if isinstance(batch, tuple) else model(**batch)
        values = (output if isinstance(output, torch.Tensor) else output[0]).float()
        aim = torch.randn(values.shape, generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.mse_loss(values, aim)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()).hex())
    return losses


def read(directory: Path) -> dict[str, Any]:
    """What `compare` looks at in an export."""
    found = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    manifest = json.loads(found.pop(MANIFEST).read_text(encoding="utf-8"))
    manifest.pop("digest", None)
    for name in MACHINE:
        manifest["environment"].pop(name, None)
    return {
        "files": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()},
        "manifest": manifest,
        "contents": {name: json.loads(found[name].read_text(encoding="utf-8")) for name in READ if name in found},
    }


def write(output: Path, names: Iterable[str]) -> None:
    """Run the cases and keep what they gave."""
    import torch

    import qat

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            results[name] = run(CASES[name], Path(folder) / str(number))
            print(f"{name:60} {len(results[name]['files'])} files", flush=True)
    output.write_text(json.dumps({"qat": str(qat.__file__), "cases": results}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(results)} cases with {qat.__file__}: {output}")


@dataclass(frozen=True)
class Comparison:
    """What differs between two results, by case."""

    rows: Mapping[str, str]
    """Every case with one line about it."""
    differences: tuple[str, ...]
    allowed: tuple[str, ...]
    """Differences that were allowed, and changed model cards."""


def compare(before: Mapping[str, Any], after: Mapping[str, Any], allow: Iterable[str] = ()) -> Comparison:
    """Hold the results of two runs against each other; ``allow`` names fields of the manifest that may differ."""
    patterns = [pattern for name in allow for pattern in (name, f"{name}.*")]
    rows: dict[str, str] = {}
    differences, allowed = [], []
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            rows[name] = f"only {'after' if name in after else 'before'}"
            differences.append(f"{name}: {rows[name]}")
            continue
        faults = [
            (part, path, old, new)
            for part in ("files", "contents", "manifest", "losses")
            for path, old, new in changes(before[name][part], after[name][part])
        ]
        unwanted = 0
        for part, path, old, new in faults:
            text = f"{name}: {part}: {path}: {shortened(old)} -> {shortened(new)}"
            permitted = part == "manifest" and any(fnmatchcase(path, pattern) for pattern in patterns)
            if permitted or (part == "files" and path == CARD):
                allowed.append(text)
            else:
                differences.append(text)
                unwanted += 1
        rows[name] = f"{unwanted} differ" if unwanted else "equal" + (", but for what may differ" if faults else "")
    return Comparison(rows, tuple(differences), tuple(allowed))


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The paths below which two parsed documents differ, with both values; None where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from changes(*pair, f"{path}.{index}" if path else str(index))
    elif type(old) is not type(new) or old != new:
        yield path or "all", old, new


def shortened(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run the cases and keep what they gave")
    writing.add_argument("output", type=Path)
    writing.add_argument("--only", nargs="*", default=[""], help="parts of case names; default all")
    comparing = commands.add_parser("compare", help="hold two results against each other")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--allow", action="append", default=[], metavar="FIELD", help="may differ in the manifest")
    options = parser.parse_args(arguments)
    if options.command == "write":
        write(options.output, [name for name in CASES if any(part in name for part in options.only)])
        return 0
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after))
    print(f"before: {before['qat']}\nafter:  {after['qat']}\n")
    found = compare(before["cases"], after["cases"], options.allow)
    for name, row in found.rows.items():
        print(f"{name:60} {row}")
    for title, lines in (("allowed", found.allowed), ("differences", found.differences)):
        print("\n".join([f"\n{len(lines)} {title}", *(f"  {line}" for line in lines)]))
    return 1 if found.differences else 0


if __name__ == "__main__":
    sys.exit(main())
