"""A diffusion transformer, from float to a verified quantized checkpoint that stock diffusers loads.

    python -m recipes.text_to_image [config.yaml] [--spec.weights int2 --optimization.steps 200 ...]

Encodes images and captions once with a pipeline, whose encoders then leave the memory, and trains its transformer
twice on the same batches with the same noise: as it is, and with fake quantization, distilled from the first. Then
compares the float model, the fine-tuned one, that one quantized after training, and the quantization-aware one, which
is frozen, exported, verified in a fresh process and judged *as reloaded*: by numbers, and by the images they draw.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FilePath

import qat
from qat.config import ModelSource, OptimizationSettings, RecipeSchedule, ScheduleSettings, TrainerSettings, load_config
from qat.data.images import ImageData
from qat.observers import ObserverChoice
from qat.quantizers import AnyAlgorithm
from qat.report import quiet_libraries, run_command
from recipes import command

TUNED = "float, fine-tuned"


class Config(BaseModel):
    """A diffusion transformer, from float to a verified quantized checkpoint that stock diffusers loads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSource | None = None
    """A pipeline's directory or hub name, for DiffusionPipeline; none: the reference pipeline beside this recipe."""
    data: ImageData = ImageData()
    """The images and captions to train and to evaluate on."""
    max_sequence_length: int | None = Field(default=None, ge=1)
    """Tokens a caption; none: 16 with the reference pipeline, otherwise the pipeline's own default."""
    caption_dropout: float | None = Field(default=None, ge=0, le=1)
    """Share of training images that lose their caption; none: a tenth where the pipeline guides without one, else 0."""
    spec: qat.QuantSpec = qat.QuantSpec(weights="int4")
    """What is quantized."""
    algorithm: AnyAlgorithm = qat.LearnedAffine()
    """How scales are found; post-training quantization takes what it begins with."""
    observer: ObserverChoice = qat.Percentile()
    """What activation scales are taken from, over all timesteps of the real sampler."""
    schedule: RecipeSchedule = ScheduleSettings()
    """When quantization happens."""
    optimization: OptimizationSettings = OptimizationSettings(
        batch_size=32, learning_rate=1e-4, float_learning_rate=5e-5, scale_learning_rate=5e-4, distillation_weight=1.0
    )
    """Steps, learning rates, distillation from the fine-tuned float model."""
    trainer: TrainerSettings = TrainerSettings()
    """Devices, precision and the like."""
    resume: FilePath | None = None
    """A checkpoint of quantization-aware training to go on from: last.ckpt beside an earlier output."""
    target: Literal["diffusers", "quanto"] | None = None
    """Who will load the export; none: diffusers, or quanto where activations are quantized, which diffusers cannot."""
    output: Path | None = None
    """Where the export goes; none: a folder named by the types under outputs/text_to_image, replaced if it exists."""
    overwrite: bool = False
    """Replace an output directory that is not empty."""
    prompts: tuple[str, ...] = ()
    """What the pictures at the end show; none: eight captions of the evaluation images."""
    sampler_steps: int = Field(default=20, ge=2)
    """Steps of the sampler, for the pictures and for calibration."""
    seed: int = 0
    """Decides the order of the data, the noise and the pictures."""


def main(argv: Sequence[str]) -> None:
    config = load_config(Config, argv, str(Config.__doc__), prog=f"{command('text_to_image')} [config.yaml]")
    from qat.files.directory import check_destination  # these take seconds: a wrong option is told before
    from qat.tasks import Diffusion, move
    from recipes import common

    quiet_libraries()
    common.require_packages({"diffusers": "diffusers", "matplotlib": "report"})
    spec, settings = config.spec, config.optimization
    target = config.target or ("quanto" if spec.activation_type else "diffusers")
    kinds = "_".join(filter(None, (spec.weights, spec.activations)))
    output, overwrite = config.output or Path("outputs/text_to_image", kinds), config.overwrite or config.output is None
    check_destination(output.absolute(), overwrite)
    device = common.device_of(config.trainer)  # settings that this machine cannot train with are an error now
    common.step_of(config.resume)  # and so is a file that is no checkpoint

    pipeline, folder = common.load_pipeline(common.source_of(config))
    model = pipeline.transformer
    qat.inspect(model, spec, target=target)  # here a spec that does not fit is an error, before anything is encoded
    # Activations are calibrated by what the real sampler brings, at all timesteps.
    sampled = config.schedule.calibration_batches if spec.activation_type else 0
    data = common.diffusion_data(pipeline, folder, config, device, settings.batch_size, sampled)
    del pipeline  # text encoders and autoencoder are out of memory while training
    print(common.inspected(model, spec, target, data.example))
    prepared_for: dict[str, Any] = {"target": target, "observer": config.observer, "example_inputs": data.example}
    # On CUDA optimum-quanto compiles its float8 kernel when it is first used, for minutes: not for an evaluation.
    served_on = torch.device("cpu") if spec.weights == "float8" else device
    checkpoints = output.with_name(f"{output.name}-checkpoints")

    how: dict[str, Any] = {"settings": common.FitSettings(settings, config.trainer, config.seed), "noise": data.noise}
    tuned, rate = copy.deepcopy(model), settings.float_learning_rate
    kept = common.FineTunedWeights(checkpoints, config, config.resume)
    if not kept.restore(tuned):
        kept.save(tuned, common.fit("fine-tuning", tuned, Diffusion(), data.batches, learning_rate=rate, **how))
    comparison = common.DiffusionComparison(config, data, spec.torch_dtype, tuned, device)
    comparison.judge("float", model, device, 0, None, draws=False)
    comparison.judge(TUNED, tuned, device, settings.steps, rate)
    quantized = copy.deepcopy(tuned)
    qat.prepare(quantized, spec, algorithm=config.algorithm, **prepared_for)
    common.calibrate_and_freeze(quantized, data.sampled, sampled, device)
    with TemporaryDirectory() as directory:
        qat.export(quantized, directory)
        comparison.judge_export("fine-tuned, then quantized", Path(directory), served_on, settings.steps, rate)

    schedule = qat.QuantizationSchedule(**config.schedule.model_dump())
    callbacks = [
        qat.QuantizationAwareTraining(spec, config.algorithm, schedule, **prepared_for),
        *common.checkpoints_in(checkpoints, config.trainer),
    ]
    if sampled:
        qat.prepare(model, spec, algorithm=config.algorithm, **prepared_for)
        common.calibrate(model, data.sampled, device)
    task, rate = Diffusion(settings.distillation_weight), settings.learning_rate
    how |= {"learning_rate": rate, "callbacks": callbacks, "teacher": tuned, "resume": config.resume}
    trainer = common.fit("training", model.cpu(), task, data.batches, **how)
    common.calibrate_and_freeze(model, data.sampled, sampled, device)
    if not trainer.is_global_zero:
        return  # of several processes, one goes on

    resolved = config.model_copy(update={"target": target}).model_dump(mode="json")
    example = move(data.example, torch.device("cpu"), spec.torch_dtype)
    qat.export(model, output, example_inputs=example, config=resolved, overwrite=overwrite)
    verified = qat.verify(output, fresh_process=True)
    comparison.judge_export("quantization-aware training", output, served_on, settings.steps, rate)
    comparison.report(TUNED, output)
    print(f"{output}: reloaded in a fresh process, compared and found equal ({len(verified.checks)} checks).")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
