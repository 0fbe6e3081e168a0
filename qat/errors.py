"""What qat raises.

Every error a user can cause is a `QatError` (and the builtin that fits, so that a caller who never heard of this
package still catches it), and its message names the argument, the rule, the value received and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

__all__ = [
    "CalibrationError",
    "ExportError",
    "LoadError",
    "QatError",
    "SpecError",
    "StateError",
    "TargetError",
    "TrainingError",
    "UnjudgedError",
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


class UnjudgedError(LoadError):
    """An export is whole, but nothing in it builds its model, so that neither a yes nor a no is known."""


class VerifyError(QatError, AssertionError):
    """A reloaded checkpoint differs from the frozen model, or from the evidence that freezing left."""

    report: Any = None
    """The `VerifyReport`, once all checks were made."""


_FAULTS_SHOWN = 8


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first few of ``names``, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def meant(value: object, choices: Iterable[str]) -> str:
    """The choice that ``value`` is a misspelling of, as a question for the end of an error; empty if there is none.

    >>> meant("transformer", ["quanto", "transformers"])
    " (did you mean 'transformers'?)"
    """
    close = get_close_matches(value, list(choices), n=1) if isinstance(value, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(value: object) -> str:
    """A value as an error shows it: its beginning, if it is a long text, or the name of its type, if it is another."""
    if isinstance(value, str) and len(value) > 100:
        return f"{value[:60]!r}... of {len(value)} characters"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 and "\n" not in text else f"a {type(value).__name__}"


def told(error: Exception) -> str:
    """What another library's exception says, in one line of at most 400 characters.

    >>> told(ValueError("a   b"))
    'a b'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} ..."


def load_error(what: str, faults: Sequence[str]) -> LoadError:
    """One `LoadError` for all faults of a directory, shortened to the first few."""
    shown = [f"  - {fault}" for fault in faults[:_FAULTS_SHOWN]]
    if len(faults) > _FAULTS_SHOWN:
        shown.append(f"  - and {len(faults) - _FAULTS_SHOWN} more")
    return LoadError("\n".join([f"{what}:", *shown, "Export the model again with qat.export, or restore its files."]))
