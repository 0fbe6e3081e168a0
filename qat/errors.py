"""What qat raises.

Every error a user can cause is a `QatError` (and the builtin that fits, so that a caller who never heard of this
package still catches it), and its message names the argument, the rule, the value received and the remedy.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "ExportError",
    "LoadError",
    "QatError",
    "SpecError",
    "StateError",
    "TargetError",
    "TrainingError",
    "VerifyError",
]


class QatError(Exception):
    """Base of all errors that qat raises on purpose."""


class SpecError(QatError, ValueError):
    """A `QuantSpec` (or a pattern in it) is wrong, or does not fit the model."""


class TargetError(QatError, ValueError):
    """The spec asks for what the target's loader cannot express."""


class StateError(QatError, RuntimeError):
    """A verb was called out of order: freeze before prepare, export before freeze."""


class CalibrationError(QatError, RuntimeError):
    """Calibration saw no batches, or never reached a layer."""


class TrainingError(QatError, RuntimeError):
    """Training cannot go on: a non-finite loss, or weight decay on scales."""


class ExportError(QatError, RuntimeError):
    """Files could not be written, or would not load as promised."""


class LoadError(QatError, RuntimeError):
    """A model directory is missing, corrupt, or does not match what it declares."""


class VerifyError(QatError, AssertionError):
    """A reloaded checkpoint differs from the frozen model, or from the evidence that freezing left."""
