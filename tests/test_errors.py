"""Every error is a `QatError`, and the builtin that a caller who never heard of this package would catch."""

from __future__ import annotations

import pytest

from qat import errors
from qat.errors import shown, told

BUILTINS = {
    "SpecError": ValueError,
    "TargetError": ValueError,
    "StateError": RuntimeError,
    "CalibrationError": RuntimeError,
    "TrainingError": RuntimeError,
    "ExportError": RuntimeError,
    "LoadError": RuntimeError,
    "UnjudgedError": errors.LoadError,
    "VerifyError": AssertionError,
}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items(), ids=BUILTINS)
def test_an_error_is_caught_by_either_name(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.QatError)
    assert issubclass(kind, builtin)
    assert kind.__doc__


def test_a_long_value_is_shown_by_its_type() -> None:
    values = ("int4", [0] * 1000, "a\nb", {"a": "\n" * 99}, "x" * 300, 16**5000)
    assert [shown(value) for value in values] == [
        "'int4'",
        "a list",
        "'a\\nb'",
        "a dict",
        f"'{'x' * 60}'... of 300 characters",
        "a int",
    ]


def test_what_another_library_says_is_one_line_of_bounded_length() -> None:
    assert told(ValueError("a\n  b")) == "a b"
    assert told(KeyError()) == "KeyError"
    assert told(ValueError("x" * 500)) == "x" * 400 + " ..."


def test_no_error_is_left_out() -> None:
    assert set(errors.__all__) == {"QatError", *BUILTINS}
