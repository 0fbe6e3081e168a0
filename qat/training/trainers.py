"""What the callbacks of trainers share: a model is prepared once and calibrated, and nothing non-finite is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qat.calibration import CalibrationReport, calibrate_parts
from qat.errors import CalibrationError, QatError, StateError, TrainingError
from qat.hosts import get_target
from qat.layers import quantized_layers
from qat.observers import ObserverChoice
from qat.optimizers import watch
from qat.preparation import prepare, prepared_as
from qat.quantizers import Algorithm
from qat.spec import QuantSpec
from qat.training.observing import activation_quantizers

__all__ = ["calibrate_on", "own_statistics", "prepare_once", "require_finite", "require_finite_weights"]

logger = logging.getLogger("qat")


def prepare_once(
    model: nn.Module,
    spec: QuantSpec,
    algorithm: Algorithm,
    target: str,
    observer: ObserverChoice,
    example_inputs: Any = None,
) -> bool:
    """Prepare a float model, and look at its optimizers from now on; whether it was a float one.

    Raises:
        StateError: it is prepared in another way; or see `qat.prepare`.
    """
    wanted: dict[str, Any] = {"algorithm": algorithm, "target": target, "observer": observer}
    fresh = not any(quantized_layers(model))
    if fresh:
        logged = prepare(model, spec, **wanted, example_inputs=example_inputs).inspection.warnings
        logger.info("prepared %d layers", len(prepared_as(model).layers))
        for note in prepared_as(model).notes:
            if note not in logged:
                logger.warning("%s", note)
    watch(model)
    wanted = {"spec": get_target(target).resolved(spec), **wanted}
    found = {name: getattr(prepared_as(model), name) for name in wanted}
    if found != wanted:
        theirs, ours = ({**dict(one.pop("spec")), **one, "algorithm": str(one["algorithm"])} for one in (found, wanted))
        told = [", ".join(f"{key}={one[key]!r}" for key in one if theirs[key] != ours[key]) for one in (theirs, ours)]
        raise StateError(f"spec: model is already prepared with {told[0]}, but the callback has {told[1]}: use one")
    return fresh


def calibrate_on(
    model: nn.Module, batches: Iterable[Any], model_inputs: Callable[[Any], Any], *, starts: bool, activations: bool
) -> CalibrationReport:
    """`qat.calibration.calibrate_parts`, with what ``model_inputs`` makes of training batches.

    Raises:
        CalibrationError: the model cannot be called with it, or see `qat.calibrate`.
    """
    try:
        return calibrate_parts(model, map(model_inputs, batches), starts=starts, activations=activations)
    except (QatError, AttributeError, LookupError, TypeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, QatError) else error
        if not isinstance(cause, AttributeError | LookupError | TypeError | ValueError):
            raise
        raise CalibrationError(
            f"model_inputs: the model cannot be called with what it makes of a training batch: {type(cause).__name__}: "
            f"{cause}: pass model_inputs, such as model_inputs=lambda batch: batch['x']"
        ) from error


def own_statistics(module: nn.Module, model: nn.Module) -> None:
    """Have DistributedDataParallel leave the statistics of activations in ``model`` alone, when it wraps ``module``.

    It would overwrite every rank's with rank 0's before each forward, and has no public way to leave buffers out.
    """
    own = {id(b) for quantizer in activation_quantizers(model) for b in quantizer.buffers()}
    ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ())}
    ignored |= {name for name, buffer in module.named_buffers() if id(buffer) in own}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        module, sorted(ignored)
    )


def require_finite(loss: Tensor, step: int) -> None:
    """Raise `TrainingError` when ``loss`` (any shape) holds inf or NaN."""
    if not bool(torch.isfinite(loss.detach()).all()):
        raise TrainingError(
            f"loss: became {float(loss.detach().float().mean())} at step {step}; the weights and the last checkpoint "
            "are untouched: lower the learning rate, or clip gradients"
        )


def require_finite_weights(module: nn.Module, step: int) -> None:
    """Raise `TrainingError` before weights that a non-finite gradient has spoilt replace a good checkpoint."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            raise TrainingError(
                f"gradient: made {name} non-finite by step {step}; the last checkpoint is untouched: lower the "
                "learning rate, or clip gradients"
            )
