"""What recipes let a user choose: the same fields, defaults and rules in each.

Nothing here imports Lightning or a model library: a wrong option is told before anything slow is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    computed_field,
    field_validator,
    model_validator,
)

import qat
from qat.formats import QUANTO
from qat.hosts import get_target
from qat.hosts.configurations import local_directory, source_fault
from qat.observers import Best, ObserverChoice
from qat.quantizers import Algorithm, AnyAlgorithm
from qat.spec import QuantSpec
from qat.starts import DATA_STARTS
from qat.training.distillation import Distillation
from qat.training.guards import NumericalGuards
from qat.training.schedule import FAULTS_BEYOND, Decay, QuantizationSchedule
from recipes.data.settings import Count, Settings, Whole

__all__ = [
    "FSDP2",
    "ComparisonConfig",
    "LoggerName",
    "ModelSource",
    "OptimizationSettings",
    "RecipeConfig",
    "TrainerSettings",
    "data_start",
]


FSDP2 = "fsdp2"


def _directory_or_hub_name(source: str) -> str:
    if (fault := source_fault(source)) is not None:
        raise ValueError(f"must be a directory that exists, or a name on the hub; it {fault}")
    return str(local_directory(source) or source)


ModelSource: TypeAlias = Annotated[str, AfterValidator(_directory_or_hub_name)]
"""A local directory, or what can be a hub name: a misspelt path is an error before any library is asked for it."""


LoggerName: TypeAlias = Literal["csv", "tensorboard", "wandb", "mlflow", "none"]
"""A logger of Lightning."""


def _is_file(path: Path) -> Path:
    if not os.path.isfile(path):  # of os, to whom no name is too long
        raise ValueError("must be a file that exists")
    return path


UserPath: TypeAlias = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path, in which ~ is a home, as a shell would have it."""


class OptimizationSettings(Settings):
    """How long and how fast a recipe trains; the float model that it compares with trains for the same steps."""

    steps: Count = 100
    """Optimizer steps of each training."""
    batch_size: Count = 8
    """Examples a batch, on each device."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of quantization-aware training."""
    float_learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the float fine-tuning that is compared with."""
    scale_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of learned scales; none: a tenth of the weights'."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the weights; scales never have any."""
    warmup_steps: Whole | None = None
    """Steps in which the learning rate rises from 0 to its peak; none: a twentieth of all."""
    decay: Decay = "cosine"
    """How the learning rate goes from its peak to the last step: to 0 as a cosine or linearly, or constant."""
    average: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, about the last 1 / (1 - decay) steps, which replaces them; none: no."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; none: no limit."""
    distillation: Distillation = Distillation()
    """What is learned from a float teacher, the fine-tuned model if there is one; by default all of the loss."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: must be at most steps ({self.steps}), got {self.warmup_steps}: lower it")
        return self


class TrainerSettings(Settings):
    """On what and how a recipe trains; all but fsdp2 and the last five are Lightning's own."""

    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu."""
    devices: Annotated[int, Field(ge=-1, le=1024)] | str = 1
    """How many devices of each node, or which."""
    num_nodes: Count = 1
    """How many nodes train together, each started by torchrun, SLURM or the like."""
    strategy: str = "auto"
    """Lightning's strategy: auto, ddp and others; or fsdp2, which shards the model by `qat.shard`."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    """Lightning's precision; master weights should be float32, so the mixed ones rather than the true ones."""
    accumulate_grad_batches: Count = 1
    """Batches whose gradients are averaged for one optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    deterministic: bool = False
    """Use deterministic algorithms alone: a run on a GPU then repeats, and goes on after a break, to the bit."""
    compile: bool = False
    """Compile the model for training; with fsdp2, each of its blocks."""
    logger: LoggerName = "csv"
    """Lightning's logger, whose package must be installed; CSV files go to <output>-logs, for `qat report`."""
    checkpoint_every: Count = 50
    """Steps between the checkpoints of quantization-aware training, kept beside the output."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints are left."""


