"""From a checkpoint of Lightning to a prepared model: what the checkpoint says of its preparation is done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from qat.errors import LoadError, listed
from qat.files.directory import as_path
from qat.observers import ObserverChoice
from qat.preparation import prepare
from qat.quantizers import AnyAlgorithm
from qat.runs import set_run_state
from qat.spec import QuantSpec
from qat.training.checkpoints import KEY

__all__ = ["require_whole", "restore"]

Model = TypeVar("Model", bound=nn.Module)


def restore(model: Model, checkpoint: str | PathLike[str]) -> Model:
    """Prepare a float model as a checkpoint's was, fill it with the checkpoint's weights and ranges, and return it.

    Then it can be frozen and exported, or trained on. Only tensors and plain data are read from the file.

    Args:
        model: float, of the architecture that was trained; its weights do not matter.
        checkpoint: of Lightning, one file, written with `qat.QuantizationAwareTraining` among the callbacks.

    Raises:
        LoadError: the file is no such checkpoint, or does not fill the model.
        SpecError, TargetError: the model cannot be prepared so; nothing is changed then.

    >>> import tempfile, lightning, qat
    >>> from torch.utils.data import DataLoader
    >>> class Task(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    ...     def training_step(self, batch, index):
    ...         return self.model(batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.AdamW(qat.parameter_groups(self.model, lr=1e-3))
    >>> task, trained = Task(), qat.QuantizationAwareTraining(qat.QuantSpec(weights="int8"))
    >>> options = {"max_steps": 1, "callbacks": [trained], "accelerator": "cpu", "logger": False}
    >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    >>> trainer = lightning.Trainer(**options, **quiet)
    >>> trainer.fit(task, DataLoader(torch.ones(2, 32)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer.save_checkpoint(f"{folder}/a.ckpt")
    ...     model = restore(Task().model, f"{folder}/a.ckpt")
    >>> model[0].weight_quantizer.qtype.name
    'int8'
    """
    path = as_path(checkpoint, LoadError).absolute()
    if not path.is_file():
        kind = "is a directory of shards" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise LoadError(f"checkpoint: {str(path)!r} {kind}: give one file, as trainer.save_checkpoint writes it")
    require_whole(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)  # without mmap, which asks no checksum
    except Exception as error:  # what can be wrong with a file has no common base
        raise LoadError(
            f"checkpoint: {str(path)!r} is no checkpoint of tensors and plain data, or a damaged one "
            f"({type(error).__name__}): give one that Lightning wrote"
        ) from error
    about = found.get(KEY) if isinstance(found, Mapping) else None
    state = found.get("state_dict") if isinstance(found, Mapping) else None
    if not isinstance(about, Mapping) or not isinstance(state, Mapping):
        raise LoadError(
            f"checkpoint: {str(path)!r} does not tell how its model was prepared: give one of a fit with "
            "qat.QuantizationAwareTraining, or prepare the model and call load_state_dict yourself"
        )
    prefix = _prefix(model, state)
    try:
        prepared, runs = about["prepared"], about["runs"]
        spec = QuantSpec.model_validate(prepared["spec"])
        algorithm: Any = TypeAdapter(AnyAlgorithm).validate_python(prepared["algorithm"])
        observer: Any = TypeAdapter(ObserverChoice).validate_python(prepared["observer"])
        target = prepared["target"]
    except (ValidationError, LookupError, TypeError) as error:
        raise LoadError(
            f"checkpoint: {str(path)!r} tells of a preparation that this release of qat does not know: "
            f"{' '.join(str(error).split())}: use the release that wrote it"
        ) from error
    prepare(model, spec, algorithm=algorithm, observer=observer, target=target)
    try:
        model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    except RuntimeError as error:
        raise LoadError(
            f"checkpoint: {str(path)!r} does not fill {type(model).__name__}: {' '.join(str(error).split())[:500]}: "
            "give the architecture that was trained"
        ) from error
    set_run_state(model, runs)
    return model


def require_whole(path: Path) -> None:
    """Raise `LoadError` where a file is not what ``NAME.json`` beside it says, as recipes write it."""
    beside = path.with_suffix(".json")
    try:
        wanted = json.loads(beside.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # another program's
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
            raise LoadError(
                f"checkpoint: {str(path)!r} is damaged: {beside.name} has another SHA-256: give another one"
            )


def _prefix(model: nn.Module, state: Mapping[str, Any]) -> str:
    """What stands before the model's names in the checkpoint of the module around it."""
    names = list(model.state_dict())
    starts = {key[: len(key) - len(names[0])] for key in state if key.endswith(names[0])} if names else set()
    for prefix in sorted(starts, key=len):
        if prefix in ("", f"{prefix[:-1]}.") and all(f"{prefix}{name}" in state for name in names):
            return prefix
    raise LoadError(
        f"checkpoint: does not hold what {type(model).__name__} has ({listed(names, 2)}), but "
        f"{listed(sorted(state), 3)}: give the architecture that was trained"
    )
