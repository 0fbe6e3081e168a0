from __future__ import annotations

from typing import Any

import pytest

from qat.strict_yaml import MOST_BYTES, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("3", 3),
        ("a: [1, 1e-3, 1.5, true, null, x]", {"a": [1, "1e-3", 1.5, True, None, "x"]}),
        ("a: {b: {'1': x}}", {"a": {"b": {"1": "x"}}}),
        ("'on': x", {"on": "x"}),
    ],
    ids=["nothing", "number", "list", "mappings", "a quoted key"],
)
def test_plain_values_are_read(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: &x [1]\nc: *x", r"alias \*x is not read: write out the values .* \(line 3\)"),
        ("a: &a [*a]", r"alias \*a is not read"),
        ("[" * 100_000, r"nested more than 32 levels deep: no setting is \(line 1\)"),
        ("- " * 100_000, "nested more than 32 levels deep"),
        ("1: x", r"key 1 is no text: write it in quotes \(line 1\)"),
        ("a: {on: x}", r"key True is no text: write it in quotes \(line 1\)"),
        ("? [a]\n: x", r"key \['a'\] is no text"),
        ("a: 1\na: 2", r"key 'a' is given twice: leave one out \(line 2\)"),
        ('a: "b\\0"', "a text holds a NUL character, .*: leave it out"),
        ("a: !!python/name:os.getcwd", r"tag .*os\.getcwd is not read: leave it out"),
        ("a: !!set {b}", "tag .*set is not read"),
        ("a: 2020-99-99", "'2020-99-99': month must be in"),
        (f"a: {'1' * 5000}", r"'1+'\.\.\. of 5000 characters: "),
        ("[1", "while parsing a flow sequence"),
        ("x" * (MOST_BYTES + 1), "2000001 characters, and at most 2000000 are read"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_everything_else_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^{told}"):
        parse_yaml(text)
