"""A causal language model, from float to a verified quantized checkpoint.

    python -m recipes.causal_lm [config.yaml] [--spec.weights int2 --optimization.steps 200 ...]

Fine-tunes a float model, and goes on from there with fake quantization, on the same batches in the same order. Then
compares four models on held-out text: the float one, the fine-tuned one, that one quantized after training, and the
quantization-aware one, which is frozen, exported, verified in a fresh process and judged *as reloaded*.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import qat
from qat.quantizers import AnyAlgorithm
from qat.report import run_command
from recipes import command
from recipes.common.config import load_config
from recipes.common.settings import ComparisonConfig, OptimizationSettings
from recipes.data.text import TextData

REFERENCE = Path(__file__).parent / "reference"


class Config(ComparisonConfig):
    """A causal language model, from float to a verified quantized checkpoint."""

    data: TextData = TextData(evaluation_blocks=128)
    """The text to train and to evaluate on."""
    algorithm: AnyAlgorithm = qat.Automatic(start="best")
    """How scales are found; `automatic` is the best for the type of each layer."""
    optimization: OptimizationSettings = OptimizationSettings(
        steps=80,
        learning_rate=5e-5,
        float_learning_rate=3e-5,
        scale_learning_rate=1.5e-4,
        distillation=qat.Distillation(hidden_states=1.0),
    )
    """Steps, learning rates, distillation (from the fine-tuned float model, where there is one)."""


def main(argv: Sequence[str]) -> None:
    config = load_config(Config, argv, str(Config.__doc__), prog=command("causal_lm"))
    from recipes.common.experiment import Examples, compare  # these take seconds: a wrong option is told before
    from recipes.common.models import load_language_model, load_teacher
    from recipes.common.progress import quiet_libraries, stage
    from recipes.common.run import begin
    from recipes.common.samples import write_samples
    from recipes.data.text import load_blocks
    from recipes.tasks import CausalLanguageModelling

    quiet_libraries()
    run, source = begin("causal_lm", config), config.model or str(REFERENCE)
    trust = config.trust_remote_code
    model, tokenizer = load_language_model(source, trust_remote_code=trust)
    teacher = load_teacher(config, lambda path: load_language_model(path, trust_remote_code=trust)[0])
    qat.inspect(model, config.spec, target=config.target)  # here a spec that does not fit is an error, before the data
    with stage("tokenizing"):
        train, evaluation = load_blocks(config.data, tokenizer, getattr(model.config, "max_position_embeddings", None))
    show = partial(write_samples, tokenizer, evaluation, run.beside("samples.json"))
    compare(config, run, model, tokenizer, CausalLanguageModelling(), Examples(train, evaluation), teacher, show)


if __name__ == "__main__":
    run_command(main)
