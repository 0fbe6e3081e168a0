"""Exports of target `gguf` in llama.cpp: perplexity, greedy text and tokens beside ours, and its own quantization.

llama.cpp is built from the source package of llama-cpp-python, which pip downloads. Takes a C++ compiler and CMake,
and about half an hour of one core; a later run finds the programs in ``--work``::

    python -m scripts.compare_llama_cpp --work /tmp/llama --output docs/results/llama_cpp.json

Three parts, each a list of rows (``--parts``):

- ``types``: of each type, the reference model with ranges from data, and after training.
- ``architectures``: a tiny random model of each, q8_0. Its weights are large, so that it is sure of some tokens.
- ``tokenizers``: tokens of texts, of a tiny tokenizer of each kind.

Perplexity is that of ``llama-perplexity``: windows of 256 tokens, of which the second half counts. The same tokens go
through `qat.load`'s model in float32. llama.cpp rounds the inputs of a product to blocks of 8 bits, so the two differ.
How much that alone makes is seen on the same file with its weights as float32 (``dequantized``), where both compute in
float.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from qat.hosts.gguf_tokenizer import SPLITS
from recipes.data.text import standard_library_documents
from scripts import _quality
from scripts._quality_problems import LanguageModel
from tests.gguf_models import ARCHITECTURES, TEXTS, byte_level, changed, metaspace, of_class, sentencepiece

Row: TypeAlias = dict[str, Any]

REFERENCE = Path(__file__).parents[1] / "recipes" / "reference"
PROGRAMS = ("llama-perplexity", "llama-quantize", "llama-completion", "llama-tokenize")
OPTIONS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF"
OPTIONS += " -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF"
WINDOW = 256
PARTS = ("types", "architectures", "tokenizers")
MORE_TEXTS = (
    " the cat",
    "  two spaces",
    "the  cat   sat    on",
    "Don't WE'LL they'Re",
    "x = [1, 22, 333, 4444]\n\n\tif x:\r\n    y()\n",
    "cat<s>hat <s> the",
    "\u65e5\u672c\u8a9e \U0001f600 na\u00efve \u0663\u0664",
)
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


def run(program: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """What a program prints: results, and apart from them its log; its own words where it fails."""
    command = [str(argument) for argument in (program, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{program.name} failed ({done.returncode}): {done.stderr[-1000:]}")
    return done


def perplexity(programs: Path, file: Path, text: Path) -> tuple[float, torch.Tensor]:
    """llama.cpp's perplexity of a text, and the tokens that it made of it, ``(windows, WINDOW)``."""
    logits = text.with_suffix(".logits")
    sizes = ("-c", WINDOW, "-b", WINDOW, "-ub", WINDOW, "-t", 2)
    done = run(programs / "llama-perplexity", "-m", file, "-f", text, *sizes, "--save-all-logits", logits)
    # The file of logits begins with eight letters, three numbers, and all tokens.
    with logits.open("rb") as stream:
        head = stream.read(20)
        context, _, windows = struct.unpack("3i", head[8:])
        tokens = struct.unpack(f"{context * windows}i", stream.read(4 * context * windows))
    logits.unlink()
    said = done.stdout + done.stderr
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
    if found is None:
        raise RuntimeError(f"llama-perplexity printed no final estimate: {said[-500:]}")
    return float(found[1]), torch.tensor(tokens).view(windows, context)


def dequantized(programs: Path, file: Path) -> Path:
    """The same file with float32 weights."""
    plain = file.parent.with_suffix(".gguf")  # beside an export, not in it
    run(programs / "llama-quantize", "--allow-requantize", file, plain, "F32", 2)
    return plain


def their_text(programs: Path, file: Path, prompt: str, count: int) -> str:
    """What llama.cpp goes on with, the likeliest token each time. Text goes through its log, which must be on."""
    options = ("-n", count, "--temp", 0, "-no-cnv", "--no-display-prompt", "--no-escape", "--no-warmup", "-t", 2)
    said = run(programs / "llama-completion", "-m", file, "-p", prompt, *options).stdout
    return said.removesuffix("\n\n").removesuffix(" [end of text]\n")


def their_tokens(programs: Path, file: Path, text: str) -> list[int]:
    """The numbers of the tokens that llama.cpp makes of a text."""
    path = file.parent.with_suffix(".txt")  # beside an export, not in it
    path.write_bytes(text.encode())
    numbers: list[int] = json.loads(run(programs / "llama-tokenize", "-m", file, "-f", path, "--ids").stdout)
    return numbers


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


