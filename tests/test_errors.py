"""Every error is a `QatError`, and the builtin that a caller who never heard of this package would catch."""

from __future__ import annotations

import pytest

from qat import errors

BUILTINS = {
    "SpecError": ValueError,
    "TargetError": ValueError,
    "StateError": RuntimeError,
    "CalibrationError": RuntimeError,
    "TrainingError": RuntimeError,
    "ExportError": RuntimeError,
    "LoadError": RuntimeError,
    "VerifyError": AssertionError,
}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items(), ids=BUILTINS)
def test_an_error_is_caught_by_either_name(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.QatError)
    assert issubclass(kind, builtin)
    assert kind.__doc__


def test_no_error_is_left_out() -> None:
    assert set(errors.__all__) == {"QatError", *BUILTINS}
