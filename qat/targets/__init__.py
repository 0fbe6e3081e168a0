"""The targets, one file each, and one line each in `TARGETS`."""

from __future__ import annotations

from qat.errors import TargetError
from qat.targets.base import Target, input_hazard, kernel_hazard, loses_bias_on_cuda
from qat.targets.diffusers import DIFFUSERS
from qat.targets.quanto import QUANTO
from qat.targets.transformers import TRANSFORMERS

__all__ = ["TARGETS", "Target", "get_target", "input_hazard", "kernel_hazard", "loses_bias_on_cuda"]

TARGETS: dict[str, Target] = {target.name: target for target in (QUANTO, TRANSFORMERS, DIFFUSERS)}


def get_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        TargetError: there is none of that name.

    >>> get_target("quanto").name
    'quanto'
    """
    if name not in TARGETS:
        raise TargetError(f"target: must be one of {sorted(TARGETS)}, got {name!r}")
    return TARGETS[name]
