"""YAML from a user's hand: plain values of a bounded size, or one sentence that says what is wrong.

YAML's own generality is where its surprises come from. An alias lets a file of a few lines stand for more values than
memory holds, a key may be a number, of two equal keys the last wins. So none of these is read.
"""

from __future__ import annotations

from typing import Any

import yaml

from qat.errors import shown

__all__ = ["MOST_BYTES", "parse_yaml"]

MOST_BYTES = 2_000_000
"""Bytes of the longest text that is read; it takes some seconds."""
_DEEPEST = 32
_TEXT = "tag:yaml.org,2002:str"


def parse_yaml(text: str) -> Any:
    """Read one value, of texts, numbers, flags, lists and mappings.

    Raises:
        ValueError: it is no YAML, or has aliases, tags, keys that are no texts, a key twice, a NUL character, more than
            32 levels, or more than `MOST_BYTES`.

    >>> parse_yaml("{weights: int4, exclude: [lm_head]}")
    {'weights': 'int4', 'exclude': ['lm_head']}
    >>> parse_yaml("{1: int8}")
    Traceback (most recent call last):
    ...
    ValueError: key 1 is no text: write it in quotes (line 1)
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text)} characters, and at most {MOST_BYTES} are read: say it in fewer")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_StrictLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _error(f"alias *{event.anchor} is not read: write out the values that it stands for", event)
            if (tag := getattr(event, "tag", None)) is not None:
                raise _error(f"tag {tag} is not read: leave it out", event)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise _error(f"nested more than {_DEEPEST} levels deep: no setting is", event)
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        told = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(told + (f" (line {place.line + 1})" if place else "")) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _error(problem: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the quick one, if built
    """The safe loader, made to raise at what it takes too generously."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after a look at its keys."""
        seen = set[str]()
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise _error(f"key {shown(self.construct_object(key, deep=True))} is no text: write it in quotes", key)
            if key.value in seen:
                raise _error(f"key {shown(key.value)} is given twice: leave one out", key)
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Say of what has the form of a number or a date, and is none, where it stands."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise _error(f"{shown(node.value)}: {error}", node) from None

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """Take the characters, which C libraries must be able to hold."""
        if "\0" in node.value:
            raise _error("a text holds a NUL character, which no path or name can: leave it out", node)
        return super().construct_scalar(node)
