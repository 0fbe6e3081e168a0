"""What a run keeps to go on from: files that are whole or skipped, with the settings that made them.

Beside ``step-40.ckpt`` lies ``step-40.json`` with its SHA-256, its step and the settings of the run. It is written
last, so a file without it, or with another digest, is no whole one. The price is one reading of each checkpoint.
``run.json`` tells whether a run that began here has ended. The folder is locked (``flock``) as long as one runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from pydantic import BaseModel

from qat.errors import listed
from qat.files.whole import explained, sync, whole_file
from recipes.common.config import ConfigError
from recipes.common.settings import RecipeConfig

__all__ = [
    "Kept",
    "begin_run",
    "differences",
    "end_run",
    "newest",
    "note",
    "of",
    "publish",
    "read_json",
    "remove",
    "settings_of",
    "start_run",
    "was_interrupted",
    "whole",
    "write_json",
]

logger = logging.getLogger("qat")
RUN = "run.json"
_ANY: Any = dict.fromkeys(
    ("output", "overwrite", "report", "resume"), True
)  # settings that make no difference to the weights
_ANY |= {"guards": True, "trainer": {"logger": True}}  # a run which guards stopped may go on with others


_held: dict[tuple[int, int], int] = {}  # open folders that this process locked, by device and inode


@dataclass(frozen=True)
class Kept:
    """A whole checkpoint."""

    path: Path
    step: int
    settings: dict[str, Any]


def settings_of(config: BaseModel) -> dict[str, Any]:
    """All settings of a run that decide its weights, as JSON holds them."""
    settings: dict[str, Any] = json.loads(config.model_dump_json(exclude=_ANY))
    return settings


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], within: str = "") -> list[str]:
    """Each setting that differs, but for the number of steps, with both values.

    >>> differences({"seed": 1, "optimization": {"steps": 3}}, {"seed": 2, "optimization": {"steps": 4}})
    ['seed: 1 there, 2 here']
    """
    found: list[str] = []
    for key in dict.fromkeys([*theirs, *ours]):
        one, other, name = theirs.get(key), ours.get(key), f"{within}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{name}.")
        elif one != other and name != "optimization.steps":
            found.append(f"{name}: {one!r} there, {other!r} here")
    return found


def publish(partial: Path, path: Path, **about: Any) -> None:
    """Give a file, or a directory as sharding strategies write it, its name, once it is on the disk."""
    files = [partial] if partial.is_file() else [file for file in partial.rglob("*") if file.is_file()]
    for file in files:
        sync(file)
    remove(path)
    partial.replace(path)
    try:
        note(path, **about)
    except Exception:  # without a note it would take space for nothing
        remove(path)
        raise


def note(path: Path, **about: Any) -> None:
    """Write what is known of a file or directory beside it, with its SHA-256: from now on it counts as whole."""
    with explained(path):
        write_json(path.with_suffix(".json"), {**about, "sha256": _digest(path)})


def whole(path: Path) -> dict[str, Any] | None:
    """What `note` wrote beside a file; None, with a warning, where the file is damaged or was never finished."""
    try:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if about["sha256"] == _digest(path):
            return about
        reason = "its SHA-256 is another"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("%s is skipped, for it is damaged or was not written to its end (%s)", path, reason)
    return None


def newest(folder: Path) -> Kept | None:
    """The newest whole checkpoint in a folder; damaged ones are named in a warning."""
    for path in reversed(of(folder)):
        if (about := whole(path)) is not None:
            return Kept(path, about["step"], about["settings"])
    return None


def of(folder: Path) -> list[Path]:
    """All checkpoints in a folder, whole or not, by step."""
    found = [path for path in folder.glob("step-*.ckpt") if path.stem.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def remove(path: Path) -> None:
    """Remove a file or directory and what is noted of it, which goes first."""
    path.with_suffix(".json").unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # which another process may be removing too
    path.unlink(missing_ok=True)


def was_interrupted(folder: Path, config: BaseModel) -> bool:
    """Whether a run of equal settings began with this folder for its checkpoints, and has not ended."""
    state = read_json(folder / RUN)
    return state is not None and not state["ended"] and not differences(state["settings"], settings_of(config))


def begin_run(folder: Path, config: RecipeConfig) -> Path | None:
    """Find the checkpoint that a run goes on from. Nothing is written: that is for `start_run`.

    Args:
        folder: of the run's checkpoints.
        config: of the run; a checkpoint that it names counts where the folder has none of this run.

    Raises:
        ConfigError: a checkpoint is of other settings, or the one that is named is not whole, or another process runs.
    """
    if folder.is_dir():
        _occupy(folder)
    settings, state, named = settings_of(config), read_json(folder / RUN), config.resume
    found = newest(folder) if state is not None and not state["ended"] else None
    if named is not None and (found is None or _same(named.parent, folder)):
        about = whole(named)
        if about is None or not (isinstance(about.get("step"), int) and isinstance(about.get("settings"), Mapping)):
            raise ConfigError(
                f"resume: {str(named)!r} is no whole checkpoint of a recipe: give a step-N.ckpt that one wrote, with "
                "the step-N.json beside it"
            )
        found = Kept(named, about["step"], about["settings"])
    if found is not None and (other := differences(found.settings, settings)):
        raise ConfigError(
            f"{'resume' if found.path == named else 'output'}: {str(found.path)!r} was made with other settings: "
            f"{listed(other, 6, '; ')}: give those of that run, another output, or remove its checkpoints"
        )
    if found is None:
        return None
    steps: int = config.optimization.steps  # type: ignore[attr-defined]  # which each recipe adds
    rank_zero_only(print)(f"going on from step {found.step} of {steps} ({found.path})")
    return found.path


def start_run(folder: Path, config: RecipeConfig, resume: Path | None, logs: Path | None = None) -> None:
    """Note that a run has begun, once all that it needs was found, and forget what one left that has ended.

    Args:
        folder: of the run's checkpoints.
        config: of the run.
        resume: what `begin_run` found.
        logs: the folder of the run's logs. `qat report` shows them, so those of another run go too.

    Raises:
        ConfigError: another process trains with this folder.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _occupy(folder)
    if was_interrupted(folder, config):
        return
    if resume is None or not _same(resume.parent, folder):
        # By each process, for each looks there next: a removal by one might come after another's look.
        for path in [*of(folder), folder / "fine_tuned.safetensors", folder / "judged.json"]:
            remove(path)
        for path in () if logs is None else logs.glob("*/metrics.csv"):
            rank_zero_only(shutil.rmtree)(path.parent, ignore_errors=True)
    rank_zero_only(write_json)(folder / RUN, {"settings": settings_of(config), "ended": False})


@rank_zero_only
def end_run(folder: Path) -> None:
    """Note that a run has ended: the next one with its settings begins anew."""
    write_json(folder / RUN, {**(read_json(folder / RUN) or {}), "ended": True})
    if handle := _held.pop(_identity(folder), 0):
        os.close(handle)


@rank_zero_only
def _occupy(folder: Path) -> None:
    """Lock a folder until the run or its process ends; a file system without locks goes without."""
    if _identity(folder) in _held:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"output: another process trains with {str(folder)!r} now: wait until it has ended, or give another output"
        ) from None
    except OSError:
        os.close(handle)
        return
    _held[_identity(folder)] = handle


def _identity(folder: Path) -> tuple[int, int]:
    return (found := folder.stat()).st_dev, found.st_ino


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote with the settings of a run; None where nothing whole is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"settings": {}, "ended": False, **found} if isinstance(found, dict) else None


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that appears whole or not at all."""
    with whole_file(path) as made:
        made.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    if path.is_dir():
        inside = {str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
        return hashlib.sha256(json.dumps(inside).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
