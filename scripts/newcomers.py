"""Mistakes of newcomers: a command line, and the words that its one error must have: argument, value, remedy.

``@`` stands for a folder that `fill` has filled, REF for the reference model beside the recipes.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["COMMAND_LINES", "REFERENCE", "fill"]

REFERENCE = Path(__file__).parents[1] / "recipes" / "reference"

COMMAND_LINES: list[tuple[str, tuple[str, ...]]] = [
    (line.replace("REF", str(REFERENCE)), words)
    for line, words in [
        ("qat inspekt", ("command", "'inspekt'", "did you mean 'inspect'?")),
        ("qat quantize REF", ("command", "inspect, calibrate, train", "'quantize'", "qat --help")),
        ("qat --json verify @/mine", ("command", "'--json'", "write qat verify --json")),
        ("qat inspect", ("MODEL", "qat inspect --help")),
        ("qat inspect --model REF", ("'--model'", "MODEL is given by its place")),
        ("qat inspect REF --wieghts int4", ("'--wieghts'", "did you mean --weights?", "qat inspect --help")),
        ("qat inspect REF --weights int44", ("--weights", "'int44'", "did you mean 'int4'?")),
        ("qat inspect REF --weights", ("--weights", "qat inspect --help")),
        ("qat inspect REF --spec.weights int4", ("'--spec.weights'", "did you mean --weights?")),
        ("qat inspect REF --exclude lm_heads", ("exclude", "'lm_heads'", "matches no layer")),
        ("qat inspect @/modle", ("model", "is no directory here", "did you mean '", "/model'?")),
        ("qat inspect gpt2", ("model", "'gpt2'", "did you mean 'openai-community/gpt2'?")),
        ("qat inspect REF --target gguff", ("--target", "'gguff'", "did you mean 'gguf'?")),
        ("qat calibrate REF --output out", ("--data", "qat calibrate --help")),
        ("qat calibrate REF --data @/text.txt --output out --spec.weights int4", ("did you mean --weights?",)),
        ("qat calibrate REF --data nowhere --output out", ("data", "'nowhere'", "name files or folders that do")),
        ("qat calibrate REF --data @/text.txt --output out --batches two", ("--batches", "'two'")),
        ("qat calibrate REF --data @/text.txt --output @/full", ("output", "is not empty", "choose another")),
        ("qat calibrate REF --data @/text.txt --output out --weights q4_0", ("weights", "'q4_0'", "qat convert")),
        ("qat calibrate ./model --data @/text.txt --output out", ("MODEL", "'./model'", "correct the path")),
        ("qat train", ("RECIPE", "causal_lm", "qat train --help")),
        ("qat train casual_lm", ("recipe", "'casual_lm'", "did you mean 'causal_lm'?")),
        ("qat train --spec.weights int4 causal_lm", ("recipe", "write qat train causal_lm --spec.weights")),
        ("qat train int4.yaml", ("recipe", "qat train causal_lm int4.yaml")),
        (
            "qat train causal_lm --weights int4",
            ("'--weights'", "did you mean --spec.weights?", "train causal_lm --help"),
        ),
        ("qat train causal_lm --steps 3", ("'--steps'", "did you mean --optimization.steps?")),
        ("qat train causal_lm --lr 3", ("'--lr'", "did you mean --optimization.learning-rate?")),
        ("qat inspect REF --bits 4", ("'--bits'", "did you mean --weights?")),
        ("qat train causal_lm --observer.percentile 99", ("observer", "after its kind", "observer:percentile")),
        ("qat train causal_lm --spec.weights q4_0", ("weights", "'q4_0'", "qat convert")),
        ("qat train causal_lm --spec.weights int4_g32", ("weights", "'int4_g32'", "use target 'compressed-tensors'")),
        ("qat train causal_lm --model ./nowhere", ("model", "must be a directory that exists", "'./nowhere'")),
        ("qat train causal_lm nowhere.yaml", ("nowhere.yaml", "cannot be read")),
        ("qat train causal_lm --seed 3 a.yaml", ("'a.yaml'", "comes before all options")),
        ("qat verify", ("DIRECTORY", "qat verify --help")),
        ("qat verify @/expotr", ("is not a directory", "did you mean '", "/export'?", "name what qat.export wrote")),
        ("qat verify @/running", ("is not a directory", "its run has not ended: start it again")),
        ("qat verify REF", ("has no qat_manifest.json", "write one with qat.export")),
        ("qat verify @/model @/export", ("one word too many", "leave it out")),
        ("qat report @/running", ("is not a directory", "its run has not ended: start it again")),
        ("qat report REF", ("has no qat_manifest.json", "write one with qat.export")),
        ("qat compare @/export", ("runs", "two directories or more", "name another")),
        ("qat compare REF REF", ("has no qat_manifest.json", "write one with qat.export")),
        ("qat convert REF out", ("--target", "qat convert --help")),
        ("qat convert REF out --target quanto", ("has no qat_manifest.json", "write one with qat.export")),
        ("qat export @/checkpoints REF out", ("checkpoint", "is no file", "name one in it", "step-3.ckpt")),
        ("qat export @/checkpoints/step-3.ckpt REF @/full", ("output", "is not empty", "choose another")),
        ("qat export nowhere.ckpt REF out", ("checkpoint", "'nowhere.ckpt'", "name one")),
        ("qat export @/checkpoints/step-3.ckpt REF", ("OUTPUT", "qat export --help")),
    ]
]


def fill(folder: Path) -> None:
    """Put what newcomers mistake into a folder."""
    for name in ("model", "checkpoints", "export", "running-checkpoints", "full"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-3.ckpt").touch()
    (folder / "running-checkpoints" / "run.json").write_text('{"ended": false}')
    (folder / "full" / "thesis.txt").touch()
    (folder / "text.txt").write_text("a b c\n" * 100)
