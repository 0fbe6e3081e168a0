"""`calibrate`: scales for activations, and starts of weights that need it, from data.

Starts come first (`qat.starting`), since scales of activations follow the weights (`qat.calibration.activations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qat.adapters import without_peft
from qat.calibration.activations import calibrate_activations
from qat.calibration.report import ActivationReport, CalibrationReport
from qat.data import require_several
from qat.distributed import equal_batches, reshard, sharded, together_between_runs
from qat.errors import StateError
from qat.inspection import check_module
from qat.moments import BUDGET
from qat.preparation import prepare, prepared_as
from qat.probing import kept_modes, run_batch, together
from qat.progress import counted
from qat.quantizers import Algorithm
from qat.runs import stop_watch
from qat.serving import snapshot
from qat.spec import QuantSpec
from qat.starting import awaiting, find_starts, in_float
from qat.tensors import map_tensors

__all__ = ["ActivationReport", "CalibrationReport", "calibrate", "calibrate_parts"]


@torch.inference_mode(False)  # in which scales and parameters would be tensors that no training can use
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    spec: QuantSpec | None = None,
    target: str | None = None,
    algorithm: Algorithm | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = False,
) -> CalibrationReport:
    """Set the scale of every quantized activation from ``batches``. In place; without gradients; in evaluation mode.

    Weights whose start needs data (`qat.LearnedAffine.start`) get it first, unless they have it or training has begun.

    With a ``spec`` the model is a float one and is prepared first. Then `qat.freeze` and `qat.export` give a quantized
    model without training. The first calibration of a model also decides which layers keep float activations: those
    whose output would be further off than the rule's ``largest_error`` (`qat.Best`), and those whose quantized output
    would meet an operation that does something else to it. Later ones leave that as it was trained.

    Args:
        model: a prepared model; with ``spec`` a float one.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments for
            ``model(...)``, on any device; with ``forward`` anything. Under ``torch.distributed`` each rank brings its
            own share, and the ranges are reduced; where the batches of one fail, all raise and name its rank.
        spec: what to quantize, as in `qat.prepare`.
        target: who will load the export, as in `qat.prepare`; only with ``spec``.
        algorithm: how scales of weights are found, as in `qat.prepare`; only with ``spec``.
        forward: runs the model once for a batch, ``forward(model, batch)``: a generate loop, a pipeline that holds the
            model, or what makes its inputs. It is called twice for each batch, a third time where outputs are
            quantized, and once more for each round of layers whose weights get a start, or for each time that layers
            turn out to need float outputs. What it returns is not used.
        progress: show a bar on the standard error stream.

    Raises:
        StateError: the model was not prepared, or was prepared and a ``spec`` is given.
        SpecError, TargetError: see `qat.prepare`.
        CalibrationError: there are no batches, the model cannot run one, one gives inf or NaN, or a layer was never
            reached by any of them; or an operation between layers would do something else to quantized tensors, and the
            layer before it was trained with them. The scales are as before then, and a float model is a float model
            again.

    >>> from qat import QuantSpec, freeze
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    >>> print(calibrate(model, [torch.ones(2, 16)], spec=QuantSpec(activations="int8")))
    calibrated 2 layers on 1 batches; 1 inputs arrive quantized
    >>> print(freeze(model))
    froze 2 layers (int8) for target 'quanto', served in bfloat16
    """
    require_several(batches)
    model = without_peft(model)
    if spec is None:
        for name, value in (("target", target), ("algorithm", algorithm)):
            if value is not None:
                raise StateError(f"{name}: belongs to a spec, got {value!r} without one: pass spec=, or leave it out")
        prepared_as(model)
        return calibrate_parts(model, batches, forward, progress)
    check_module(model)
    restore = snapshot(model)
    try:
        prepare(model, spec, algorithm=algorithm, target=target or "quanto")
        return calibrate_parts(model, batches, forward, progress)
    except BaseException:
        restore()
        raise


def calibrate_parts(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = False,
    *,
    starts: bool = True,
    activations: bool = True,
) -> CalibrationReport:
    """`calibrate` for a prepared model, or only a part of it; without both parts it shows that batches can be run."""
    if sharded(model):
        batches = equal_batches(batches)
        reshard(model)
    waiting = awaiting(model) if starts else {}
    if not waiting and activations:
        return calibrate_activations(model, batches, forward, progress)
    with together():
        kept = [batch if forward else map_tensors(torch.Tensor.cpu, batch) for batch in batches]

    def go(count: int | None) -> int:
        chosen = kept[:count]
        for number, batch in enumerate(counted(chosen, "inputs of layers", progress and count is None)):
            run_batch(model, batch, number, forward)
        return len(chosen)

    try:
        with kept_modes(model), torch.no_grad(), in_float(model.eval()):
            if not waiting:
                with together_between_runs(model):
                    return CalibrationReport(go(None), {}, ())
            started = find_starts(model, waiting, go, BUDGET)
    finally:
        stop_watch()  # which a failure or an interrupt may have left
    try:
        started.apply()
        report = CalibrationReport(0, {}, ())
        if activations:
            report = calibrate_activations(model, kept, forward, progress)
    except BaseException:
        started.undo()
        raise
    return replace(report, batches=len(kept), starts=started.reports)
