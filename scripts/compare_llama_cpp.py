"""Exports of target `gguf` in llama.cpp: perplexity and greedy text beside ours, and its own quantization.

llama.cpp is built from the source package of llama-cpp-python, which pip downloads. Takes a C++ compiler and CMake,
and about half an hour of one core; a later run finds the programs in ``--work``::

    python -m scripts.compare_llama_cpp --work /tmp/llama --output docs/results/llama_cpp.json

For each type the reference model is exported twice: with ranges from data, and after training. Perplexity is that of
``llama-perplexity``: windows of 256 tokens, of which the second half counts. The same tokens go through `qat.load`'s
model in float32. llama.cpp rounds the inputs of a product to blocks of 8 bits, so the two differ. How much that alone
makes is seen on the same file with its weights as float32 (``dequantized``), where both compute in float.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from recipes.data.text import standard_library_documents
from scripts import _quality
from scripts._quality_problems import LanguageModel

REFERENCE = Path(__file__).parents[1] / "recipes" / "reference"
PROGRAMS = ("llama-perplexity", "llama-quantize", "llama-completion")
OPTIONS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF"
OPTIONS += " -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF"
WINDOW = 256
PROMPTS = ("def main(", "import os\n\n", "class Test", "    return ", '"""Read ')


def build(work: Path, package: str) -> Path:
    """The folder of llama.cpp's programs, which are built there if they are not."""
    folder = work / "build" / "bin"
    if all((folder / name).exists() for name in PROGRAMS):
        return folder
    work.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    tools = str(work / "tools")  # of the package's own set-up, without which pip does not even download it
    subprocess.run([*pip, "install", "--target", tools, "scikit-build-core[pyproject]"], check=True)
    download = [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(work), package]
    subprocess.run(download, check=True, env={"PYTHONPATH": tools, "PATH": "/usr/bin:/bin"})
    with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(work / "source", filter="data")
    source = next((work / "source").glob("*/vendor/llama.cpp"))
    subprocess.run(["cmake", "-B", work / "build", "-S", source, *OPTIONS.split()], check=True)
    subprocess.run(["cmake", "--build", work / "build", "-j2", "--target", *PROGRAMS], check=True)
    return folder


def run(program: Path, *arguments: Any) -> str:
    """What a program prints; its own words where it fails."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program.name} failed: {done.stderr[-1000:]}")
    return done.stdout + done.stderr


def perplexity(programs: Path, file: Path, text: Path) -> tuple[float, torch.Tensor]:
    """llama.cpp's perplexity of a text, and the tokens that it made of it, ``(windows, WINDOW)``."""
    logits = text.with_suffix(".logits")
    # The file of logits begins with eight letters, three numbers, and all tokens.
    said = run(
        programs / "llama-perplexity",
        "-m",
        file,
        "-f",
        text,
        "-c",
        WINDOW,
        "-b",
        WINDOW,
        "-ub",
        WINDOW,
        "-t",
        2,
        "--save-all-logits",
        logits,
    )
    with logits.open("rb") as stream:
        head = stream.read(20)
        context, _, windows = struct.unpack("3i", head[8:])
        tokens = struct.unpack(f"{context * windows}i", stream.read(4 * context * windows))
    logits.unlink()
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
    assert found is not None, said[-500:]
    return float(found[1]), torch.tensor(tokens).view(windows, context)


@torch.no_grad()
def our_perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    """The same of a model: the second half of each window counts."""
    first, losses = WINDOW // 2, []
    for rows in torch.split(tokens, 8):
        logits = model(input_ids=rows).logits[:, first:-1].float()
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, first + 1 :].flatten(), reduction="none")
        )
    return float(torch.cat(losses).double().mean().exp())