class RecipeConfig(Settings):
    """What every recipe lets a user choose; each adds its data, its optimization and its targets."""

    model: ModelSource | None = None
    """The float model: a local directory or a hub name; none: the reference model beside the recipes."""
    teacher: ModelSource | None = None
    """The float model to distil from; none: the fine-tuned model, or the float one where none is trained."""
    trust_remote_code: bool = False
    """Run code that comes with the model, from its directory or from the hub, for models that need it."""
    spec: QuantSpec = QuantSpec(weights="int4")
    """What is quantized."""
    observer: ObserverChoice = Best()
    """What activation scales are taken from."""
    schedule: QuantizationSchedule = QuantizationSchedule()
    """When quantization happens."""
    guards: NumericalGuards = NumericalGuards(log=True)
    """What happens when numbers go wrong: inf or NaN, collapsed scales, dead codes, saturation."""
    trainer: TrainerSettings = TrainerSettings()
    """Devices, precision and the like."""
    resume: Annotated[UserPath, AfterValidator(_is_file)] | None = None
    """A checkpoint of another run to go on from: step-N.ckpt beside its output; a run finds its own without this."""
    output: UserPath | None = None
    """Where the export goes; none: a folder named by the types under outputs/<recipe>, replaced if it exists."""
    overwrite: bool = False
    """Replace an output directory that is not empty."""
    report: bool = True
    """Write a page about the run beside the export, where matplotlib is installed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the order of the data, the noise and the pictures."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def recipe(self) -> str:
        """The recipe that this configures. A file may name it, and exports do, so that no other recipe takes the file.

        It is the name of the recipe's file: a recipe that is run as a program is the module ``__main__``.
        """
        return self._recipe()

    @classmethod
    def _recipe(cls) -> str:
        return Path(getattr(sys.modules[cls.__module__], "__file__", None) or "").stem

    @model_validator(mode="before")
    @classmethod
    def _is_for_this_recipe(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "recipe" not in values:
            return values
        others = dict(values)
        if (named := others.pop("recipe")) != cls._recipe():
            raise ValueError(
                f"recipe: must be {cls._recipe()!r}, the recipe that runs, got {named!r}: run the recipe that the file "
                f"names (./scripts/quickstart {named} FILE), or give a file for this one"
            )
        return others

    @field_validator("schedule")
    @classmethod
    def _fits_the_spec(cls, schedule: QuantizationSchedule, info: ValidationInfo) -> QuantizationSchedule:
        if (spec := info.data.get("spec")) and spec.activation_type and not schedule.calibration_batches:
            raise ValueError("calibration_batches: must be above 0, for spec quantizes activations")
        return schedule

    @model_validator(mode="after")
    def _the_target_has_the_types(self) -> Self:
        get_target(getattr(self, "target", None) or "diffusers").check_types(self.spec)
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        """What the library says when training begins, before anything slow."""
        until, steps = self.schedule.first_weights_until, getattr(self, "optimization", OptimizationSettings()).steps
        types = _weight_types(self.spec)
        for name, fault in FAULTS_BEYOND.items():
            if (value := getattr(self.schedule, name)) and value >= steps:
                raise ValueError(
                    f"schedule.{name}: must be below optimization.steps ({steps}), got {value}: {fault}; lower it, or "
                    "leave it out"
                )
        if until is not None and "int2" not in types:
            raise ValueError("schedule.first_weights: is for int2 weights, which spec does not ask for: leave it out")
        return self

    @model_validator(mode="after")
    def _starts_have_their_batches(self) -> Self:
        start = data_start(getattr(self, "algorithm", None), self.spec)
        if start and not self.schedule.calibration_batches:
            raise ValueError(
                f"schedule.calibration_batches: must be above 0, for algorithm.start={start!r} needs data: set it, or "
                "algorithm.start to 'clip'"
            )
        return self

    @model_validator(mode="after")
    def _sharding_leaves_whole_weights(self) -> Self:
        """What the library says in the setup of quantization-aware training, before anything slow."""
        strategy, start = self.trainer.strategy, data_start(getattr(self, "algorithm", None), self.spec)
        average = getattr(self, "optimization", OptimizationSettings()).average
        wanted = {
            f"algorithm.start={start!r}": start and strategy != FSDP2,
            "first_weights": self.schedule.first_weights,
            "cage": self.schedule.cage,
            "optimization.average": strategy == FSDP2 and average is not None,
        }
        needs = next((name for name, asked in wanted.items() if asked), None)
        if needs and strategy.startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"trainer.strategy: {strategy!r} shards weights, and {needs} needs whole ones: use 'ddp', or leave it "
                "out (algorithm.start: 'clip')"
            )
        return self


def _weight_types(spec: QuantSpec) -> set[str]:
    """All types that a spec names for weights, "float" included."""
    return {spec.weights, *(over if isinstance(over, str) else over.weights for over in spec.overrides.values())}


def data_start(algorithm: Algorithm | None, spec: QuantSpec) -> str | None:
    """The start of the ranges of a spec's types if it needs data, so that weights alone need calibration batches too.

    >>> data_start(qat.Automatic(start="best"), QuantSpec(weights="int4"))
    'best'
    >>> data_start(qat.Automatic(start="best"), QuantSpec(weights="int8"))
    """
    known = (QUANTO.qtypes[name] for name in sorted(_weight_types(spec)) if name in QUANTO.qtypes)
    starts = (getattr(algorithm.for_type(qtype), "start", None) for qtype in known) if algorithm else ()
    return next((start for start in starts if start in DATA_STARTS), None)


class ComparisonConfig(RecipeConfig):
    """What recipes let a user choose that compare four models by their logits (`recipes.common.experiment`)."""

    algorithm: AnyAlgorithm = qat.Automatic()
    """How scales are found; `automatic` is the best for the type of each layer."""
    optimization: OptimizationSettings = OptimizationSettings()
    """Steps, learning rates, distillation (from the fine-tuned float model, where there is one)."""
    float_baseline: bool = True
    """Also fine-tune the float model and quantize it after training, for comparison."""
    target: Literal["quanto", "transformers", "compressed-tensors"] = "transformers"
    """Who will load the export."""


class ClassifierConfig(ComparisonConfig):
    """What recipes let a user choose that train a classifier."""

    spec: QuantSpec = QuantSpec(weights="int8", activations="int8")
    """What is quantized."""
    optimization: OptimizationSettings = OptimizationSettings(
        steps=100, batch_size=32, learning_rate=1e-4, float_learning_rate=1e-4
    )
    """Steps, learning rates, distillation (from the fine-tuned float model, where there is one)."""
    new_head: bool = False
    """Replace the model's output layer by an untrained one for the classes of the data."""

    @model_validator(mode="after")
    def _the_teacher_is_trained(self) -> Self:
        if self.new_head and not self.float_baseline and not self.teacher and self.optimization.distillation.weight:
            raise ValueError(
                "new_head: the output layer of a new head is untrained, so the float model is no teacher: leave "
                "float_baseline on, give a teacher, or set optimization.distillation.weight to 0"
            )
        return self
