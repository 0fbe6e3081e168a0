"""Where a run happens and where what it makes goes, decided before anything slow begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qat.files.directory import check_destination
from qat.files.places import check_place
from recipes.common.checkpoints import begin_run, was_interrupted
from recipes.common.config import load_config
from recipes.common.settings import RecipeConfig
from recipes.common.training import device_of

__all__ = ["Run", "begin"]

_FILES = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Run:
    """Places of one run."""

    output: Path
    """The export."""
    overwrite: bool
    """Whether the export replaces what is there."""
    device: torch.device
    """Where this process trains, calibrates and judges."""
    served_on: torch.device
    """Where an export is judged."""
    resume: Path | None = None
    """The checkpoint that the training goes on from."""
    report: bool = False
    """Whether a page about the run is written."""

    def beside(self, suffix: str) -> Path:
        """Return a path next to the export, named after it."""
        return self.output.with_name(f"{self.output.name}-{suffix}")


def begin(recipe: str, config: RecipeConfig) -> Run:
    """Check what a run needs of this machine.

    Args:
        recipe: its name, which is that of the folder below ``outputs``.
        config: of the run.

    Raises:
        ExportError: the output directory must not be replaced.
        ConfigError: nothing here can train with these settings, or see `recipes.common.checkpoints.begin_run`.
    """
    types = "_".join(filter(None, (config.spec.weights, config.spec.activations)))
    output, overwrite = config.output or Path("outputs", recipe, types), config.overwrite or config.output is None
    check_place(output, "output")
    beside = output.with_name(f"{output.name}-checkpoints")
    interrupted = was_interrupted(beside, config)  # whose own export may lie there
    check_destination(output, overwrite or interrupted, "output")
    device = device_of(config.trainer)
    resume = begin_run(beside, config)
    _name_file(recipe, types, config)
    # On CUDA optimum-quanto compiles its float8 kernel when it is first used, for minutes: not for an evaluation.
    served_on = torch.device("cpu") if config.spec.weights == "float8" else device
    return Run(output, overwrite or interrupted, device, served_on, resume, config.report)


def _name_file(recipe: str, types: str, config: RecipeConfig) -> None:
    """Name the file with the settings for the types, where the command line alone chose these and nothing else."""
    plain, file = type(config)(), _FILES / recipe / f"{types}.yaml"
    given = getattr(config, "optimization", None)
    if config.spec == plain.spec or given != getattr(plain, "optimization", None) or not file.is_file():
        return
    if getattr(load_config(type(config), [str(file)], ""), "optimization", None) != given:
        print(f"note: these settings are for {plain.spec.weights}; {file.name} has those for {types}: pass it first")