def our_text(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """What the model goes on with, the likeliest token each time."""
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    new = made[0, given["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def equal_texts(programs: Path, file: Path, model: Any, tokenizer: Any, count: int = 32) -> str:
    """How many prompts give the same whole text."""
    equal = 0
    for prompt in PROMPTS:
        theirs, ours = their_text(programs, file, prompt, count), our_text(model, tokenizer, prompt, count)
        if ours and not theirs:
            raise RuntimeError(f"llama-completion printed no text after {prompt!r}, and ours is {ours!r}")
        equal += theirs == ours
    return f"{equal} of {len(PROMPTS)}"


def type_rows(programs: Path, work: Path, text: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """The reference model in each type."""
    tokenizer: Any = AutoTokenizer.from_pretrained(REFERENCE, trust_remote_code=False)
    problem = LanguageModel("cpu", 8)
    problem.target = "gguf"
    one = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32, trust_remote_code=False)
    qat.prepare(one, qat.QuantSpec(weights="q8_0", include=("*.0.self_attn.o_proj",), dtype="float32"), target="gguf")
    qat.freeze(one)
    qat.export(one, work / "one", processor=tokenizer, overwrite=True)
    float_file(work, work / "one" / "model.gguf")
    theirs, tokens = perplexity(programs, work / "float.gguf", text)
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    yield {
        "type": "float",
        "made": "float",
        "llama": theirs,
        "ours": our_perplexity(problem.model, tokens),
        "texts": equal_texts(programs, work / "float.gguf", problem.model, tokenizer),
        "tokens": tokens.numel(),
        "equal_tokens": int((tokens.flatten() == torch.tensor(ids[: tokens.numel()])).sum()),
    }
    for weights in arguments.types:
        stock = work / f"{weights}-stock.gguf"
        kept = ("--token-embedding-type", "f32", "--output-tensor-type", "f32")
        run(programs / "llama-quantize", "--pure", *kept, work / "float.gguf", stock, weights.upper(), 2)
        yield {"type": weights, "made": "llama-quantize", "llama": perplexity(programs, stock, text)[0]}
        for steps in (0, arguments.steps):
            directory = work / f"{weights}-{steps}"
            qat.export(frozen(weights, steps, arguments.rate, problem), directory, processor=tokenizer, overwrite=True)
            yield {"type": weights, "made": f"qat, {steps} steps", **judged(programs, directory, tokenizer, text)}
            shutil.rmtree(directory)


def judged(programs: Path, directory: Path, tokenizer: Any, text: Path) -> Row:
    """An export in llama.cpp, as it is and as floats, beside ours."""
    served, file = qat.load(directory), directory / "model.gguf"
    plain = dequantized(programs, file)
    theirs, tokens = perplexity(programs, file, text)
    return {
        "llama": theirs,
        "dequantized": perplexity(programs, plain, text)[0],
        "ours": our_perplexity(served, tokens),
        "texts": equal_texts(programs, file, served, tokenizer),
        "dequantized_texts": equal_texts(programs, plain, served, tokenizer),
    }


def architecture_rows(programs: Path, work: Path, text: Path) -> Iterator[Row]:
    """A tiny model of each architecture, with the reference model's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(REFERENCE, trust_remote_code=False)
    for name, options in ARCHITECTURES.items():
        positions = "n_positions" if "n_positions" in options else "max_position_embeddings"
        sizes = {"vocab_size": len(tokenizer), positions: WINDOW, "initializer_range": 0.2, "eos_token_id": 0}
        model = of_class(name, **sizes)
        qat.prepare(model, qat.QuantSpec(weights="q8_0", dtype="float32"), target="gguf")
        qat.freeze(model, allow_unreached=True)
        qat.export(model, work / "architecture", processor=tokenizer, overwrite=True)
        yield {"architecture": name, **judged(programs, work / "architecture", tokenizer, text)}


def tokenizer_rows(programs: Path, work: Path) -> Iterator[Row]:
    """Tiny tokenizers of each kind, on texts that they split in many ways."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    starcoder = byte_level()
    starcoder.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made = {"gpt-2": byte_level(), "starcoder": starcoder}
    made |= {name: byte_level(split, name == "llama-bpe") for name, split in SPLITS.items()}
    made["SentencePiece"] = sentencepiece()
    for scheme in ("never", "first", "always"):
        parts = {"normalizer": None, "pre_tokenizer": metaspace(scheme)}
        made[f"SentencePiece, Metaspace {scheme}"] = changed(sentencepiece(), **parts)
    for name, tokenizer in made.items():
        model = of_class("LlamaForCausalLM", vocab_size=320)
        qat.prepare(model, qat.QuantSpec(weights="q8_0"), target="gguf")
        qat.freeze(model, allow_unreached=True)
        notes = qat.export(model, work / "tokenizer", processor=tokenizer, overwrite=True).notes
        others = [
            text
            for text in (*TEXTS, *MORE_TEXTS)
            if their_tokens(programs, work / "tokenizer" / "model.gguf", text) != tokenizer(text)["input_ids"]
        ]
        told = [note for note in notes if note.startswith("llama.cpp")]
        yield {"tokenizer": name, "texts": len(TEXTS) + len(MORE_TEXTS), "others": others, "notes": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/llama_cpp"), help="sources, programs and exports")
    parser.add_argument("--package", default="llama-cpp-python==0.3.36")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="others in the output stay as they are"
    )
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_1", "q4_0"])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--characters", type=int, default=120_000, help="of text that is judged")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    programs, work = build(arguments.work, arguments.package), arguments.work
    text = work / "text.txt"
    documents = [document["text"] for document in standard_library_documents("evaluation")]
    text.write_text("\n\n".join(documents)[-arguments.characters :], encoding="utf-8")
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "types": lambda: type_rows(programs, work, text, arguments),
        "architectures": lambda: architecture_rows(programs, work, text),
        "tokenizers": lambda: tokenizer_rows(programs, work),
    }
    output = arguments.output
    kept = json.loads(output.read_text(encoding="utf-8")) if output is not None and output.is_file() else {}
    options = {key: value for key, value in vars(arguments).items() if key not in ("work", "output", "parts")}
    for part in arguments.parts:
        rows = []
        for row in parts[part]():
            rows.append(row)
            print(json.dumps(row), flush=True)
        kept[part] = {"options": options, "rows": rows}
        if output is not None:
            output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
