"""A diffusion transformer, from float to a verified quantized checkpoint that stock diffusers loads.

    python -m recipes.text_to_image [config.yaml] [--spec.weights int2 --optimization.steps 200 ...]

Encodes images and captions once with a pipeline, whose encoders then leave the memory, and fine-tunes its transformer.
From there it trains with fake quantization, distilled from the fine-tuned one, on the same batches and noise. Then it
compares the float model, the fine-tuned one, that one quantized after training, and the quantization-aware one, which
is frozen, exported, verified in a fresh process and judged *as reloaded*: by numbers, and by the images they draw.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import field_validator

import qat
from qat.quantizers import AnyAlgorithm
from qat.report import run_command
from recipes import command
from recipes.common.config import load_config
from recipes.common.diffusion_config import DiffusionConfig, source_of
from recipes.common.settings import OptimizationSettings, data_start

TUNED, QUANTIZED, TRAINED = "float, fine-tuned", "fine-tuned, then quantized", "quantization-aware training"
SQUARED = qat.Distillation(loss="squared", hidden_states=1.0)


class Config(DiffusionConfig):
    """A diffusion transformer, from float to a verified quantized checkpoint that stock diffusers loads."""

    algorithm: AnyAlgorithm = qat.Automatic(start="best")
    """How scales are found, for the type of each layer; post-training quantization takes what it begins with."""
    optimization: OptimizationSettings = OptimizationSettings(
        batch_size=32, learning_rate=5e-5, float_learning_rate=1e-4, scale_learning_rate=1.5e-4, distillation=SQUARED
    )
    """Steps, learning rates, distillation from the fine-tuned float model."""
    target: Literal["diffusers", "quanto"] | None = None
    """Who will load the export; none: diffusers, or quanto where activations are quantized, which diffusers cannot."""

    @field_validator("optimization")
    @classmethod
    def _compares_predictions(cls, optimization: OptimizationSettings) -> OptimizationSettings:
        if optimization.distillation.loss != "squared":
            raise ValueError(
                f"distillation.loss: must be 'squared', for noise and velocity have no classes, got "
                f"{optimization.distillation.loss!r}"
            )
        return optimization


def main(argv: Sequence[str]) -> None:
    config = load_config(Config, argv, str(Config.__doc__), prog=command("text_to_image"))
    from recipes.common.callbacks import LastCheckpoints  # these take seconds: a wrong option is told before
    from recipes.common.checkpoints import end_run, settings_of, start_run
    from recipes.common.comparison import DiffusionComparison
    from recipes.common.diffusion import diffusion_data, inspected
    from recipes.common.fine_tuned import FineTunedWeights
    from recipes.common.gate import Gate
    from recipes.common.models import load_pipeline, load_teacher, require_packages
    from recipes.common.progress import quiet_libraries, stage
    from recipes.common.results import show_end
    from recipes.common.run import begin
    from recipes.common.training import FitSettings, calibrate_and_freeze, fit, quantized_copy, require_teacher
    from recipes.data.tensors import move
    from recipes.tasks import Diffusion

    quiet_libraries()
    require_packages({"diffusers": "diffusers", "matplotlib": "report"})
    run, spec, settings, schedule = begin("text_to_image", config), config.spec, config.optimization, config.schedule
    target = config.target or ("quanto" if spec.activation_type else "diffusers")
    pipeline, folder = load_pipeline(source_of(config), trust_remote_code=config.trust_remote_code)
    model, trust = pipeline.transformer, config.trust_remote_code
    teacher = load_teacher(config, lambda path: load_pipeline(path, trust_remote_code=trust)[0].transformer)
    require_teacher(model, teacher, settings.distillation)
    qat.inspect(model, spec, target=target)  # here a spec that does not fit is an error, before anything is encoded
    # Activations and starts are calibrated by what the real sampler brings, at all timesteps.
    sampled = schedule.calibration_batches if spec.activation_type or data_start(config.algorithm, spec) else 0
    data = diffusion_data(pipeline, folder, config, run.device, settings.batch_size, sampled)
    del pipeline  # text encoders and autoencoder are out of memory while training
    require_teacher(model, teacher, settings.distillation, Diffusion(), data.batches)
    print(inspected(model, spec, target, data.example))
    prepared_for: dict[str, Any] = {"target": target, "observer": config.observer, "example_inputs": data.example}
    prepared_for |= {"spec": spec, "algorithm": config.algorithm}
    checkpoints = run.beside("checkpoints")
    start_run(checkpoints, config, run.resume, run.beside("logs"))

    how: dict[str, Any] = {"settings": FitSettings(settings, config.trainer, config.seed, run.beside("logs"))}
    tuned, rate = copy.deepcopy(model), settings.float_learning_rate
    kept = FineTunedWeights(checkpoints, config)
    if not kept.restore(tuned):
        kept.save(tuned, fit("fine-tuning", tuned, Diffusion(), data.batches, learning_rate=rate, **how))
    comparison = DiffusionComparison(config, data, spec.torch_dtype, tuned, run.device, checkpoints)
    comparison.judge("float", model, run.device, 0, None, draws=False)
    comparison.judge(TUNED, tuned, run.device, settings.steps, rate)
    model.load_state_dict(tuned.state_dict())  # training with quantization goes on from there
    if run.resume is not None and QUANTIZED in comparison:  # the checkpoint has what calibration found
        comparison.judge_export(QUANTIZED, None, run.served_on, settings.steps, rate)
    else:
        # Weights that begin to quantize later get their start then, from the batches of the fit.
        later = schedule.settled_from > 0
        quantized = quantized_copy(model, data.sampled, sampled, run.device, later=later, **prepared_for)
        with TemporaryDirectory() as directory:
            qat.export(quantized, directory)
            comparison.judge_export(QUANTIZED, Path(directory), run.served_on, settings.steps, rate)
    gate = Gate(comparison.losses, TUNED, QUANTIZED, TRAINED, settings, spec, config.algorithm)
    gate.before_training()

    callbacks = [
        qat.QuantizationAwareTraining(schedule=schedule, guards=config.guards, **prepared_for),
        LastCheckpoints(
            checkpoints, config.trainer.checkpoint_every, config.trainer.keep_checkpoints, settings_of(config)
        ),
    ]
    rate = settings.learning_rate
    how |= {"learning_rate": rate, "callbacks": callbacks, "teacher": teacher or tuned, "resume": run.resume}
    trainer = fit("training", model, Diffusion(), data.batches, **how)
    calibrate_and_freeze(model, data.sampled, sampled, run.device)
    if not trainer.is_global_zero:
        return  # of several processes, one goes on

    resolved = config.model_copy(update={"target": target}).model_dump(mode="json")
    example = move(data.example, torch.device("cpu"), spec.torch_dtype)
    with stage("exporting"):
        served: dict[str, Any] = {"config": resolved, "overwrite": run.overwrite, "progress": True}
        qat.export(model, run.output, example_inputs=example, **served)
    with stage("verifying"):
        verified = qat.verify(run.output, fresh_process=True)
    comparison.judge_export(TRAINED, run.output, run.served_on, settings.steps, rate)
    gate.after_training()
    comparison.report(TUNED, run, gate.found)
    end_run(checkpoints)
    show_end(run, verified)


if __name__ == "__main__":
    run_command(main)
