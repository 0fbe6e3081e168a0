"""Where a fit's numbers go: a logger of Lightning, by configuration."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from recipes.common.settings import LoggerName

__all__ = ["logger_of"]


def logger_of(name: LoggerName, folder: Path | None, stage: str, resume: Path | None) -> Logger | None:
    """Make the logger of one fit.

    Args:
        name: which one; packages that it needs are the user's to install.
        folder: of the run's logs. CSV files, one a fit, go into a folder of theirs there, which `qat report` reads.
        stage: what the fit is called.
        resume: the checkpoint that it goes on from. It then has a file of its own, so that earlier steps are kept.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    if name == "none" or folder is None:
        return None
    options: dict[str, Any] = {"save_dir": str(folder), "name": stage}
    if name == "csv":
        found = re.fullmatch(r"step-(\d+)\.ckpt", "" if resume is None else resume.name)
        version = stage if resume is None else f"{stage}-from-{found[1] if found else 'another-run'}"
        for old in folder.glob(f"{stage}*"):  # of a run before, or of steps that are done again
            if resume is None or old.name == version or _first_step(old) >= _first_step(Path(version)) >= 0:
                shutil.rmtree(old)
        return loggers.CSVLogger(str(folder), name="", version=version)
    if name == "tensorboard":
        return loggers.TensorBoardLogger(**options)
    folder.mkdir(parents=True, exist_ok=True)
    run = folder.name.removesuffix("-logs")
    if name == "wandb":
        return loggers.WandbLogger(name=f"{run} {stage}", save_dir=str(folder))
    return loggers.MLFlowLogger(experiment_name=run, run_name=stage, tracking_uri=f"file:{folder.absolute()}")


def _first_step(log: Path) -> int:
    """The step that a log goes on from; -1 of one from the start, or from a checkpoint of another run."""
    return int(log.name.rpartition("-from-")[2]) if re.search(r"-from-\d+$", log.name) else -1
