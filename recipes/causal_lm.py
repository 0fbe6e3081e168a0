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
from pydantic import BaseModel, ConfigDict, FilePath
from torch import nn
from torch.utils.data import DataLoader

import qat
from qat.config import LogitOptimization, ModelSource, RecipeSchedule, ScheduleSettings, TrainerSettings, load_config
from qat.data.text import TextData, load_blocks
from qat.observers import ObserverChoice
from qat.quantizers import AnyAlgorithm
from qat.report import ResultRow, inspect_totals, quiet_libraries, run_command, show_results, stage, track
from recipes import command

REFERENCE = Path(__file__).parent / "reference"


class Config(BaseModel):
    """A causal language model, from float to a verified quantized checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSource | None = None
    """A local directory or a hub name, for AutoModelForCausalLM; none: the reference model beside this recipe."""
    data: TextData = TextData(evaluation_blocks=128)
    """The text to train and to evaluate on."""
    spec: qat.QuantSpec = qat.QuantSpec(weights="int4")
    """What is quantized."""
    algorithm: AnyAlgorithm = qat.StraightThrough()
    """How scales are found."""
    observer: ObserverChoice = qat.Percentile()
    """What activation scales are taken from."""
    schedule: RecipeSchedule = ScheduleSettings()
    """When quantization happens."""
    optimization: LogitOptimization = LogitOptimization(steps=80, learning_rate=5e-5, float_learning_rate=3e-5)
    """Steps, learning rates, distillation (from the fine-tuned float model, where there is one)."""
    trainer: TrainerSettings = TrainerSettings()
    """Devices, precision and the like."""
    resume: FilePath | None = None
    """A checkpoint of quantization-aware training to go on from: last.ckpt beside an earlier output."""
    float_baseline: bool = True
    """Also fine-tune the float model and quantize it after training, for comparison."""
    target: Literal["quanto", "transformers"] = "transformers"
    """Who will load the export."""
    output: Path | None = None
    """Where the export goes; none: a folder named by the types under outputs/causal_lm, replaced if it exists."""
    overwrite: bool = False
    """Replace an output directory that is not empty."""
    seed: int = 0
    """Decides the order of the data."""


def main(argv: Sequence[str]) -> None:
    config = load_config(Config, argv, str(Config.__doc__), prog=f"{command('causal_lm')} [config.yaml]")
    from qat.files.directory import check_destination  # these take seconds: a wrong option is told before
    from qat.tasks import CausalLanguageModelling, evaluate
    from recipes import common

    quiet_libraries()
    spec, settings = config.spec, config.optimization
    kinds = "_".join(filter(None, (spec.weights, spec.activations)))
    output, overwrite = config.output or Path("outputs/causal_lm", kinds), config.overwrite or config.output is None
    check_destination(output.absolute(), overwrite)
    device = common.device_of(config.trainer)  # settings that this machine cannot train with are an error now
    common.step_of(config.resume)  # and so is a file that is no checkpoint

    model, tokenizer = common.load_language_model(config.model or str(REFERENCE))
    qat.inspect(model, spec, target=config.target)  # here a spec that does not fit is an error, before the data is read
    with stage("tokenizing"):
        train, evaluation = load_blocks(config.data, tokenizer)
    example = {"input_ids": evaluation[:2]["input_ids"]}
    print(inspect_totals(qat.inspect(model, spec, target=config.target, example_inputs=example)))
    prepared_for: dict[str, Any] = {"target": config.target, "observer": config.observer, "example_inputs": example}
    batches = common.training_batches(train, settings.batch_size)
    checkpoints = output.with_name(f"{output.name}-checkpoints")
    how = common.FitSettings(settings, config.trainer, config.seed)
    schedule = qat.QuantizationSchedule(**config.schedule.model_dump())
    plain = CausalLanguageModelling()
    # On CUDA optimum-quanto compiles its float8 kernel when it is first used, for minutes: not for an evaluation.
    served_on = torch.device("cpu") if spec.weights == "float8" else device
    scores: dict[str, dict[str, float]] = {}

    def judge(name: str, judged: nn.Module, device: torch.device = device) -> None:
        blocks = DataLoader(evaluation, settings.batch_size)
        scores[name] = evaluate(plain, judged.to(device), track(blocks, f"evaluating: {name}", len(blocks)))

    judge("float", model)
    float_size = sum(parameter.numel() for parameter in model.parameters()) * spec.torch_dtype.itemsize
    tuned = copy.deepcopy(model)
    if config.float_baseline:
        kept, rate = common.FineTunedWeights(checkpoints, config, config.resume), settings.float_learning_rate
        if not kept.restore(tuned):
            kept.save(tuned, common.fit("fine-tuning", tuned, plain, batches, learning_rate=rate, settings=how))
        judge("float, fine-tuned", tuned)
        quantized = copy.deepcopy(tuned).cpu()
        qat.prepare(quantized, spec, **prepared_for)
        common.calibrate_and_freeze(quantized, batches, schedule.calibration_batches, device)
        with TemporaryDirectory() as folder:
            qat.export(quantized, folder)
            judge("fine-tuned, then quantized", qat.load(folder), served_on)

    task = CausalLanguageModelling(settings.distillation_weight, settings.temperature)
    callbacks = [
        qat.QuantizationAwareTraining(spec, config.algorithm, schedule, **prepared_for),
        *common.checkpoints_in(checkpoints, config.trainer),
    ]
    options: dict[str, Any] = {"callbacks": callbacks, "teacher": tuned, "resume": config.resume}
    rate = settings.learning_rate
    trainer = common.fit("training", model, task, batches, learning_rate=rate, settings=how, **options)
    common.calibrate_and_freeze(model, batches, schedule.calibration_batches, device)
    if not trainer.is_global_zero:
        return  # of several processes, one goes on

    resolved = config.model_dump(mode="json")
    qat.export(model, output, processor=tokenizer, example_inputs=example, config=resolved, overwrite=overwrite)
    verified = qat.verify(output, fresh_process=True)
    judge("quantization-aware training", qat.load(output), served_on)

    size = sum(file.stat().st_size for file in output.glob("model*.safetensors"))
    facts = {
        "float": (float_size, 0, None),
        "float, fine-tuned": (float_size, settings.steps, settings.float_learning_rate),
        "fine-tuned, then quantized": (size, settings.steps, settings.float_learning_rate),  # the same layout
        "quantization-aware training": (size, settings.steps, settings.learning_rate),
    }
    rows = [ResultRow(name, scores[name], *facts[name]) for name in scores]
    show_results(rows, output.with_name(f"{output.name}-results.json"))
    print(f"{output}: reloaded in a fresh process, compared and found equal ({len(verified.checks)} checks).")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
