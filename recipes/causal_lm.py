"""A causal language model, from float to a verified quantized checkpoint.

    python -m recipes.causal_lm [config.yaml] [--spec.weights int2 --optimization.steps 200 ...]

Trains the same float model twice on the same batches in the same order: as it is, and with fake quantization. Then
compares four models on held-out text: the float one, the fine-tuned one, that one quantized after training, and the
quantization-aware one, which is frozen, exported, verified in a fresh process and judged *as reloaded*.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

import qat
from qat.quantizers import AnyAlgorithm
from qat.report import run_command
from recipes import command
from recipes.common.config import load_config
from recipes.common.settings import LogitOptimization, RecipeConfig
from recipes.data.text import TextData

REFERENCE = Path(__file__).parent / "reference"


class Config(RecipeConfig):
    """A causal language model, from float to a verified quantized checkpoint."""

    data: TextData = TextData(evaluation_blocks=128)
    """The text to train and to evaluate on."""
    algorithm: AnyAlgorithm = qat.StraightThrough()
    """How scales are found."""
    optimization: LogitOptimization = LogitOptimization(steps=80, learning_rate=5e-5, float_learning_rate=3e-5)
    """Steps, learning rates, distillation (from the fine-tuned float model, where there is one)."""
    float_baseline: bool = True
    """Also fine-tune the float model and quantize it after training, for comparison."""
    target: Literal["quanto", "transformers"] = "transformers"
    """Who will load the export."""


def main(argv: Sequence[str]) -> None:
    config = load_config(Config, argv, str(Config.__doc__), prog=f"{command('causal_lm')} [config.yaml]")
    from recipes.common.callbacks import checkpoints_in  # these take seconds: a wrong option is told before
    from recipes.common.fine_tuned import FineTunedWeights
    from recipes.common.models import load_language_model
    from recipes.common.progress import quiet_libraries, stage, track
    from recipes.common.results import ResultRow, inspect_totals, show_results
    from recipes.common.run import begin
    from recipes.common.training import FitSettings, calibrate_and_freeze, fit, training_batches
    from recipes.data.text import load_blocks
    from recipes.tasks import CausalLanguageModelling, evaluate

    quiet_libraries()
    run, spec, settings, schedule = begin("causal_lm", config), config.spec, config.optimization, config.schedule
    model, tokenizer = load_language_model(config.model or str(REFERENCE), trust_remote_code=config.trust_remote_code)
    qat.inspect(model, spec, target=config.target)  # here a spec that does not fit is an error, before the data is read
    with stage("tokenizing"):
        train, evaluation = load_blocks(config.data, tokenizer)
    example = {"input_ids": evaluation[:2]["input_ids"]}
    print(inspect_totals(qat.inspect(model, spec, target=config.target, example_inputs=example)))
    prepared_for: dict[str, Any] = {"target": config.target, "observer": config.observer, "example_inputs": example}
    batches = training_batches(train, settings.batch_size)
    checkpoints = run.beside("checkpoints")
    how = FitSettings(settings, config.trainer, config.seed)
    plain = CausalLanguageModelling()
    scores: dict[str, dict[str, float]] = {}

    def judge(name: str, judged: nn.Module, device: torch.device = run.device) -> None:
        blocks = DataLoader(evaluation, settings.batch_size)
        scores[name] = evaluate(plain, judged.to(device), track(blocks, f"evaluating: {name}", len(blocks)))

    judge("float", model)
    float_size = sum(parameter.numel() for parameter in model.parameters()) * spec.torch_dtype.itemsize
    tuned = copy.deepcopy(model)
    if config.float_baseline:
        kept, rate = FineTunedWeights(checkpoints, config, config.resume), settings.float_learning_rate
        if not kept.restore(tuned):
            kept.save(tuned, fit("fine-tuning", tuned, plain, batches, learning_rate=rate, settings=how))
        judge("float, fine-tuned", tuned)
        quantized = copy.deepcopy(tuned).cpu()
        qat.prepare(quantized, spec, **prepared_for)
        calibrate_and_freeze(quantized, batches, schedule.calibration_batches, run.device)
        with TemporaryDirectory() as folder:
            qat.export(quantized, folder)
            judge("fine-tuned, then quantized", qat.load(folder), run.served_on)

    task = CausalLanguageModelling(settings.distillation_weight, settings.temperature)
    callbacks = [
        qat.QuantizationAwareTraining(spec, config.algorithm, schedule, **prepared_for),
        *checkpoints_in(checkpoints, config.trainer),
    ]
    options: dict[str, Any] = {"callbacks": callbacks, "teacher": tuned, "resume": config.resume}
    rate = settings.learning_rate
    trainer = fit("training", model, task, batches, learning_rate=rate, settings=how, **options)
    calibrate_and_freeze(model, batches, schedule.calibration_batches, run.device)
    if not trainer.is_global_zero:
        return  # of several processes, one goes on

    resolved = config.model_dump(mode="json")
    qat.export(model, run.output, processor=tokenizer, example_inputs=example, config=resolved, overwrite=run.overwrite)
    verified = qat.verify(run.output, fresh_process=True)
    judge("quantization-aware training", qat.load(run.output), run.served_on)

    size = sum(file.stat().st_size for file in run.output.glob("model*.safetensors"))
    facts = {
        "float": (float_size, 0, None),
        "float, fine-tuned": (float_size, settings.steps, settings.float_learning_rate),
        "fine-tuned, then quantized": (size, settings.steps, settings.float_learning_rate),  # the same layout
        "quantization-aware training": (size, settings.steps, settings.learning_rate),
    }
    rows = [ResultRow(name, scores[name], *facts[name]) for name in scores]
    show_results(rows, run.beside("results.json"), list(scores["float"]))
    print(f"{run.output}: reloaded in a fresh process, compared and found equal ({len(verified.checks)} checks).")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
