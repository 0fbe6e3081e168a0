"""Mistakes that users make on command lines, in YAML, with model folders and with exports, and what they are told.

In words and files ``@`` stands for the folder that `scripts._mistaken_files` fills. A mistake in YAML is written to a
file, whose name follows the program's. `scripts.check_mistakes` makes all of them, the test suite those of `QUICK`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.newcomers import COMMAND_LINES

__all__ = ["CASES", "QUICK", "Mistake"]

LONG, HUGE = "x" * 300, "1" + "0" * 30


@dataclass(frozen=True)
class Mistake:
    """One mistake, and the right answer."""

    name: str
    program: str
    """``qat`` with its verb, or a recipe; options that are no mistake may follow."""
    expected: str
    """A regular expression for the words of the message."""
    options: Sequence[str] = ()
    """What is typed after it."""
    text: str | bytes | None = None
    """What a configuration file holds."""
    code: int = 2
    seconds: float = 10.0
    """The most that the answer may take, in a process that has imported the libraries."""

    def words(self, folder: Path, place: Path) -> list[str]:
        """The command line; a configuration file is written for it."""
        program, *more = self.program.split()
        if self.text is not None:
            file = place / "config.yaml"
            text = self.text if isinstance(self.text, bytes) else self.text.encode("utf-8", "surrogateescape")
            file.write_bytes(text.replace(b"@", str(folder).encode()))
            program = f"{program}\n{file}"
        words = [*program.split("\n"), *more, *self.options]
        return [word.replace("@", str(folder)) for word in words]


def _lines(program: str, *rows: tuple[str, str, str], seconds: float = 10.0, code: int = 2) -> list[Mistake]:
    """A mistake for each row: its name, the options, with spaces between, and the expected words."""
    return [
        Mistake(f"{program.split()[0]} {name}", program, expected, _split(options), seconds=seconds, code=code)
        for name, options, expected in rows
    ]


def _split(options: str) -> list[str]:
    return ["" if word == "''" else word for word in options.split()]


def _files(*rows: tuple[str, str | bytes, str]) -> list[Mistake]:
    return [Mistake(f"yaml {name}", "causal_lm", expected, text=text) for name, text, expected in rows]


_OUTPUTS = (
    ("output empty", "--output ''", "output: .*name"),
    ("output of dots", "--output .", "output: .*name"),
    ("output the parent", "--output ..", "output: .*name"),
    ("output the root", "--output /", "output: .*name"),
    ("output below a file", "--output @/text.txt/x", "output: .*text.txt', which is a file"),
    ("output a file", "--output @/text.txt", "output: .*is a file or a link"),
    ("output a device", "--output /dev/null", "output: .*is a file or a link"),
    ("output not writable", "--output /proc/x", "output: .*cannot be written"),
    ("output below what is not writable", "--output /proc/x/y", "output: .*cannot be written"),
    ("output name of 300 characters", f"--output {LONG}", "output: .*too long"),
    ("output of nobody", "--output ~nosuchuser/x", "output: .*no user"),
    ("output a folder of others", "--output @/mine --overwrite", "output.*choose another"),
    ("output not UTF-8", "--output \udcff", "UTF-8"),
)
_NUMBERS = (
    ("seed below 0", "--seed -1", "seed: .*greater than or equal to 0, got -1"),
    ("seed of 33 bits", "--seed 4294967296", "seed: .*less than.*4294967296"),
    ("steps", f"--optimization.steps {HUGE}", r"optimization\.steps: .*less than"),
    ("steps of 5000 digits", f"--optimization.steps {'1' * 5000}", r"optimization\.steps"),
    ("steps nan", "--optimization.steps nan", r"optimization\.steps"),
    ("no steps", "--optimization.steps 0", r"optimization\.steps: .*greater than or equal to 1"),
    ("batch size", f"--optimization.batch-size {HUGE}", r"optimization\.batch_size: .*less than"),
    ("rate nan", "--optimization.learning-rate nan", r"optimization\.learning_rate: .*finite"),
    ("rate inf", "--optimization.learning-rate inf", r"optimization\.learning_rate: .*finite"),
    ("float rate inf", "--optimization.float-learning-rate inf", r"float_learning_rate: .*finite"),
    ("scale rate nan", "--optimization.scale-learning-rate nan", r"scale_learning_rate: .*finite"),
    ("decay inf", "--optimization.weight-decay inf", r"weight_decay: .*finite"),
    ("clip nan", "--optimization.gradient-clip nan", r"gradient_clip: .*finite"),
    ("hidden states inf", "--optimization.distillation.hidden-states inf", r"hidden_states: .*finite"),
    ("temperature inf", "--optimization.distillation.temperature inf", r"temperature: .*finite"),
    ("cage nan", "--schedule.cage nan", r"cage: .*finite"),
    ("percentile nan", "observer:percentile --observer.percentile nan", r"percentile: .*finite"),
    ("mask inf", "algorithm:learned-affine --algorithm.mask-margin inf", r"mask_margin: .*finite"),
    ("accumulation", f"--trainer.accumulate-grad-batches {HUGE}", "accumulate_grad_batches: .*less than"),
    ("block size", f"--data.block-size {HUGE}", r"data\.block_size: .*less than"),
    ("evaluation blocks", f"--data.evaluation-blocks {HUGE}", r"evaluation_blocks: .*less than"),
    ("calibration batches", f"--schedule.calibration-batches {HUGE}", "calibration_batches: .*less than"),
    ("start step", f"--schedule.start-step {HUGE}", "start_step: .*less than"),
    ("start after the end", "--schedule.start-step 80", r"schedule\.start_step: .*below optimization\.steps \(80\)"),
    ("hold after the end", "--schedule.hold-scales-from 99", r"schedule\.hold_scales_from: .*optimization\.steps"),
    ("observe after the end", "--schedule.observe-from 90", r"schedule\.observe_from: .*optimization\.steps"),
    ("warm-up beyond the steps", "--optimization.warmup-steps 81", r"optimization: warmup_steps: .*steps \(80\)"),
)
_TRAINER = (
    ("accelerator misspelt", "--trainer.accelerator gup", "trainer.*accelerator.*gup"),
    ("accelerator absent", "--trainer.accelerator gpu", "trainer.*accelerator.*gpu"),
    ("accelerator tpu", "--trainer.accelerator tpu", "trainer.*accelerator.*tpu"),
    ("precision misspelt", "--trainer.precision bf16", "trainer.precision"),
    ("strategy misspelt", "--trainer.strategy dpp", "trainer.*strategy.*dpp"),
    ("strategy empty", "--trainer.strategy ''", "trainer.*strategy"),
    ("fsdp without GPU", "--trainer.strategy fsdp --trainer.accelerator cpu", "trainer.*strategy"),
    ("devices", f"--trainer.devices {HUGE}", "devices"),
    ("devices below 0", "--trainer.devices -2", "devices"),
    ("no devices", "--trainer.devices 0", "devices"),
    ("devices empty", "--trainer.devices ''", "devices"),
    ("devices words", "--trainer.devices many", "devices.*many"),
    ("nodes", f"--trainer.num-nodes {HUGE}", "num_nodes: .*less than"),
    ("nodes alone", "--trainer.num-nodes 2", r"trainer\.num_nodes: 2 nodes need a launcher"),
    ("16 bits on a CPU", "--trainer.accelerator cpu --trainer.precision 16-mixed", "precision"),
)
_WORDS = (
    ("option misspelt", "--optimisation.steps 3", "--optimisation.steps"),
    ("target misspelt", "--target transformer", "--target"),
    ("type misspelt", "--spec.weights int3", "--spec.weights"),
    ("override of no type", "--spec.overrides *=int5", r"spec\.overrides\.\*"),
    ("override without a value", "--spec.overrides a", "KEY=VALUE"),
    ("override that is a bomb", "--spec.overrides a=" + "[" * 20000, "KEY=VALUE|nested"),
    ("override date", "--spec.overrides a=2020-99-99", "KEY=VALUE"),
    ("model empty", "--model ''", "model: must be a directory"),
    ("model of 300 characters", f"--model {LONG}/{LONG}", "model: "),
    ("model of nobody", "--model ~nosuchuser/x", "model: must be a directory"),
    ("model a file", "--model @/text.txt", "model: must be a directory"),
    ("teacher of 300 characters", f"--teacher ./{LONG}", "teacher: must be a directory"),
    ("resume nothing", "--resume nowhere.ckpt", "resume: .*file"),
    ("resume empty", "--resume ''", "resume: .*file"),
    ("resume of 300 characters", f"--resume {LONG}", "resume: .*file"),
    ("resume of nobody", "--resume ~nosuchuser/x.ckpt", "resume: .*file"),
    ("resume a folder", "--resume @/mine", "resume: .*file"),
    ("resume a device", "--resume /dev/zero", "resume: .*file"),
    ("resume a pipe", "--resume @/pipe", "resume: .*file"),
    ("resume a text", "--resume @/text.txt", "resume: .*no whole checkpoint"),
    ("resume another recipe", "--resume @/other/step-3.ckpt", "resume: .*other settings: .*recipe: "),
    ("resume a wrong note", "--resume @/wrong/step-3.ckpt", "resume: .*no whole checkpoint"),
    ("resume a wrong step", "--resume @/wrong/step-4.ckpt", "resume: .*no whole checkpoint"),
    ("data empty", "--data.source ''", r"data\.source"),
)
_YAML_FILES = (
    ("missing", "nowhere.yaml", "nowhere.yaml: .*No such file"),
    ("a folder", "@/folder.yaml", "folder.yaml: .*no regular file"),
    ("a pipe", "@/pipe.yaml", "pipe.yaml: .*no regular file"),
    ("a device", "@/zero.yaml", "zero.yaml: .*no regular file"),
    ("of 300 characters", f"{LONG}.yaml", "name too long"),
    ("of nobody", "~nosuchuser/a.yaml", "cannot be read"),
    ("of 3 MB", "@/large.yaml", "large.yaml: .*bytes"),
    ("of another kind", "@/text.txt", "text.txt"),
)

ON_COMMAND_LINES = [
    *_lines("causal_lm", *_OUTPUTS, *_NUMBERS, *_TRAINER, *_WORDS),
    *_lines("causal_lm", *((f"file {name}", options, expected) for name, options, expected in _YAML_FILES)),
]

IN_YAML = _files(
    ("key a number", "1: 2", "key 1 is no text"),
    ("key null", "null: 2", "key None is no text"),
    ("key true", "true: 2", "key True is no text"),
    ("key a date", "2020-01-01: 2", "key .*2020, 1, 1.* is no text"),
    ("key a list", "? [a]\n: 1", "key"),
    ("key a mapping", "? {a: b}\n: 1", "key"),
    ("inner key a number", "spec: {1: int8}", "key 1 is no text"),
    ("override of a number", "spec: {overrides: {1: int8}}", "key 1 is no text"),
    ("deep lists", "[" * 100_000, "nested"),
    ("deep mappings", "{a: " * 5000, "nested"),
    ("deep blocks", "- " * 20_000, "nested"),
    ("deep and whole", "a: " + "[" * 3000 + "]" * 3000, "nested"),
    (
        "aliases of lists",
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "alias",
    ),
    (
        "aliases of mappings",
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 60)),
        "alias",
    ),
    (
        "merged mappings",
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
        "alias",
    ),
    ("an alias of itself", "spec: &s {overrides: *s}", "alias"),
    (
        "many overrides",
        "spec: {overrides: {" + ", ".join(f"l{i}: int8" for i in range(10_000)) + "}}",
        "pattern 'l0' matches no layer",
    ),
    ("many unknown keys", "\n".join(f"k{i}: 1" for i in range(20_000)), "k0: unknown key"),
    ("many wrong overrides", "spec: {overrides: {" + ", ".join(f"l{i}: 3" for i in range(9_000)) + "}}", "l0: "),
    ("a long text", f"target: {'x' * 50_000}", "target: "),
    ("steps of 5000 digits", f"optimization: {{steps: {'1' * 5000}}}", r"steps|digits"),
    ("steps in hex", f"optimization: {{steps: 0x{'f' * 5000}}}", r"optimization\.steps"),
    ("seed of base 60", "seed: 9" + ":59" * 3000, "seed|digits"),
    ("steps", f"optimization: {{steps: {HUGE}}}", r"optimization\.steps: .*less than"),
    ("rate inf", "optimization: {learning_rate: .inf}", r"learning_rate: .*finite"),
    ("rate nan", "optimization: {learning_rate: .nan}", r"learning_rate: .*finite"),
    ("devices a list", "trainer: {devices: [0, 1]}", r"trainer\.devices: "),
    ("devices of 30 digits", f"trainer: {{devices: {HUGE}}}", "devices"),
    ("a date that is none", "seed: 2020-99-99", "not valid YAML|seed"),
    ("NUL in a path", 'output: "a\\0b"', "NUL"),
    ("NUL in a model", 'model: "a\\0b"', "NUL"),
    ("NUL in a pattern", 'spec: {exclude: ["a\\0b"]}', "NUL"),
    ("NUL in data", 'data: {source: "./a\\0b.txt"}', "NUL"),
    ("NUL in the file", "seed: \0", "not valid YAML"),
    ("half a character", 'output: "a\\ud800b"', "UTF-8|not valid YAML"),
    ("not UTF-8", b"\xff\xfe\xff", "not valid YAML"),
    ("Latin-1", "model: caf\xe9".encode("latin-1"), "not valid YAML"),
    ("UTF-16", "seed: 1".encode("utf-16"), "not valid YAML"),
    ("binary", bytes(range(256)) * 100, "not valid YAML"),
    ("a list", "- seed", "expected a mapping"),
    ("a number", "3", "expected a mapping"),
    ("two documents", "seed: 1\n---\nseed: 2", "not valid YAML"),
    ("a tag", "seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ("a key twice", "seed: 1\nseed: 2", "'seed' is given twice"),
    ("a section of words", "spec: int8", "spec: "),
    ("a section of nothing", "trainer:", "trainer: "),
    ("another recipe", "recipe: text_to_image", "recipe: must be 'causal_lm'"),
    ("a recipe of no text", "recipe: [1]", "recipe: must be 'causal_lm'"),
    ("a set", "seed: !!set {a, b}", "tag .* is not read"),
    ("output a number", "output: 3", "output: "),
    ("binary text", "output: !!binary gIGC", "tag .* is not read"),
)

_TINY = "causal_lm --data.source @/text.txt --data.block-size 16 --optimization.steps 2 --output out"
WITH_MODELS = [
    *_lines(
        _TINY,
        ("pattern of nothing", "--spec.exclude *.nothing", "exclude: pattern '.*nothing' matches no layer"),
        ("no tokenizer", "--model @/no_tokenizer", "no tokenizer that can be loaded(?!.*sentencepiece)"),
        ("encoder and decoder", "--model @/t5", "model: .*T5.*no causal language model"),
        ("encoder", "--model @/encoder", "model: .*of a Bert.* do not fill .* of a BertLMHeadModel"),
        ("classifier of images", "--model @/vit", "model: .*no tokenizer that can be loaded"),
        ("a pipeline", "--model @/flux", "model: .*pipeline"),
        ("empty folder", "--model @/empty", "model: .*config.json"),
        ("small vocabulary", "--model @/small", "model: .*vocabulary"),
        ("broken config", "--model @/broken", "model: .*config.json"),
        ("config a list", "--model @/list", "model: .*config.json"),
        ("config of nothing", "--model @/no_type", "model: .*config.json"),
        ("unknown type", "--model @/unknown", "model: .*nosuchmodel"),
        ("truncated weights", "--model @/truncated", "model: .*model.safetensors"),
        ("no weights", "--model @/no_weights", "model: .*weights"),
        ("weights of others", "--model @/others", "model: .*do not fill|model: .*weights"),
        ("pickle", "--model @/pickle", "model: (?!.*weights_only=False).*pytorch_model.bin"),
        ("10^6 layers", "--model @/deep", "model: .*num_hidden_layers"),
        ("wide", "--model @/wide", "model: "),
        ("teacher without weights", "--teacher @/no_weights", "teacher: .*weights"),
        ("teacher an encoder", "--teacher @/encoder", "teacher: .*of a Bert.* do not fill"),
        ("batch of too many", "--optimization.batch-size 5000", "no whole batch"),
        ("block of too many", "--data.block-size 500000", "block_size: the model takes at most"),
        ("pattern empty", "--spec.exclude ''", r"spec\.exclude|exclude: "),
        ("data of 300 characters", f"--data.source ./{LONG}.txt", r"data\.source: .*does not exist"),
        ("data of nobody", "--data.source ~nosuchuser/a.txt", r"data\.source: .*(does not exist|no user)"),
        ("data without text", "--data.source @/blank.txt", r"data\.source: .*no text"),
        seconds=10.0,
    ),
    *_lines(
        "sequence_classification --output out",
        ("a causal model", "--model @/reference", "model: "),
        ("no tokenizer", "--model @/no_tokenizer", "no tokenizer that can be loaded(?!.*sentencepiece)"),
        seconds=20.0,
    ),
    *_lines(
        "image_classification --output out",
        ("a text model", "--model @/encoder", "model: "),
        ("broken config", "--model @/broken", "model: .*config.json"),
        seconds=20.0,
    ),
    *_lines(
        "text_to_image --output out",
        ("a text model", "--model @/encoder", "model: .*pipeline"),
        ("an empty folder", "--model @/empty", "model: .*model_index.json"),
        ("sampler steps", f"--sampler-steps {HUGE}", "sampler_steps: .*less than"),
        ("captions length", f"--max-sequence-length {HUGE}", "max_sequence_length: .*less than"),
        ("dropout nan", "--caption-dropout nan", "caption_dropout: .*finite"),
        seconds=20.0,
    ),
]

_CALIBRATE = "qat calibrate @/reference --data @/text.txt"
WITH_QAT = [
    *_lines("qat", ("unknown verb", "inspekt", "inspekt"), ("unknown option", "verify x --x", "--x")),
    *_lines(
        "qat inspect",
        ("inspect nothing", "nowhere", "model: 'nowhere' is no directory"),
        ("inspect empty", "''", "model: "),
        ("inspect of 300 characters", LONG, "model: "),
        ("inspect of 300 characters twice", f"{LONG}/{LONG}", "model: "),
        ("inspect of nobody", "~nosuchuser/x", "model: "),
        ("inspect a file", "@/text.txt", "model: .*directory"),
        ("inspect a device", "/dev/zero", "model: .*directory"),
        ("inspect empty folder", "@/empty", "has no config.json"),
        ("inspect a broken config", "@/broken", "model: .*config.json"),
        ("inspect a list", "@/list", "model: .*config.json"),
        ("inspect a pipe", "@/piped", "model: .*config.json.*regular file"),
        ("inspect a deep config", "@/nested", "model: .*config.json"),
        ("inspect an unknown type", "@/unknown", "model: .*nosuchmodel"),
        ("inspect 10^6 layers", "@/deep", "model: .*num_hidden_layers"),
        ("inspect misspelt target", "@/reference --target transformer", "--target"),
        ("inspect pattern", "@/reference --exclude *.nothing", "matches no layer that can be quantized"),
        ("inspect type", "@/reference --weights int9", "--weights"),
        ("inspect override", "@/reference --overrides *=int5", r"overrides\.\*: "),
        seconds=5.0,
    ),
    *_lines(
        "qat verify",
        ("verify nothing", "nowhere", "'nowhere'"),
        ("verify empty", "''", "manifest"),
        ("verify of 300 characters", LONG, "is not a directory"),
        ("verify of nobody", "~nosuchuser/x", "~nosuchuser"),
        ("verify a file", "@/text.txt", "text.txt"),
        ("verify a device", "/dev/zero", "/dev/zero"),
        ("verify a pipe", "@/pipe", "pipe"),
        ("verify a float model", "@/reference", "reference.*manifest"),
        ("verify the root", "/", "manifest"),
        seconds=5.0,
    ),
    *_lines(
        "qat verify",
        ("verify a plain module", "@/plain", r"cannot be judged without: call qat\.verify\(.*model="),
        code=3,
        seconds=10.0,
    ),
    *_lines("qat verify", ("verify a damaged one", "@/damaged", "NOT what was frozen"), code=1, seconds=10.0),
    *_lines(
        "qat convert",
        ("convert nothing", "nowhere out --target quanto", "'nowhere'"),
        ("convert a float model", "@/reference out --target quanto", "reference.*manifest"),
        ("convert misspelt target", "@/export out --target gguff", "--target"),
        ("convert onto itself", "@/export @/export --target compressed-tensors --overwrite", "output: "),
        ("convert below a file", "@/export @/text.txt/x --target compressed-tensors", "output: .*which is a file"),
        ("convert to a file", "@/export @/text.txt --target compressed-tensors", "output: .*is a file"),
        ("convert to nowhere", "@/export '' --target compressed-tensors", "output: .*name"),
        ("convert to the root", "@/export / --target compressed-tensors", "output: .*name"),
        ("convert to 300 characters", f"@/export {LONG} --target compressed-tensors", "output: .*too long"),
        ("convert not writable", "@/export /proc/x --target compressed-tensors", "output: .*cannot be written"),
        seconds=5.0,
    ),
    *(
        Mistake(f"qat calibrate {name}", _CALIBRATE, expected, _split(options), seconds=5.0)
        for name, options, expected in _OUTPUTS
    ),
    *_lines(
        f"{_CALIBRATE} --output out",
        ("calibrate batches", "--batches 0", "batches: .*greater than or equal to 1|at least 1"),
        ("calibrate many batches", f"--batches {HUGE}", "batches"),
        ("calibrate batch size", f"--batch-size {HUGE}", "batch.size"),
        ("calibrate length", f"--length -{HUGE}", "length"),
        ("calibrate device absent", "--device cuda", "device: .*cuda"),
        ("calibrate device misspelt", "--device gpuu", "device: .*gpuu"),
        ("calibrate device meta", "--device meta", "device: .*meta"),
        ("calibrate algorithm", "--algorithm kind=magic", "algorithm: kind must be one of"),
        ("calibrate algorithm option", "--algorithm kind=learned_affine nothing=1", "nothing"),
        ("calibrate algorithm key", "--algorithm kind=learned_affine =1", "KEY=VALUE"),
        ("calibrate margin", "--algorithm kind=learned_affine mask_margin=.nan", "mask_margin: .*finite"),
        ("calibrate percentile", "--observer kind=percentile percentile=.inf", "percentile: .*(finite|less)"),
        seconds=10.0,
    ),
    *_lines(
        "qat calibrate --output out",
        ("calibrate data missing", "@/reference --data nowhere", "data: 'nowhere' does not exist"),
        ("calibrate data empty", "@/reference --data ''", "data: "),
        ("calibrate data of nobody", "@/reference --data ~nosuchuser/x", "data: "),
        ("calibrate data of 300 characters", f"@/reference --data {LONG}", "data: "),
        ("calibrate data a pipe", "@/reference --data @/pipe", "data: .*pipe"),
        ("calibrate data a device", "@/reference --data /dev/zero", "data: .*/dev/zero"),
        ("calibrate no tokenizer", "@/no_tokenizer --data @/text.txt", "no tokenizer(?!.*sentencepiece)"),
        ("calibrate T5", "@/t5 --data @/text.txt", "MODEL: "),
        ("calibrate small vocabulary", "@/small --data @/text.txt", "MODEL: .*vocabulary"),
        ("calibrate truncated", "@/truncated --data @/text.txt", "MODEL: .*model.safetensors"),
        ("calibrate pickle", "@/pickle --data @/text.txt", "MODEL: (?!.*weights_only=False).*pytorch_model.bin"),
        ("calibrate broken config", "@/broken --data @/text.txt", "MODEL: .*config.json"),
        ("calibrate no weights", "@/no_weights --data @/text.txt", "MODEL: .*weights"),
        ("calibrate 10^6 layers", "@/deep --data @/text.txt", "MODEL: .*num_hidden_layers"),
        seconds=10.0,
    ),
]

OF_NEWCOMERS = [
    Mistake(f"newcomer {line}", "qat", ".*".join(map(re.escape, words)), line.split()[1:], seconds=seconds)
    for line, words in COMMAND_LINES
    for seconds in (10.0 if "lm_heads" in line else 3.0,)  # to know names of layers a model must be built
]
CASES = [*ON_COMMAND_LINES, *IN_YAML, *WITH_MODELS, *WITH_QAT, *OF_NEWCOMERS]
QUICK = [*ON_COMMAND_LINES, *IN_YAML][::3]
"""A third of those that need no model: what the test suite has time for."""
