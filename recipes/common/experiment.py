"""One float model, four results: what the recipes do whose models return logits.

A float model is fine-tuned. From there it trains with fake quantization, on the same batches in the same order. Four
models are judged on held-out examples: the float one, the fine-tuned one, that one quantized after training, and the
quantization-aware one, which is frozen, exported, verified in a fresh process and judged *as reloaded*.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

import qat
from recipes import tasks
from recipes.common import training
from recipes.common.batches import TrainingBatches
from recipes.common.callbacks import LastCheckpoints
from recipes.common.card import add_results
from recipes.common.checkpoints import end_run, settings_of, start_run
from recipes.common.fine_tuned import FineTunedWeights
from recipes.common.gate import Gate
from recipes.common.judged import Judged
from recipes.common.progress import stage, track
from recipes.common.results import ResultRow, inspect_totals, show_end, show_results
from recipes.common.run import Run
from recipes.common.settings import ComparisonConfig
from recipes.data.tensors import move
from recipes.tasks.logits import LogitTask

__all__ = ["Examples", "compare"]

FLOAT, TUNED, QUANTIZED, TRAINED = (
    "float",
    "float, fine-tuned",
    "fine-tuned, then quantized",
    "quantization-aware training",
)


@dataclass(frozen=True)
class Examples:
    """What to train and to judge on."""

    train: Dataset[Any]
    evaluation: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Any]] = default_collate
    """Makes a batch, as the task takes it, of a list of examples."""

    def example(self, task: LogitTask) -> dict[str, Any]:
        """Return what the model is called with for the first two examples of the evaluation."""
        count = min(2, len(self.evaluation))  # type: ignore[arg-type]
        return task.inputs(self.collate([self.evaluation[index] for index in range(count)]))


def compare(
    config: ComparisonConfig,
    run: Run,
    model: nn.Module,
    processor: Any,
    task: LogitTask,
    examples: Examples,
    teacher: nn.Module | qat.CachedLogits | None = None,
    show: Callable[[Mapping[str, nn.Module]], None] | None = None,
) -> None:
    """Train, export, verify, and print the table of the four models.

    Args:
        config: of the run.
        run: where it happens.
        model: float; trained in place with fake quantization.
        processor: what the export keeps beside the model: a tokenizer or an image processor.
        task: loss and metrics; distillation is taken from the configuration.
        examples: to train and to judge on.
        teacher: to distil from; none: the fine-tuned float model, or the float one where none is trained.

        show: is given the fine-tuned and the exported model at the end, by name, as to let them write samples.

    Raises:
        QatError: as the library, for what does not fit together or went wrong.
    """
    spec, settings, schedule = config.spec, config.optimization, config.schedule
    example = examples.example(task)
    print(inspect_totals(qat.inspect(model, spec, target=config.target, example_inputs=example)))
    prepared_for: dict[str, Any] = {"target": config.target, "observer": config.observer, "example_inputs": example}
    prepared_for |= {"spec": spec, "algorithm": config.algorithm}
    batches = TrainingBatches(examples.train, settings.batch_size, examples.collate, config.seed)
    training.require_teacher(model, teacher, settings.distillation, task, batches)
    checkpoints = run.beside("checkpoints")
    start_run(checkpoints, config, run.resume, run.beside("logs"))
    how = training.FitSettings(settings, config.trainer, config.seed, run.beside("logs"))
    scores: dict[str, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}
    kept_scores = Judged(checkpoints, config)

    def judge(name: str, judged: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        if name not in kept_scores:
            held_out = DataLoader(examples.evaluation, settings.batch_size, collate_fn=examples.collate)
            shown, found = track(held_out, f"evaluating: {name}", len(held_out)), list[float]()
            kept_scores.keep(name, tasks.evaluate(task, judged.to(device), shown, dtype, found), found)
        scores[name], losses[name] = kept_scores[name]

    def calibration() -> tuple[Iterable[Any], int, torch.device]:
        return map(task.inputs, batches), schedule.calibration_batches, run.device

    judge(FLOAT, model, run.device)
    float_size = sum(parameter.numel() for parameter in model.parameters()) * spec.torch_dtype.itemsize
    tuned = copy.deepcopy(model)
    if config.float_baseline:
        kept, rate = FineTunedWeights(checkpoints, config), settings.float_learning_rate
        if not kept.restore(tuned):
            kept.save(tuned, training.fit("fine-tuning", tuned, task, batches, learning_rate=rate, settings=how))
        judge(TUNED, tuned, run.device)
        model.load_state_dict(tuned.state_dict())  # training with quantization goes on from there
        if run.resume is not None and QUANTIZED in kept_scores:  # the checkpoint has what calibration found
            judge(QUANTIZED, model, run.device)
        else:
            later = schedule.settled_from > 0
            quantized = training.quantized_copy(model, *calibration(), later=later, **prepared_for)
            with TemporaryDirectory() as folder:
                qat.export(quantized, folder)
                judge(QUANTIZED, qat.load(folder), run.served_on, spec.torch_dtype)
    gate = Gate(losses, TUNED, QUANTIZED, TRAINED, settings, spec, config.algorithm)
    gate.before_training()

    callbacks = [
        qat.QuantizationAwareTraining(schedule=schedule, guards=config.guards, **prepared_for),
        LastCheckpoints(
            checkpoints, config.trainer.checkpoint_every, config.trainer.keep_checkpoints, settings_of(config)
        ),
    ]
    options: dict[str, Any] = {"callbacks": callbacks, "teacher": teacher or tuned, "resume": run.resume}
    rate = settings.learning_rate
    trainer = training.fit("training", model, task, batches, learning_rate=rate, settings=how, **options)
    training.calibrate_and_freeze(model, *calibration())
    if not trainer.is_global_zero:
        return  # of several processes, one goes on

    served: dict[str, Any] = {"example_inputs": move(example, torch.device("cpu"), spec.torch_dtype)}
    resolved = config.model_dump(mode="json")
    with stage("exporting"):
        served |= {"overwrite": run.overwrite, "progress": True}
        qat.export(model, run.output, processor=processor, config=resolved, **served)
    with stage("verifying"):
        verified = qat.verify(run.output, fresh_process=True)
    served_model = qat.load(run.output)
    judge(TRAINED, served_model, run.served_on, spec.torch_dtype)
    if show is not None:
        show({TUNED if config.float_baseline else FLOAT: tuned, TRAINED: served_model})
    gate.after_training()

    size = sum(file.stat().st_size for file in run.output.glob("model*.safetensors"))
    facts = {
        FLOAT: (float_size, 0, None),
        TUNED: (float_size, settings.steps, settings.float_learning_rate),
        QUANTIZED: (size, settings.steps, settings.float_learning_rate),  # the same layout
        TRAINED: (size, settings.steps, settings.learning_rate),
    }
    rows = [ResultRow(name, scores[name], *facts[name], gate.found.get(name)) for name in scores]
    show_results(rows, run.beside("results.json"), list(scores[FLOAT]))
    add_results(run.output, rows, list(scores[FLOAT]), resolved["data"]["source"])
    end_run(checkpoints)
    show_end(run, verified)