def frozen(weights: str, steps: int, rate: float, problem: LanguageModel) -> nn.Module:
    """The reference model with start ``best``, trained for ``steps`` towards itself, and frozen."""
    arm = _quality.ARMS["best"]
    run = _quality.Run("best", weights, None, steps, 0, rate, "float32")
    torch.manual_seed(0)
    model, groups, training = _quality.prepared(
        AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32, trust_remote_code=False), run, arm, problem
    )
    if steps:
        loss_of = _quality.distilled(model, problem.model, arm, problem)
        _quality.fit(model.train(), groups, problem.batches(0), steps, arm.decay, loss_of, training)
    else:
        inputs = [problem.inputs(batch) for batch in itertools.islice(problem.batches(1000), 16)]
        qat.calibrate(model, inputs)
    qat.freeze(model.eval())
    return model


def float_file(directory: Path, source: Path) -> None:
    """Write the float model as a GGUF file: the export ``source`` with the float weight of its one quantized layer."""
    import gguf

    reader = gguf.GGUFReader(source)
    weight = (
        AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32, trust_remote_code=False)
        .model.layers[0]
        .self_attn.o_proj.weight
    )
    writer = gguf.GGUFWriter(directory / "float.gguf", "llama")
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        plain = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        writer.add_tensor(tensor.name, tensor.data if plain else weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """What the model goes on with, the likeliest token each time."""
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(made[0, given["input_ids"].shape[1] :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/llama_cpp"), help="sources, programs and exports")
    parser.add_argument("--package", default="llama-cpp-python")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_1", "q4_0"])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--characters", type=int, default=120_000, help="of text that is judged")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    programs, work = build(arguments.work, arguments.package), arguments.work
    tokenizer: Any = AutoTokenizer.from_pretrained(REFERENCE, trust_remote_code=False)
    text = work / "text.txt"
    documents = [document["text"] for document in standard_library_documents("evaluation")]
    text.write_text("\n\n".join(documents)[-arguments.characters :], encoding="utf-8")
    problem = LanguageModel("cpu", 8)
    problem.target = "gguf"
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    one = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32, trust_remote_code=False)
    qat.prepare(one, qat.QuantSpec(weights="q8_0", include=("*.0.self_attn.o_proj",), dtype="float32"), target="gguf")
    qat.freeze(one)
    qat.export(one, work / "one", processor=tokenizer, overwrite=True)
    float_file(work, work / "one" / "model.gguf")
    theirs, tokens = perplexity(programs, work / "float.gguf", text)
    note(type="float", made="float", llama=theirs, ours=our_perplexity(problem.model, tokens), tokens=tokens.numel())
    for weights in arguments.types:
        stock = work / f"{weights}-stock.gguf"
        kept = ("--token-embedding-type", "f32", "--output-tensor-type", "f32")
        run(programs / "llama-quantize", "--pure", *kept, work / "float.gguf", stock, weights.upper(), 2)
        note(type=weights, made="llama-quantize", llama=perplexity(programs, stock, text)[0])
        for steps in (0, arguments.steps):
            directory = work / f"{weights}-{steps}"
            model: Any = frozen(weights, steps, arguments.rate, problem)
            qat.export(model, directory, processor=tokenizer, overwrite=True)
            served: Any = qat.load(directory)
            file, plain = directory / "model.gguf", work / "dequantized.gguf"
            run(programs / "llama-quantize", "--allow-requantize", file, plain, "F32", 2)
            theirs, tokens = perplexity(programs, file, text)
            same = []
            for prompt in PROMPTS:
                said = run(
                    programs / "llama-completion",
                    "-m",
                    file,
                    "-p",
                    prompt,
                    "-n",
                    32,
                    "--temp",
                    0,
                    "-no-cnv",
                    "--no-display-prompt",
                    "-t",
                    2,
                    "--no-warmup",
                    "--log-disable",
                ).removeprefix(prompt)
                wanted = greedy(served, tokenizer, prompt, 32)
                same.append(said.rstrip().startswith(wanted.rstrip()) or wanted.rstrip().startswith(said.rstrip()))
            note(
                type=weights,
                made=f"qat, {steps} steps",
                llama=theirs,
                dequantized=perplexity(programs, plain, text)[0],
                ours=our_perplexity(served, tokens),
                texts=f"{sum(same)} of {len(same)} equal",
            )
            shutil.rmtree(directory)
    if arguments.output is not None:
        arguments.output.write_text(
            json.dumps({"options": vars(arguments), "rows": rows}, indent=1, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
