"""What comes before a fit that quantizes activations, and after every one: calibration, then freezing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

import qat
from qat.tasks import Batch, move

__all__ = ["calibrate", "calibrate_and_freeze"]


def calibrate(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> None:
    """Calibrate with batches that lie elsewhere, on a device, where the model then stays."""
    qat.calibrate(model.to(device), (move(batch, device) for batch in batches))


def calibrate_and_freeze(model: nn.Module, batches: Iterable[Batch], count: int, device: torch.device) -> None:
    """Calibrate with ``count`` batches, on the device of this process, then freeze on the CPU.

    The model is frozen for the target that it was prepared for. Batches may be nested; they are what the model is
    called with. Several processes compare their activation ranges, and the backend of GPUs moves no tensor that lies on
    the CPU.
    """
    calibrate(model, itertools.islice(batches, count), device)
    qat.freeze(model.cpu())
